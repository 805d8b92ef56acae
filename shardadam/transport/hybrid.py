# SPDX-License-Identifier: Apache-2.0
"""Hybrid sharding: state is split inside a shard group, and each shard has replicas in the other shard groups.

A bucket is reduce-scattered inside the shard group, then the shards are summed over their replicas, in the shard's
float32 whatever travels before. The last sum of anything is one over replicas, which gives all of them the same bits.

Note: the order of sums over replicas
    A sum over replicas can start when the reduce-scatter before it is over, and ranks see that at different times. All
    of them start these sums in the order of the reduce-scatters, and before anything else that travels among replicas;
    so they meet in one order everywhere. Whoever looks (``done``) starts what can be started without waiting.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.chunks import chunks
from shardadam.ranks.store_barrier import StoreBarrier
from shardadam.transport.base import Pending, ReduceScatter, Staging, Transport
from shardadam.transport.streams import CommunicationStreams, OnStream

_GLANCE_S = 0.0005


class HybridTransport(Transport):
    """
    Args:
        shard: over the ranks that split one copy of the state; it allocates.
        replica: over the ranks that hold the same shard, one in each shard group.
        control, store_barrier: over all of them.
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
        self._shard = shard
        self._replica = replica
        self._scattering: deque[_ShardSum] = deque()  # whose sums over replicas have not been started
        self._streams = CommunicationStreams()

    # Buffers: the shard group's

    def parameters(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._shard.parameters(numel, dtype, device)

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        return self._shard.staging(numel, dtype, device)

    def discard(self, staging: Staging) -> None:
        self._shard.discard(staging)

    def gradients(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """None: what can be read inside the shard group is not the whole sum."""
        return None

    # Transfers

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        total = torch.empty_like(request.shard) if request.accumulate else request.shard
        scattering = self._shard.reduce_scatter(replace(request, shard=total, accumulate=False, on_chunk=None))
        finish = partial(_finish, request, total)
        if not scattering.on_host:
            with self._streams.on(total.device) as stream:
                scattering.wait()
                self._replica.all_reduce(total).wait()
                finish()
            return OnStream(stream, kept=total)
        transfer = _ShardSum(self, scattering, partial(self._replica.all_reduce, total), finish)
        self._scattering.append(transfer)
        self.start_what_can_be()
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

    def poll(self, seconds: float) -> bool:
        # By turns, and who asks starts what can be in between: the news may be that of the other group.
        return self._shard.poll(min(seconds, _GLANCE_S)) or self._replica.poll(seconds)

    def abort(self) -> None:
        self._shard.abort()
        self._replica.abort()

    def close(self, *, clean: bool) -> None:
        self._shard.close(clean=clean)
        self._replica.close(clean=clean)

    # Sums over replicas, in order

    def start_what_can_be(self) -> None:
        """Starts those that wait for nobody."""
        while self._scattering and self._scattering[0].is_scattered():
            self._scattering.popleft().start()

    def start_until(self, last: _ShardSum) -> None:
        """Starts all up to ``last``, waiting for what is before them, and then what can be."""
        while not last.is_started:
            self._scattering.popleft().start()
        self.start_what_can_be()

    def _start_all(self) -> None:
        if self._scattering:
            self.start_until(self._scattering[-1])


class _ShardSum(Pending):
    """A reduce-scatter inside the shard group, then a sum over replicas, both with the host's help.

    Args:
        start_sum: starts the latter.
        finish: what is left to do with it.
    """

    def __init__(
        self,
        transport: HybridTransport,
        scattering: Pending,
        start_sum: Callable[[], Pending],
        finish: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._scattering = scattering
        self._start_sum = start_sum
        self._finish = finish
        self._summing: Pending | None = None

    @property
    def is_started(self) -> bool:
        """Whether the sum over replicas is."""
        return self._summing is not None

    def is_scattered(self) -> bool:
        return self._scattering.done()

    def start(self) -> None:
        """Waits for the reduce-scatter, and starts the sum."""
        self._scattering.wait()
        self._summing = self._start_sum()

    def done(self) -> bool:
        self._transport.start_what_can_be()
        return self._summing is not None and self._summing.done()

    def wait(self) -> None:
        self._transport.start_until(self)
        assert self._summing is not None
        self._summing.wait()
        self._finish()

    def is_released(self) -> bool:
        return self._scattering.is_released()

    def await_release(self) -> None:
        self._scattering.await_release()


def _finish(request: ReduceScatter, total: Tensor) -> None:
    """Adds ``total``, the scaled sum over all ranks, to ``shard``, unless it is ``shard``; then calls ``on_chunk``."""
    if not request.accumulate and request.on_chunk is None:
        return
    for chunk in chunks(0, total.numel(), total.device):
        part = request.shard[chunk]
        if request.accumulate:
            part.add_(total[chunk])
        if request.on_chunk is not None:
            request.on_chunk(part)
