# SPDX-License-Identifier: Apache-2.0
"""The staging buffers that buckets of gradients are sent from, and the reduce-scatters that use them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.engine.profiling import record
from shardadam.engine.storage import FlatBucket
from shardadam.sums.stats import GradStats
from shardadam.transport import Pending, ReduceScatter, Staging, Transport
from shardadam.transport.base import Finished, scale_for_mean_


@dataclass(slots=True)
class InFlight:
    """A staging buffer, the transport that allocated it, and the last transfer that used it, complete or not.

    Args:
        then: call it when the current stream has waited for the transfer.
    """

    staging: Staging
    transport: Transport
    pending: Pending
    then: Callable[[], None] | None = None


Key = tuple[Transport, torch.dtype, torch.device]


class StagingPool:
    """Staging buffers, each as large as the largest bucket of its transport, dtype and device, used in turn. Up to
    ``SIZE`` of each are allocated with the buckets: where that fails, no rank has sent anything yet.

    ``acquire`` a buffer, fill it, and ``reduce_scatter`` it. Only ``reduce_scatter`` is collective.

    Note: grow instead of waiting
        If a peer is slow, all buffers may be in flight when the next bucket is complete. A backward hook must not wait
        for the peer: the peer may be waiting for this rank in a collective of the user's. So the pool grows; the
        gradients are then in a new buffer instead of in ``p.grad``. ``trim`` frees the new buffers. Before the pool
        grows, it polls the peers for up to ``PATIENCE_S``, as most are only slightly behind; this cannot deadlock.

    Note: a buffer on another stream
        Hooks run on the streams of their gradients. ``acquire`` makes the stream that fills a buffer wait until the
        buffer's last transfer has read it. After ``trim`` that is not needed, as all streams of a later backward run
        after the step; and not allowed, as a CUDA graph capture cannot wait for an event from before it.
    """

    SIZE = 2
    PATIENCE_S = 0.25

    def __init__(self) -> None:
        self._numel: dict[Key, int] = {}  # of each buffer
        self._users: Counter[Key] = Counter()  # the number of buckets
        self._free: dict[Key, list[InFlight]] = {}
        self._in_flight: deque[InFlight] = deque()  # oldest first
        self._unreleased: deque[InFlight] = deque()  # waited for, but peers may still be reading the buffer
        self._on_streams: deque[InFlight] = deque()  # their buffers may be used again, but nobody awaited the sums
        self._may_poll = True

    def reserve(self, buckets: Sequence[FlatBucket]) -> None:
        """Allocate buffers for new buckets, and make all large enough for them. No transfer may be in flight."""
        self._reclaim()
        for bucket in buckets:
            key = _key(bucket)
            self._users[key] += 1
            if bucket.numel > self._numel.get(key, 0):
                self._numel[key] = bucket.numel
                for free in self._free.get(key, []):
                    _free(free)
                self._free[key] = []
        for key, numel in self._numel.items():
            while len(self._free[key]) < min(self.SIZE, self._users[key]):
                transport, dtype, device = key
                staging = transport.allocate_staging(numel, dtype, device)
                self._free[key].append(InFlight(staging, transport, Finished()))

    def acquire(self, bucket: FlatBucket, *, may_wait: bool) -> Staging:
        """Return a buffer for ``bucket``, in its wire dtype, that the current stream may write.

        Args:
            may_wait: once there are ``SIZE`` buffers, wait for the oldest transfer instead of allocating another.
        """
        self._complete_on_host()
        key = _key(bucket)
        free = self._free[key]
        self._reclaim()
        while not free and self._in_flight and self._is_full():
            if not (may_wait or self._in_flight[0].pending.done()):
                break
            self._wait_oldest()
            self._reclaim()
        if not free and may_wait and self._unreleased and self._is_full():
            self._unreleased[0].pending.await_release()
            self._reclaim()
        if not free and self._is_full() and self._may_poll:
            end = time.monotonic() + self.PATIENCE_S
            while not free and (left := end - time.monotonic()) > 0 and bucket.arena.transport.poll(left):
                self._complete_on_host()
                self._reclaim()
            self._may_poll = bool(free)  # after a poll without result, not again until a transfer is complete
        if not free:
            return bucket.arena.transport.allocate_staging(self._numel[key], bucket.wire_dtype, key[2])
        last = free.pop()
        last.pending.wait_for_buffer()
        return last.staging

    def release(self, bucket: FlatBucket, staging: Staging) -> None:
        """Return a buffer from ``acquire`` that has not been sent."""
        self._free[_key(bucket)].append(InFlight(staging, bucket.arena.transport, Finished()))

    def reduce_scatter(
        self,
        bucket: FlatBucket,
        staging: Staging,
        shard: Tensor,
        *,
        accumulate: bool,
        stats: GradStats,
        then: Callable[[], None] | None = None,
    ) -> None:
        """Start a reduce-scatter of ``staging`` to ``shard``. Collective.

        Args:
            staging: from ``acquire``, filled; must not be written afterwards.
            accumulate: add to what the shard holds.
            stats: measure the shard when it is complete, at the latest in ``wait_all``.
            then: call it when the shard is complete, after those of earlier transfers, at the latest in ``wait_all``.
        """
        transport, divisor = bucket.arena.transport, bucket.arena.shard_group.divisor
        scale = scale_for_mean_(staging.send[: bucket.numel], divisor) / bucket.arena.gradient_scale
        with record("reduce_scatter"):
            request = ReduceScatter(staging, bucket.numel, shard, scale=scale, accumulate=accumulate, stats=stats)
            pending = transport.reduce_scatter(request)
        self._in_flight.append(InFlight(staging, transport, pending, then))

    def wait_all(self) -> None:
        """Wait for all transfers. The gradient shards are complete afterwards."""
        while self._in_flight:
            self._wait_oldest()
        while self._on_streams:
            self._on_streams.popleft().pending.wait()

    def wait_for_device(self, device: torch.device) -> None:
        """Wait for all transfers on ``device``. Waits for others only if the host takes part in the former."""
        transfers = [one for one in (*self._on_streams, *self._in_flight) if one.staging.send.device == device]
        if any(one.pending.on_host for one in transfers):
            self.wait_all()
        else:
            for one in transfers:
                one.pending.wait()

    def trim(self) -> None:
        """Free all but ``SIZE`` unused buffers of each transport, dtype and device. Does not wait for peers."""
        self._reclaim()
        for free in self._free.values():
            for last in free[self.SIZE :]:
                _free(last)
            free[:] = [InFlight(last.staging, last.transport, Finished()) for last in free[: self.SIZE]]

    @property
    def is_idle(self) -> bool:
        """Whether every transfer that was started has been waited for."""
        return not self._in_flight and not self._on_streams

    def buffers(self) -> Iterator[Staging]:
        """Yield all buffers, in use or not."""
        for some in (*self._free.values(), self._in_flight, self._unreleased):
            yield from (in_flight.staging for in_flight in some)

    def nbytes(self) -> int:
        return sum(staging.nbytes for staging in self.buffers())

    def _is_full(self) -> bool:
        return len(self._in_flight) + len(self._unreleased) >= self.SIZE

    def _complete_on_host(self) -> None:
        """Complete the oldest transfers that only need work of this host. Does not wait for peers."""
        while self._in_flight and self._in_flight[0].pending.on_host and self._in_flight[0].pending.done():
            self._wait_oldest()

    def _wait_oldest(self) -> None:
        # In order, for reproducible sums: several rounds may add their means to one shard.
        pending, then = self._in_flight[0].pending, self._in_flight[0].then
        if pending.on_host:
            with record("reduce_scatter"):
                pending.wait()
        elif then is not None:
            pending.wait()
        else:  # a stream keeps the order; `acquire` waits for the buffer only
            self._on_streams.append(self._in_flight[0])
        self._may_poll = True
        self._unreleased.append(self._in_flight.popleft())
        if then is not None:
            self._unreleased[-1].then = None
            then()

    def _reclaim(self) -> None:
        """Make buffers available that no peer reads any more, oldest first."""
        while self._unreleased and self._unreleased[0].pending.is_released():
            last = self._unreleased.popleft()
            send = last.staging.send
            key = (last.transport, send.dtype, send.device)
            if send.numel() == self._numel[key]:
                self._free[key].append(last)
            else:  # too small since the last `reserve`
                _free(last)


def _key(bucket: FlatBucket) -> Key:
    return bucket.arena.transport, bucket.wire_dtype, bucket.parameters.device


def _free(last: InFlight) -> None:
    last.transport.free_staging(last.staging)
