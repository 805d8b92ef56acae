# SPDX-License-Identifier: Apache-2.0
"""Joins buckets that lie beside each other, so that one call updates them. Views only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from shardadam import layout
from shardadam.engine.storage import FlatBucket, blocks_of, shard_of
from shardadam.layout import Bucket
from shardadam.update import Shard

_MERGED_NUMEL = 1 << 26
"""Most elements of a shard that one launch updates, so that the first all-gathers need not wait long."""


def adjoining(buckets: Iterable[FlatBucket]) -> Iterator[list[FlatBucket]]:
    """Group successive buckets whose shards adjoin in one arena, if its update takes several at once.

    Every update does on one rank, where the parameters of the shards adjoin, too. Buckets whose state is offloaded stay
    alone.
    """
    group: list[FlatBucket] = []
    start = stop = 0  # of the group, in its arena
    for bucket in buckets:
        first, last = bucket.plan.offset, bucket.plan.offset + bucket.plan.numel
        if group and _fit(group[0], bucket, max(stop, last) - min(start, first)) and (last == start or first == stop):
            start, stop = min(start, first), max(stop, last)
        else:
            if group:
                yield group
            group, start, stop = [], first, last
        group.append(bucket)
    if group:
        yield group


def _fit(one: FlatBucket, other: FlatBucket, numel: int) -> bool:
    """Return whether one update may take both, which are in ``numel`` elements, and what is between them."""
    arena, world_size = one.arena, one.plan.world_size
    takes_several = arena.update.takes_several or world_size == 1
    may_join = arena is other.arena and takes_several and one.stored is None
    return may_join and numel // world_size <= _MERGED_NUMEL


def merged(buckets: Sequence[FlatBucket]) -> tuple[Shard, Bucket]:
    """Return the shards of ``adjoining`` buckets as one shard, and the bucket that it is a slice of.

    On several ranks, the shard has ``positions``, and no bucket is whole: then it is the first.
    """
    if len(buckets) == 1:
        return buckets[0].shard, buckets[0].plan
    buckets = sorted(buckets, key=lambda bucket: bucket.plan.offset)
    first, last = buckets[0], buckets[-1]
    arena = first.arena
    elements = slice(first.shard_slice.start, last.shard_slice.stop)
    if first.plan.world_size > 1:
        assert arena.positions is not None
        shard = shard_of(arena, elements, arena.parameters, first.shard.first_block)
        return replace(shard, positions=arena.positions[blocks_of(elements)]), first.plan
    key = first.plan.offset, len(buckets)
    if key not in arena.joined:
        arena.joined[key] = layout.as_one([bucket.plan for bucket in buckets])
    plan = arena.joined[key]
    parameter = arena.parameters[plan.offset : plan.offset + plan.numel]
    return shard_of(arena, elements, parameter, first.shard.first_block), plan
