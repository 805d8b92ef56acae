# SPDX-License-Identifier: Apache-2.0
"""The bytes of state that is offloaded, before anything is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from shardadam.layout import ALIGNMENT_NUMEL, Bucket
from shardadam.offload.regions import BLOCK_BYTES, buffer_bytes, regions_of
from shardadam.precision import Format

_STATE = ("moments", "master", "average")
_PERIOD = BLOCK_BYTES * ALIGNMENT_NUMEL  # in elements: each tensor has whole blocks of them


def offload_planned(
    total: Counter[str], kind: str | None, arenas: Iterable[tuple[Format, Sequence[Bucket]]]
) -> Counter[str]:
    """Return the kinds of ``memory()``, in bytes, with the state where ``offload`` keeps it.

    Args:
        total: with all state on the device; by the names in ``state.memory.Memory``.
        kind: "disk", "host" or None.
        arenas: the format and the buckets of each.
    """
    if kind is None:
        return total
    largest = 0
    for format, buckets in arenas:
        for start, length in {(_start(bucket) % _PERIOD, bucket.shard_numel) for bucket in buckets}:
            largest = max(largest, _buffer_bytes(format, start, length))
    moved = Counter(total)
    moved[f"on_{kind}"] = sum(moved.pop(name, 0) for name in _STATE)
    moved["offload_buffers"] = 2 * largest
    return moved


def _start(bucket: Bucket) -> int:
    """Return where a bucket begins in the shards of its arena, in elements."""
    return bucket.offset // bucket.world_size


@lru_cache(maxsize=1 << 16)  # large models have thousands of buckets, and a comparison plans them in hundreds of ways
def _buffer_bytes(format: Format, start: int, length: int) -> int:
    """Return the size of a buffer for a bucket. ``start`` counts only by its place in a block of each tensor."""
    stop = start + length
    return buffer_bytes(regions_of(format, stop, slice(start, stop)))
