# SPDX-License-Identifier: Apache-2.0
"""The pool of buffers in which buckets of gradients travel."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shardadam.engine.profiling import record
from shardadam.engine.storage import FlatBucket
from shardadam.transport import Pending, Staging, Transport
from shardadam.transport.base import Finished


@dataclass(slots=True)
class InFlight:
    """A reduce-scatter in a staging buffer: under way, or the last one that was."""

    staging: Staging
    pending: Pending


class StagingPool:
    """Staging buffers, each as large as the largest bucket, used in turn.

    Note: growing instead of waiting
        Where a peer is slow, all buffers may be in flight when the next bucket is complete. Waiting for the peer
        inside a backward hook would be a deadlock: it may sit in a collective of the user's, waiting for us. So the
        pool grows: the gradient then lies in a buffer instead of in ``p.grad``. What has grown is given back in
        ``trim``. Before it grows it looks out for the peers for a moment, which cannot be a deadlock: they are mostly
        just behind.

    Note: a buffer on another stream
        Hooks run on the streams of their gradients. That which has waited for a transfer need not be that which fills
        the buffer next, so the latter waits, too. After ``trim`` it need not: whatever a next backward runs on comes
        after the step. (And it must not: events of before a CUDA graph's capture are none of its own.)
    """

    SIZE = 2
    PATIENCE_S = 0.25

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._numel: dict[tuple[torch.dtype, torch.device], int] = {}
        self._free: dict[tuple[torch.dtype, torch.device], list[InFlight]] = {}
        self._in_flight: deque[InFlight] = deque()
        self._is_patient = True
        self._unreleased: deque[InFlight] = deque()  # waited for here, but peers may still be reading them

    def reserve(self, bucket: FlatBucket) -> None:
        """Makes later buffers large enough for ``bucket``."""
        key = (bucket.wire_dtype, bucket.parameters.device)
        if bucket.numel > self._numel.get(key, 0):
            self._numel[key] = bucket.numel
            for free in self._free.get(key, []):
                self._transport.discard(free.staging)
            self._free[key] = []

    def acquire(self, bucket: FlatBucket, *, may_wait: bool) -> Staging:
        """A free buffer for ``bucket``. With ``may_wait`` the pool waits for the oldest transfer instead of growing."""
        key = (bucket.wire_dtype, bucket.parameters.device)
        free = self._free[key]
        self._take_back()
        while not free and self._in_flight and self._count() >= self.SIZE:
            if not (may_wait or self._in_flight[0].pending.done()):
                break
            self._wait_oldest()
            self._take_back()
        if not free and may_wait and self._unreleased and self._count() >= self.SIZE:
            self._unreleased[0].pending.await_release()
            self._take_back()
        if not free and self._count() >= self.SIZE and self._is_patient:
            end = time.monotonic() + self.PATIENCE_S
            while not free and (left := end - time.monotonic()) > 0 and self._transport.poll(left):
                self.progress()
                self._take_back()
            self._is_patient = bool(free)  # if not, not again until a peer has come
        if not free:
            return self._transport.staging(self._numel[key], *key)
        last = free.pop()
        last.pending.wait_on_this_stream()
        return last.staging

    def launched(self, staging: Staging, pending: Pending) -> None:
        self._in_flight.append(InFlight(staging, pending))

    def progress(self) -> None:
        """Completes what waits for the host alone; never waits for a peer."""
        while self._in_flight and self._in_flight[0].pending.on_host and self._in_flight[0].pending.done():
            self._wait_oldest()

    def wait_all(self) -> None:
        """Waits for all transfers, in order."""
        while self._in_flight:
            self._wait_oldest()

    def trim(self) -> None:
        """Gives back what the pool has grown by, as far as peers have done with it."""
        self._take_back()
        for free in self._free.values():
            for last in free[self.SIZE :]:
                self._transport.discard(last.staging)
            free[:] = [InFlight(last.staging, Finished()) for last in free[: self.SIZE]]

    @property
    def is_idle(self) -> bool:
        return not self._in_flight

    def buffers(self) -> Iterator[Staging]:
        for some in (*self._free.values(), self._in_flight, self._unreleased):
            yield from (in_flight.staging for in_flight in some)

    def _count(self) -> int:
        return len(self._in_flight) + len(self._unreleased)

    def _wait_oldest(self) -> None:
        # Always in order: the sums of two rounds are added into one shard, and must be added the same way every time.
        with record("reduce_scatter"):
            self._in_flight[0].pending.wait()
        self._is_patient = True
        self._unreleased.append(self._in_flight.popleft())

    def _take_back(self) -> None:
        while self._unreleased and self._unreleased[0].pending.is_released():
            last = self._unreleased.popleft()
            send = last.staging.send
            if send.numel() == self._numel[send.dtype, send.device]:
                self._free[send.dtype, send.device].append(last)
            else:
                self._transport.discard(last.staging)
