# SPDX-License-Identifier: Apache-2.0
"""Gloo, and every other backend whose collectives the host completes.

Note: reduce-scatter by all-to-all
    Gloo's reduce-scatter is an all-reduce of a copy: it sends twice the bytes, needs a temporary of the bucket's size,
    and its Work never reports completion. An all-to-all sends only what is needed and can be polled. The sum is then
    computed here, in rank order and in the shard's dtype whatever dtype is sent, so that it is reproducible bit for
    bit. On the CPU two all-to-alls, with the ranks before this one and with those after it, leave out this rank's own
    slice, which needs no copy. The all-gather uses point-to-point transfers; their Works cannot be polled, but nothing
    polls an all-gather. ``benchmarks/collectives.py`` compares all these forms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.ranks import desync
from shardadam.ranks.transfer_log import log_of, with_article
from shardadam.transport.base import Pending, ReduceScatter, Staging, Transport, in_memory_order, own_slice
from shardadam.transport.groups import CommGroups, backend_of_device

_TAGS = 1 << 15  # every backend supports at least this many
_POLL_S = 0.0002
# torch 2.13 renamed it, and warns about the old name; torch 2.11 has only the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class GlooTransport(Transport):
    """Moves tensors on the CPU, and on CUDA devices if the backend supports them."""

    def __init__(self, groups: CommGroups) -> None:
        self.control = groups.control
        self.store_barrier = groups.cache.store_barrier
        self._backends = backend_of_device(groups.training)
        self.devices = frozenset(self._backends)
        self.rank = dist.get_rank(groups.training)
        self.world_size = dist.get_world_size(groups.training)
        self._comm_groups = groups
        self._group = groups.training
        self._log = log_of(groups.training)
        self._compare = partial(desync.log_difference, dist.get_process_group_ranks(groups.training))
        self._exchanges = 0  # all-gathers started; equal on all ranks

    def allocate_staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        send = torch.empty(numel, dtype=dtype, device=device)
        own_numel = numel // self.world_size if device.type == "cpu" else 0
        return Staging(send, send.new_empty(numel - own_numel))

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        send, receive = request.send, request.staging.receive
        assert receive is not None
        what = "A reduce-scatter"
        self._log.add("reduce-scatter", send.nbytes)
        if send.device.type != "cpu":
            receive = receive[: send.numel()]
            with self._explain_errors(what):
                work = dist.all_to_all_single(receive, send, group=self._group, async_op=True)
            return self._on_host(what, send.device, [work], partial(request.sum_, list(receive.chunk(self.world_size))))
        own = own_slice(send, self.rank, self.world_size)
        with self._explain_errors(what):
            works, received = self._exchange(send, receive[: send.numel() - own.numel()])
        sources = [*received[: self.rank], own, *received[self.rank :]]
        return self._on_host(what, send.device, works, partial(request.sum_, sources))

    def _exchange(self, send: Tensor, receive: Tensor) -> tuple[list[Any], list[Tensor]]:
        """Send peers their slices of ``send``; return the Works, and the peers' parts of ``receive`` in rank order."""
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
            return self._start("all-gather", _all_gather, flat, own)
        self._log.add("all-gather", flat.nbytes)
        self._exchanges += 1
        options: dict[str, Any] = dict(group=self._group, tag=self._exchanges % _TAGS)  # several may run at once
        peers = [peer for peer in range(self.world_size) if peer != self.rank]
        slices = flat.chunk(self.world_size)
        with self._explain_errors("An all-gather"):
            receives = [dist.irecv(slices[peer], group_src=peer, **options) for peer in peers]
            sends = [dist.isend(own, group_dst=peer, **options) for peer in peers]
        return _OnHost([*receives, *sends], None, partial(self._explain_errors, "An all-gather"))

    def all_reduce(self, block: Tensor) -> Pending:
        return self._start("all-reduce", dist.all_reduce, block)

    def broadcast(self, tensor: Tensor) -> Pending:
        return self._start("broadcast", dist.broadcast, in_memory_order(tensor), group_src=0)

    def poll(self, seconds: float) -> bool:
        time.sleep(min(seconds, _POLL_S))  # the backend's own threads move the data
        return True

    def close(self, *, clean: bool) -> None:
        self._comm_groups.release(clean=clean)

    def _start(self, operation: str, collective: Callable[..., Any], *tensors: Tensor, **options: Any) -> Pending:
        self._log.add(operation, tensors[0].nbytes)
        what = with_article(operation).capitalize()
        with self._explain_errors(what):
            work = collective(*tensors, group=self._group, async_op=True, **options)
        return self._on_host(what, tensors[0].device, [work])

    def _on_host(
        self, what: str, device: torch.device, works: list[Any], finish: Callable[[], None] | None = None
    ) -> Pending:
        if self._backends.get(device.type) == "gloo":
            works = [_ComparedWork(work, self._compare) for work in works]
        return _OnHost(works, finish, partial(self._explain_errors, what))

    @contextmanager
    def _explain_errors(self, what: str) -> Iterator[None]:
        """Context manager: raise RankDesyncError, with the status of all ranks, for errors of the backend."""
        try:
            yield
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self._group)
            raise desync.desync_error(f"{what} with the other ranks", error, ranks) from error


class _OnHost(Pending):
    """Works that the host completes, then ``finish``. Waits for each Work once, and drops it, as Gloo requires.

    Args:
        explain_errors: returns the context manager to wait in.
    """

    def __init__(
        self,
        works: list[Any],
        finish: Callable[[], None] | None,
        explain_errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._works = works
        self._finish = finish
        self._explain_errors = explain_errors

    def done(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        with self._explain_errors():
            while self._works:
                self._works.pop(0).wait()
        if self._finish is not None:
            self._finish()


class _ComparedWork:
    """A Work of a collective of Gloo. A rank that waits long for it compares the transfers that all ranks have started.

    Works of other backends may end the transfer after a time limit, or know none.

    Args:
        compare: logs a difference; returns whether there is one.
    """

    def __init__(self, work: Any, compare: Callable[[], bool]) -> None:
        self._work = work
        self._compare = compare
        self.is_completed = work.is_completed

    def wait(self) -> None:
        while not self._completes_within(desync.COMPARE_S):
            if self._compare():
                self._work.wait()
                return

    def _completes_within(self, seconds: float) -> bool:
        try:
            self._work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if not self._work.is_completed():
                return False  # it goes on; unlike those of point-to-point transfers, which then fail
            self._work.wait()  # raises its error, if it has one
        return True
