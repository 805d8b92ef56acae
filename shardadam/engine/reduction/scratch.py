# SPDX-License-Identifier: Apache-2.0
"""Memory for shards of reduced gradients that are used at once (``update="backward"``), and used again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam.engine.reduction.base import shard_dtype
from shardadam.engine.storage import FlatBucket
from shardadam.transport import Transport

Key = tuple[Transport, torch.dtype, torch.device]


class ShardScratch:
    """Buffers, each as large as the largest shard of its transport, dtype and device. ``SIZE`` of each are allocated
    with the buckets, one for each staging buffer; others where more transfers are in flight, or shards are kept.
    """

    SIZE = 2

    def __init__(self) -> None:
        self._numel: dict[Key, int] = {}  # of each buffer
        self._users: Counter[Key] = Counter()  # the number of buckets
        self._free: dict[Key, list[Tensor]] = {}
        self._taken: dict[int, tuple[Key, Tensor]] = {}  # by bucket index

    def reserve(self, buckets: Sequence[FlatBucket]) -> None:
        """Allocate buffers for new buckets, and make all large enough for them. None may be taken."""
        for bucket in buckets:
            key = _key(bucket)
            self._users[key] += 1
            if bucket.plan.shard_numel > self._numel.get(key, 0):
                self._numel[key] = bucket.plan.shard_numel
                self._free[key] = []
        for key in self._numel:
            while len(self._free[key]) < min(self.SIZE, self._users[key]):
                self._free[key].append(self._new(key))

    def take(self, bucket: FlatBucket) -> Tensor:
        """Return memory for the bucket's shard, uninitialised."""
        key = _key(bucket)
        buffer = self._free[key].pop() if self._free[key] else self._new(key)
        self._taken[bucket.index] = key, buffer
        return buffer[: bucket.plan.shard_numel]

    def give_back(self, bucket: FlatBucket) -> None:
        """Make the memory of the bucket's shard available again."""
        key, buffer = self._taken.pop(bucket.index)
        self._free[key].append(buffer)

    def reset(self) -> None:
        """Make all memory available again, and free what is more than ``reserve`` has allocated."""
        for key, buffer in self._taken.values():
            if buffer.numel() == self._numel[key]:
                self._free[key].append(buffer)
        self._taken.clear()
        for key, free in self._free.items():
            del free[min(self.SIZE, self._users[key]) :]

    def nbytes(self) -> int:
        taken = sum(buffer.nbytes for _, buffer in self._taken.values())
        return taken + sum(buffer.nbytes for free in self._free.values() for buffer in free)

    def _new(self, key: Key) -> Tensor:
        _, dtype, device = key
        return torch.empty(self._numel[key], dtype=dtype, device=device)


def _key(bucket: FlatBucket) -> Key:
    return bucket.arena.transport, shard_dtype(bucket), bucket.parameters.device
