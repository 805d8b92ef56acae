# SPDX-License-Identifier: Apache-2.0
"""Gloo, and any other backend whose collectives the host completes: exchanges between ranks and a sum of our own.

Note: reduce-scatter without a reduction
    Gloo builds reduce-scatter from an all-reduce of a copy: twice the traffic, a temporary of the bucket's size, and a
    Work that never reports completion. An all-to-all moves only what a reduce-scatter needs, can be polled, and leaves
    the sum to us: in rank order and in the shard's float32 whatever dtype is sent, so the same bits every time. On the
    CPU there are two of them, one with the ranks before this one and one with the ranks after it. They leave out this
    rank's own slice, which lies between and needs no copy and no room. The all-gather uses point-to-point exchange,
    whose Works cannot be polled; nothing polls a gather (``benchmarks/collectives.py`` compares all of them).
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
from shardadam.transport.base import Pending, ReduceScatter, Staging, Transport, in_memory_order, own_slice
from shardadam.transport.groups import CommGroups

_TAGS = 1 << 15  # as many as every backend has
_POLL_S = 0.0002
# torch 2.13 renamed it and warns about the old name, the only one that torch 2.11 has.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class GlooTransport(Transport):
    """Tensors on the CPU, or on CUDA where the backend takes them, over a group of our own."""

    def __init__(self, groups: CommGroups) -> None:
        self.control = groups.control
        self.store_barrier = groups.pool.store_barrier
        self.rank = dist.get_rank(groups.training)
        self.world_size = dist.get_world_size(groups.training)
        self._comm_groups = groups
        self._group = groups.training
        self._exchanges = 0  # all-gathers started; equal on all ranks

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        send = torch.empty(numel, dtype=dtype, device=device)
        own_numel = numel // self.world_size if device.type == "cpu" else 0
        return Staging(send, send.new_empty(numel - own_numel))

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        send, receive = request.send, request.staging.receive
        assert receive is not None
        what = "A reduce-scatter"
        if send.device.type != "cpu":
            receive = receive[: send.numel()]
            with self._naming_ranks(what):
                work = dist.all_to_all_single(receive, send, group=self._group, async_op=True)
            return self._on_host(what, [work], partial(request.sum_, list(receive.chunk(self.world_size))))
        own = own_slice(send, self.rank, self.world_size)
        with self._naming_ranks(what):
            works, received = self._exchange(send, receive[: send.numel() - own.numel()])
        sources = [*received[: self.rank], own, *received[self.rank :]]
        return self._on_host(what, works, partial(request.sum_, sources))

    def _exchange(self, send: Tensor, receive: Tensor) -> tuple[list[Any], list[Tensor]]:
        """Sends every peer its slice of ``send``; returns the Works, and this rank's slices of the peers' buckets in
        rank order.
        """
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
            return self._start("An all-gather", _all_gather, flat, own)
        self._exchanges += 1
        options: dict[str, Any] = dict(group=self._group, tag=self._exchanges % _TAGS)  # several run at once
        peers = [peer for peer in range(self.world_size) if peer != self.rank]
        slices = flat.chunk(self.world_size)
        with self._naming_ranks("An all-gather"):
            receives = [dist.irecv(slices[peer], group_src=peer, **options) for peer in peers]
            sends = [dist.isend(own, group_dst=peer, **options) for peer in peers]
        return self._on_host("An all-gather", [*receives, *sends])

    def all_reduce(self, block: Tensor) -> Pending:
        return self._start("An all-reduce", dist.all_reduce, block)

    def broadcast(self, tensor: Tensor) -> Pending:
        return self._start("A broadcast", dist.broadcast, in_memory_order(tensor), group_src=0)

    def poll(self, seconds: float) -> bool:
        time.sleep(min(seconds, _POLL_S))  # the backend's own threads go on meanwhile
        return True

    def close(self, *, clean: bool) -> None:
        self._comm_groups.release(clean=clean)

    def _start(self, what: str, collective: Callable[..., Any], *arguments: Any, **options: Any) -> Pending:
        with self._naming_ranks(what):
            work = collective(*arguments, group=self._group, async_op=True, **options)
        return self._on_host(what, [work])

    def _on_host(self, what: str, works: list[Any], finish: Callable[[], None] | None = None) -> Pending:
        return _OnHost(works, finish, partial(self._naming_ranks, what))

    @contextmanager
    def _naming_ranks(self, what: str) -> Iterator[None]:
        """Turns the backend's errors into ones that name the ranks that caused them."""
        try:
            yield
        except RuntimeError as error:
            raise desync.desync_error(f"{what} with the other ranks", error, self._group) from error


class _OnHost(Pending):
    """Works that the host completes, then ``finish``. Gloo's Works must be waited for once only, and dropped.

    Args:
        naming_ranks: the context to wait in, which explains the backend's errors.
    """

    def __init__(
        self,
        works: list[Any],
        finish: Callable[[], None] | None,
        naming_ranks: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._works = works
        self._finish = finish
        self._naming_ranks = naming_ranks

    def done(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        with self._naming_ranks():
            while self._works:
                self._works.pop(0).wait()
        if self._finish is not None:
            self._finish()
