# SPDX-License-Identifier: Apache-2.0
"""Any backend of torch.distributed: NCCL by its native collectives, the others by exchanges and a sum of our own.

Note: reduce-scatter without a reduction
    Gloo makes reduce-scatter of an all-reduce on a copy: twice the traffic, a temporary of the bucket's size, and a
    Work that never says that it is done. An all-to-all moves what a reduce-scatter must and no more, can be polled,
    and leaves the sum to us: in rank order, in the shard's float32 whatever travels, the same bits every time. Two of
    them, of what goes to the ranks before this one and of what goes to those after it, leave out its own slice, which
    lies between: that is neither copied nor given room. The all-gather is made of point-to-point exchange, whose
    Works cannot be polled, which nobody needs there (``benchmarks/collectives.py`` compares all of them).

Note: streams
    NCCL's transfers are enqueued on a stream of our own with synchronous calls, which on NCCL return at once and keep
    no references; one event after each is what ``wait`` makes the caller's stream wait for. Buffers are never handed
    to ``record_stream``: they live as long as the optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.ranks import desync
from shardadam.transport.base import Pending, ReduceScatter, Staging, Transport, own_slice
from shardadam.transport.groups import CommGroups, backend_of_device, timeout_s
from shardadam.transport.watchdog import Watchdog

_TAGS = 1 << 15  # as many as every backend has
_GLANCE_S = 0.0002
# torch 2.13 has new names for two collectives and warns of the old ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CollectiveTransport(Transport):
    """Collectives on a group of our own.

    Args:
        exact_sums: sum by all-to-all on NCCL too.
    """

    def __init__(self, groups: CommGroups, *, exact_sums: bool = False) -> None:
        group = groups.training
        self.control = groups.control
        self.store_barrier = groups.pool.store_barrier
        self._comm_groups = groups
        self._exact_sums = exact_sums
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._backends = backend_of_device(group)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._exchanges = 0  # that have been started; alike on all ranks
        self._watchdog: Watchdog | None = None

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        send = torch.empty(numel, dtype=dtype, device=device)
        if device.type == "cpu":
            return Staging(send, send.new_empty(numel - numel // self.world_size))
        reduces_itself = self._is_native(device) and not self._exact_sums
        return Staging(send, None if reduces_itself else torch.empty_like(send))

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        staging, send = request.staging, request.send
        own = own_slice(send, self.rank, self.world_size)
        if staging.receive is None:
            with self._on_stream(send.device) as stream:
                _reduce_scatter(own, send, group=self._group)
                request.sum_([own])
            return OnStream(stream)
        if send.device.type == "cpu":
            with self._with_others("A reduce-scatter"):
                works, received = self._exchange(send, staging.receive[: send.numel() - own.numel()])
            sources = [*received[: self.rank], own, *received[self.rank :]]
            return self._on_host("A reduce-scatter", works, partial(request.sum_, sources))
        receive = staging.receive[: send.numel()]
        sources = list(receive.chunk(self.world_size))
        if self._is_native(send.device):
            with self._on_stream(send.device) as stream:
                dist.all_to_all_single(receive, send, group=self._group)
                request.sum_(sources)
            return OnStream(stream)
        with self._with_others("A reduce-scatter"):
            work = dist.all_to_all_single(receive, send, group=self._group, async_op=True)
        return self._on_host("A reduce-scatter", [work], partial(request.sum_, sources))

    def _exchange(self, send: Tensor, receive: Tensor) -> tuple[list[Any], list[Tensor]]:
        """Sends every peer its slice of ``send``; returns where this rank's slices of theirs arrive, in rank order."""
        shard_numel = send.numel() // self.world_size
        before = [shard_numel if peer < self.rank else 0 for peer in range(self.world_size)]
        after = [shard_numel if peer > self.rank else 0 for peer in range(self.world_size)]
        start, stop = self.rank * shard_numel, (self.rank + 1) * shard_numel
        works = [
            dist.all_to_all_single(receive[start:], send[:start], after, before, group=self._group, async_op=True),
            dist.all_to_all_single(receive[:start], send[stop:], before, after, group=self._group, async_op=True),
        ]
        return works, list(receive.chunk(self.world_size - 1))

    def all_gather(self, flat: Tensor) -> Pending:
        own = own_slice(flat, self.rank, self.world_size)
        if flat.device.type != "cpu":
            return self._start("An all-gather", _all_gather, flat, flat, own)
        self._exchanges += 1
        options: dict[str, Any] = dict(group=self._group, tag=self._exchanges % _TAGS)  # several are under way at once
        peers = [peer for peer in range(self.world_size) if peer != self.rank]
        slices = flat.chunk(self.world_size)
        with self._with_others("An all-gather"):
            receives = [dist.irecv(slices[peer], group_src=peer, **options) for peer in peers]
            sends = [dist.isend(own, group_dst=peer, **options) for peer in peers]
        return self._on_host("An all-gather", [*receives, *sends])

    def all_reduce(self, block: Tensor) -> Pending:
        pending = self._start("An all-reduce", dist.all_reduce, block, block)
        if self._is_native(block.device):
            self._watch_stream(block.device)
        return pending

    def _watch_stream(self, device: torch.device) -> None:
        """From one all-reduce to the next, which is once a step."""
        if self._watchdog is None:
            ranks = dist.get_process_group_ranks(self._group)
            self._watchdog = Watchdog(device, timeout_s(self._group), partial(desync.report, ranks))
        with torch.cuda.stream(self._streams[device]):
            self._watchdog.started()

    def broadcast(self, tensor: Tensor) -> Pending:
        # As bytes in memory order: any dtype and any strides, which backends treat differently.
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        return self._start("A broadcast", dist.broadcast, flat, flat, group_src=0)

    def poll(self, seconds: float) -> bool:
        time.sleep(min(seconds, _GLANCE_S))  # the backend's own threads go on meanwhile
        return True

    def close(self, *, clean: bool) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        self._comm_groups.release(clean=clean)

    def _start(
        self, what: str, collective: Callable[..., Any], buffer: Tensor, *arguments: Any, **options: Any
    ) -> Pending:
        if self._is_native(buffer.device):
            with self._on_stream(buffer.device) as stream:
                collective(*arguments, group=self._group, **options)
            return OnStream(stream)
        with self._with_others(what):
            work = collective(*arguments, group=self._group, async_op=True, **options)
        return self._on_host(what, [work])

    def _on_host(self, what: str, works: list[Any], finish: Callable[[], None] | None = None) -> Pending:
        return _OnHost(works, finish, partial(self._with_others, what))

    @contextmanager
    def _with_others(self, what: str) -> Iterator[None]:
        """Says of what the backend raises who has made it so."""
        try:
            yield
        except RuntimeError as error:
            raise desync.desync_error(f"{what} with the other ranks", error, self._group) from error

    def _is_native(self, device: torch.device) -> bool:
        """Whether transfers run on the device's stream."""
        return self._backends.get(device.type) == "nccl"

    def _on_stream(self, device: torch.device) -> CommunicationStream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        return CommunicationStream(self._streams[device])


class _OnHost(Pending):
    """Works that the host completes, then ``finish``. Gloo's must be waited for once only, and dropped.

    Args:
        with_others: what it waits in.
    """

    def __init__(
        self,
        works: list[Any],
        finish: Callable[[], None] | None,
        with_others: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._works = works
        self._finish = finish
        self._with_others = with_others

    def done(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        with self._with_others():
            while self._works:
                self._works.pop(0).wait()
        if self._finish is not None:
            self._finish()


class CommunicationStream(AbstractContextManager["torch.cuda.Stream"]):
    """Runs what is inside on ``stream``, after all that the current stream holds."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._inside = torch.cuda.stream(stream)

    def __enter__(self) -> torch.cuda.Stream:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._inside.__enter__()  # type: ignore[no-untyped-call]
        return self._stream

    def __exit__(self, *exception: Any) -> None:
        self._inside.__exit__(*exception)


class OnStream(Pending):
    """All that ``stream`` holds now; to wait is to enqueue a wait on the current stream.

    Args:
        kept: a temporary that the stream uses, and that must live until the current stream has waited.
    """

    on_host = False

    def __init__(self, stream: torch.cuda.Stream, kept: Tensor | None = None) -> None:
        self._stream = stream
        self._kept = kept
        self._event = stream.record_event()

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        torch.cuda.current_stream(self._stream.device).wait_event(self._event)

    def wait_on_this_stream(self) -> None:
        self.wait()
