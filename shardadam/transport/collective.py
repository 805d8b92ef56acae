# SPDX-License-Identifier: Apache-2.0
"""Any backend of torch.distributed: NCCL by its native collectives, the others by all-to-all and a sum of our own.

Note: reduce-scatter without a reduction
    Gloo makes reduce-scatter of an all-reduce on a copy: twice the traffic, a temporary of the bucket's size, and a
    Work that never says that it is done. An all-to-all moves what a reduce-scatter must and no more, can be polled,
    and leaves the sum to us: in rank order, in the shard's float32 whatever travels, the same bits every time
    (``benchmarks/collectives.py`` compares them).

Note: streams
    NCCL's transfers are enqueued on a stream of our own with synchronous calls, which on NCCL return at once and keep
    no references; one event after each is what ``wait`` makes the caller's stream wait for. Buffers are never handed
    to ``record_stream``: they live as long as the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.transport.base import Pending, Staging, Transport, Visit, own_slice, sum_sources_
from shardadam.transport.groups import Lease, backend_of_device

# torch 2.13 has new names for two collectives and warns of the old ones.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CollectiveTransport(Transport):
    """Collectives on a group of our own.

    Args:
        exact_sums: sum by all-to-all on NCCL too.
    """

    def __init__(self, lease: Lease, *, exact_sums: bool = False) -> None:
        group = lease.training
        self.control = lease.control
        self.meeting = lease.pool.meeting
        self._lease = lease
        self._exact_sums = exact_sums
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._backends = backend_of_device(group)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        send = torch.empty(numel, dtype=dtype, device=device)
        reduces_itself = self._is_native(device) and not self._exact_sums
        return Staging(send, None if reduces_itself else torch.empty_like(send))

    def reduce_scatter(
        self,
        staging: Staging,
        numel: int,
        shard: Tensor,
        *,
        scale: float,
        accumulate: bool,
        visit: Visit | None = None,
    ) -> Pending:
        send = staging.send[:numel]
        if staging.receive is None:
            with self._on_stream(send.device) as stream:
                own = own_slice(send, self.rank, self.world_size)
                _reduce_scatter(own, send, group=self._group)
                sum_sources_(shard, [own], scale=scale, accumulate=accumulate, visit=visit)
            return _OnStream(stream)
        receive = staging.receive[:numel]
        sources = list(receive.chunk(self.world_size))
        if self._is_native(send.device):
            with self._on_stream(send.device) as stream:
                dist.all_to_all_single(receive, send, group=self._group)
                sum_sources_(shard, sources, scale=scale, accumulate=accumulate, visit=visit)
            return _OnStream(stream)
        work = dist.all_to_all_single(receive, send, group=self._group, async_op=True)
        return _OnHost(work, partial(sum_sources_, shard, sources, scale=scale, accumulate=accumulate, visit=visit))

    def all_gather(self, flat: Tensor) -> Pending:
        return self._start(_all_gather, flat, flat, own_slice(flat, self.rank, self.world_size))

    def all_reduce(self, block: Tensor) -> Pending:
        return self._start(dist.all_reduce, block, block)

    def broadcast(self, tensor: Tensor) -> Pending:
        # As bytes in memory order: any dtype and any strides, which backends treat differently.
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        return self._start(dist.broadcast, flat, flat, group_src=0)

    def close(self, *, clean: bool) -> None:
        self._lease.release(clean=clean)

    def _start(self, collective: Callable[..., Any], buffer: Tensor, *arguments: Any, **options: Any) -> Pending:
        if self._is_native(buffer.device):
            with self._on_stream(buffer.device) as stream:
                collective(*arguments, group=self._group, **options)
            return _OnStream(stream)
        return _OnHost(collective(*arguments, group=self._group, async_op=True, **options))

    def _is_native(self, device: torch.device) -> bool:
        """Whether transfers run on the device's stream."""
        return self._backends.get(device.type) == "nccl"

    def _on_stream(self, device: torch.device) -> _CommunicationStream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        return _CommunicationStream(self._streams[device])


class _OnHost(Pending):
    """A Work that the host completes, then ``finish``. Gloo's Works must be waited for once only, and dropped."""

    def __init__(self, work: Any, finish: Callable[[], None] | None = None) -> None:
        self._work = work
        self._finish = finish

    def done(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self) -> None:
        work, self._work = self._work, None
        work.wait()
        if self._finish is not None:
            self._finish()


class _CommunicationStream(AbstractContextManager["torch.cuda.Stream"]):
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


class _OnStream(Pending):
    """All that ``stream`` holds now; to wait is to enqueue a wait on the current stream."""

    on_host = False

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._event = stream.record_event()

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        torch.cuda.current_stream(self._stream.device).wait_event(self._event)
