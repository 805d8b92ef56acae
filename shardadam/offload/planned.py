# SPDX-License-Identifier: Apache-2.0
"""The bytes of state that is offloaded, before anything is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from shardadam.layout import Bucket
from shardadam.offload.regions import buffer_bytes, regions_of
from shardadam.precision import Format

_STATE = ("moments", "master", "average")


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
        numel = sum(bucket.shard_numel for bucket in buckets)
        for bucket in buckets:
            start = bucket.offset // bucket.world_size
            regions = regions_of(format, numel, slice(start, start + bucket.shard_numel))
            largest = max(largest, buffer_bytes(regions))
    moved = Counter(total)
    moved[f"on_{kind}"] = sum(moved.pop(name, 0) for name in _STATE)
    moved["offload_buffers"] = 2 * largest
    return moved
