# SPDX-License-Identifier: Apache-2.0
"""Hybrid sharding: a shard group splits one copy of the state, and a replica group holds equal shards.

Reduces gradients in two stages: a reduce-scatter in the shard group, then an all-reduce of the shard, in float32 or
float64, in the replica group. Every sum ends with an all-reduce over replicas, so that replicas are equal bit for bit.

Note: one order of all-reduces
    All ranks of a replica group must start their all-reduces in the same order, but they complete the reduce-scatters
    before them at different times. So each rank starts the all-reduces of shards in the order of the reduce-scatters,
    and all pending ones before any other transfer in the replica group. ``done`` starts those that need no waiting.

Note: one float32 sum at a time
    A bfloat16 shard needs a float32 buffer for its sum. If each bucket kept its own until the step, as the sum of a
    second round does, they would take more than a float32 shard. So on a GPU such a buffer belongs to the stream of the
    all-reduces, which uses its memory again for the next bucket, and whose reduce-scatter waits for this all-reduce.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.ranks.store_barrier import StoreBarrier
from shardadam.sums.sources import sum_sources_
from shardadam.transport.base import Pending, ReduceScatter, Staging, Transport
from shardadam.transport.streams import CommunicationStreams, OnStream

_SHARD_POLL_S = 0.0005


class HybridTransport(Transport):
    """
    Args:
        shard: of the shard group; allocates all buffers.
        replica: of the replica group, which has one rank of each shard group.
        control, store_barrier: over the ranks of all shard groups.
    """

    def __init__(
        self, shard: Transport, replica: Transport, *, control: dist.ProcessGroup | None, store_barrier: StoreBarrier
    ) -> None:
        self.rank = shard.rank
        self.world_size = shard.world_size
        self.replica = replica.rank
        self.replicas = replica.world_size
        self.control = control
        self.store_barrier = store_barrier
        self.devices = replica.devices if shard.devices is None else shard.devices
        self.trainable_devices = replica.trainable_devices  # the same backends as the shard group's
        self._shard = shard
        self._replica = replica
        self._unsummed: deque[_TwoStageSum] = deque()  # in order; their all-reduces have not been started
        self._streams = CommunicationStreams()

    # Buffers, all of the shard group

    def allocate_parameters(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._streams.note_owner(device)
        return self._shard.allocate_parameters(numel, dtype, device)

    def allocate_staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        return self._shard.allocate_staging(numel, dtype, device)

    def free_staging(self, staging: Staging) -> None:
        self._shard.free_staging(staging)

    def allocate_gradients(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return None: a sum over the shard group's gradients would miss those of the other shard groups."""
        return None

    def scales_sums(self, device: torch.device) -> bool:
        return self._shard.scales_sums(device)

    # Transfers

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        shard = request.shard
        exact = torch.promote_types(shard.dtype, torch.float32)
        if shard.dtype == exact:
            total = torch.empty_like(shard) if request.accumulate else shard
            return self._in_two_stages(request, total, kept=total)
        with self._streams.on(shard.device) if shard.is_cuda else nullcontext():
            return self._in_two_stages(request, torch.empty_like(shard, dtype=exact), kept=None)

    def _in_two_stages(self, request: ReduceScatter, total: Tensor, *, kept: Tensor | None) -> Pending:
        """Do ``reduce_scatter`` by way of ``total``.

        Args:
            kept: ``total``, if it must not be freed before the transfer is complete.
        """
        reduce_scatter = self._shard.reduce_scatter(replace(request, shard=total, accumulate=False, stats=None))
        finish = partial(_finish, request, total)
        if not reduce_scatter.on_host:
            with self._streams.on(total.device) as stream:
                reduce_scatter.wait()
                self._replica.all_reduce(total).wait()
                finish()
            return _InTwoStages(stream, reduce_scatter, kept=kept)
        # Ready all-reduces are started in `done`: sums may raise (memory), and nothing may once this is sent.
        transfer = _TwoStageSum(self, reduce_scatter, partial(self._replica.all_reduce, total), finish)
        self._unsummed.append(transfer)
        return transfer

    def all_gather(self, flat: Tensor) -> Pending:
        return self._shard.all_gather(flat)

    def all_reduce(self, block: Tensor) -> Pending:
        self._start_all()
        self._shard.all_reduce(block).wait()
        return self._replica.all_reduce(block)

    def broadcast(self, tensor: Tensor) -> Pending:
        self._start_all()
        self._replica.broadcast(tensor).wait()
        return self._shard.broadcast(tensor)

    def fence(self) -> None:
        self._shard.fence()

    def expect_progress(self, device: torch.device) -> None:
        self._shard.expect_progress(device)
        self._replica.expect_progress(device)

    def poll(self, seconds: float) -> bool:
        # The shard group only briefly: this rank may be waiting for the replica group.
        return self._shard.poll(min(seconds, _SHARD_POLL_S)) or self._replica.poll(seconds)

    def abort(self) -> None:
        self._shard.abort()
        self._replica.abort()

    def close(self, *, clean: bool) -> None:
        self._streams.release()
        self._shard.close(clean=clean)
        self._replica.close(clean=clean)

    # All-reduces of shards, in one order

    def start_ready(self) -> None:
        """Start the all-reduces whose reduce-scatters, and those before them, are complete. Does not wait."""
        while self._unsummed and self._unsummed[0].can_start():
            self._start_next()

    def start_through(self, last: _TwoStageSum) -> None:
        """Start the all-reduces up to that of ``last``, waiting for their reduce-scatters, and then the ready ones."""
        while not last.is_started:
            self._start_next()
        self.start_ready()

    def _start_next(self) -> None:
        """If this raises before it sends (memory), the transfer remains the next one."""
        self._unsummed[0].start()
        self._unsummed.popleft()

    def _start_all(self) -> None:
        if self._unsummed:
            self.start_through(self._unsummed[-1])


class _InTwoStages(OnStream):
    """All work that ``stream`` holds now: an all-reduce in the replica group, after ``reduce_scatter``.

    The slow all-reduce between hosts does not keep the buffer that the reduce-scatter has read.
    """

    def __init__(self, stream: torch.cuda.Stream, reduce_scatter: Pending, *, kept: Tensor | None) -> None:
        super().__init__(stream, kept=kept)
        self._reduce_scatter = reduce_scatter

    def wait_for_buffer(self) -> None:
        self._reduce_scatter.wait_for_buffer()


class _TwoStageSum(Pending):
    """A reduce-scatter in the shard group, then an all-reduce in the replica group; the host takes part in both.

    Args:
        reduce_scatter: has been started.
        start_all_reduce: called when ``reduce_scatter`` is complete.
        finish: called when the all-reduce is complete.
    """

    def __init__(
        self,
        transport: HybridTransport,
        reduce_scatter: Pending,
        start_all_reduce: Callable[[], Pending],
        finish: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._reduce_scatter = reduce_scatter
        self._start_all_reduce = start_all_reduce
        self._finish = finish
        self._all_reduce: Pending | None = None

    @property
    def is_started(self) -> bool:
        """Whether the all-reduce has been started."""
        return self._all_reduce is not None

    def can_start(self) -> bool:
        """Return True if ``start`` would not wait for a peer."""
        return self._reduce_scatter.done()

    def start(self) -> None:
        """Wait for the reduce-scatter, and start the all-reduce."""
        self._reduce_scatter.wait()
        self._all_reduce = self._start_all_reduce()

    def done(self) -> bool:
        self._transport.start_ready()
        return self._all_reduce is not None and self._all_reduce.done()

    def wait(self) -> None:
        self._transport.start_through(self)
        assert self._all_reduce is not None
        self._all_reduce.wait()
        self._finish()

    def is_released(self) -> bool:
        return self._reduce_scatter.is_released()

    def await_release(self) -> None:
        self._reduce_scatter.await_release()


def _finish(request: ReduceScatter, total: Tensor) -> None:
    """Write ``total``, the scaled sum over all ranks, to ``request.shard``, or add it; measure the shard."""
    if total is not request.shard:
        sum_sources_(request.shard, [total], scale=1, accumulate=request.accumulate, stats=request.stats)
    elif request.stats is not None:
        request.stats.measure(request.shard)
