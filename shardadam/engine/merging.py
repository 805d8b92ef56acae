# SPDX-License-Identifier: Apache-2.0
"""Joins buckets that lie beside each other, so that one launch updates them. Views only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from shardadam.engine.storage import FlatBucket, blocks_of, shard_of
from shardadam.update import Shard

_MERGED_NUMEL = 1 << 26
"""Most elements of a shard that one launch updates, so that the first all-gathers need not wait long."""


def adjoining(buckets: Iterable[FlatBucket]) -> Iterator[list[FlatBucket]]:
    """Group successive buckets whose shards adjoin in one arena, if its update takes several at once.

    Buckets whose state is offloaded stay alone.
    """
    group: list[FlatBucket] = []
    for bucket in buckets:
        if group and not _adjoins(group, bucket):
            yield group
            group = []
        group.append(bucket)
    if group:
        yield group


def _adjoins(group: list[FlatBucket], bucket: FlatBucket) -> bool:
    arena = bucket.arena
    if arena is not group[0].arena or not arena.update.takes_several or bucket.stored is not None:
        return False
    start = min(one.plan.offset for one in group)
    stop = max(one.plan.offset + one.numel for one in group)
    numel = (stop - start + bucket.numel) // bucket.plan.world_size
    return numel <= _MERGED_NUMEL and bucket.plan.offset in (start - bucket.numel, stop)


def merged(buckets: Sequence[FlatBucket]) -> Shard:
    """Return the shards of ``adjoining`` buckets as one shard, which has ``positions`` if its parameters have gaps."""
    if len(buckets) == 1:
        return buckets[0].shard
    first, last = (choose(buckets, key=lambda bucket: bucket.plan.offset) for choose in (min, max))
    arena = first.arena
    elements = slice(first.shard_slice.start, last.shard_slice.stop)
    if arena.positions is None:
        parameter = arena.parameters[first.plan.offset : last.plan.offset + last.numel]
        return shard_of(arena, elements, parameter, first.shard.first_block)
    shard = shard_of(arena, elements, arena.parameters, first.shard.first_block)
    return replace(shard, positions=arena.positions[blocks_of(elements)])
