# SPDX-License-Identifier: Apache-2.0
"""Parameters -> buckets -> shards -> segments, in integers.

The layout is a pure function of shapes, param groups, world size and bucket size; this module imports neither torch nor
the project. Every rank computes the same layout, and ``planner.py`` computes it before a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

ALIGNMENT_NUMEL = 128
"""Every parameter starts at a multiple of this, and every shard's length is a multiple of it. So a block of 128
elements belongs to one parameter and one rank, and every slice is 16-byte aligned in every dtype.
"""

ITEM_BYTES = 4 * 2**20
"""Checkpoints cut every tensor at multiples of this: the unit that a rank reads and verifies."""


class ParameterSpec(NamedTuple):
    """What the layout needs to know about one parameter.

    Args:
        numel: number of elements, 0 allowed.
        itemsize: bytes of one element.
        arena: anything hashable; parameters with equal values share flat storage. The optimizer passes
            ``(param group, dtype, device)``.
    """

    numel: int
    itemsize: int
    arena: object


class Span(NamedTuple):
    """``tensor[start : start + numel]``, counted in memory order."""

    start: int
    numel: int

    @property
    def stop(self) -> int:
        return self.start + self.numel


class Segment(NamedTuple):
    """The part of one parameter in one bucket or shard: ``parameter[start : start + numel]``, in memory order, is at
    ``bucket[offset : offset + numel]`` or ``shard[offset : offset + numel]``.
    """

    parameter: int
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Bucket:
    """The unit of communication and of update: ``numel`` elements at ``offset`` of an arena, in ``world_size`` equal
    shards. ``segments`` are the parts of parameters in it, by ascending offset; that of an empty parameter is empty.
    """

    arena: int
    offset: int
    numel: int
    world_size: int
    segments: tuple[Segment, ...]

    @property
    def shard_numel(self) -> int:
        return self.numel // self.world_size

    def shard_segments(self, rank: int) -> Iterator[Segment]:
        """Yield the parts of parameters in ``rank``'s shard, by ascending offset; none for empty parameters."""
        low, high = rank * self.shard_numel, (rank + 1) * self.shard_numel
        for segment in self.segments:
            first, last = max(low, segment.offset), min(high, segment.offset + segment.numel)
            if first < last:
                yield Segment(segment.parameter, segment.start + first - segment.offset, last - first, first - low)

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """``(start, stop)`` of every run of padding in the bucket."""
        gaps, end = [], 0
        for segment in self.segments:
            if segment.offset > end:
                gaps.append((end, segment.offset))
            end = segment.offset + segment.numel
        if self.numel > end:
            gaps.append((end, self.numel))
        return tuple(gaps)


def as_one(buckets: Sequence[Bucket]) -> Bucket:
    """Return the successive buckets of an arena of one rank as one bucket."""
    first, last = buckets[0], buckets[-1]
    segments = tuple(
        segment._replace(offset=bucket.offset - first.offset + segment.offset)
        for bucket in buckets
        for segment in bucket.segments
    )
    return replace(first, numel=last.offset + last.numel - first.offset, segments=segments)


@dataclass(frozen=True, slots=True)
class Arena:
    """Flat storage for all parameters of one (param group, dtype, device). Its buckets lie one after the other, so a
    parameter in several buckets is contiguous. ``offsets[i]`` is the offset of ``parameters[i]``.
    """

    key: object
    itemsize: int
    numel: int
    parameters: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    world_size: int
    arenas: tuple[Arena, ...]
    buckets: tuple[Bucket, ...]


def build_layout(parameters: Sequence[ParameterSpec], *, world_size: int, bucket_bytes: int) -> Layout:
    """Assign ``parameters`` to buckets of about ``bucket_bytes``, each cut into ``world_size`` equal shards.

    Buckets take the parameters of an arena in reverse order, which is about the order in which backward completes them.
    If the next parameter does not fit, a new bucket begins; a parameter larger than a bucket is split. Each bucket is
    padded to a multiple of ``world_size * ALIGNMENT_NUMEL`` elements.

    Raises:
        ValueError: ``world_size`` or ``bucket_bytes`` is less than 1.
    """
    if world_size < 1:
        raise ValueError(f"world_size: found {world_size}, expected 1 or more")
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes: found {bucket_bytes}, expected 1 or more")
    members: dict[object, list[int]] = {}
    for index in range(len(parameters) - 1, -1, -1):
        members.setdefault(parameters[index].arena, []).append(index)

    arenas: list[Arena] = []
    buckets: list[Bucket] = []
    for key, indices in members.items():
        itemsize = parameters[indices[0]].itemsize
        builder = _ArenaBuilder(len(arenas), world_size, max(1, bucket_bytes // itemsize))
        offsets = [builder.add(index, parameters[index].numel) for index in indices]
        builder.close()
        arenas.append(Arena(key, itemsize, builder.end, tuple(indices), tuple(offsets)))
        buckets.extend(builder.buckets)
    return Layout(world_size, tuple(arenas), tuple(buckets))


def renumbered(layout: Layout, indices: Sequence[int]) -> Layout:
    """Return a layout of some of the parameters with their indices among all."""
    arenas = [replace(arena, parameters=tuple(indices[i] for i in arena.parameters)) for arena in layout.arenas]
    buckets = [
        replace(bucket, segments=tuple(one._replace(parameter=indices[one.parameter]) for one in bucket.segments))
        for bucket in layout.buckets
    ]
    return Layout(layout.world_size, tuple(arenas), tuple(buckets))


def joined(layouts: Sequence[Layout]) -> Layout:
    """Return the arenas and buckets of all layouts. ``world_size`` is that of the first; each bucket has its own."""
    arenas: list[Arena] = []
    buckets: list[Bucket] = []
    for layout in layouts:
        buckets += [replace(bucket, arena=len(arenas) + bucket.arena) for bucket in layout.buckets]
        arenas += layout.arenas
    return Layout(layouts[0].world_size, tuple(arenas), tuple(buckets))


class _ArenaBuilder:
    """Fills the buckets of one arena, one after the other."""

    def __init__(self, arena: int, world_size: int, bucket_numel: int) -> None:
        self.arena = arena
        self.world_size = world_size
        self.granularity = world_size * ALIGNMENT_NUMEL
        self.capacity = max(1, bucket_numel // self.granularity) * self.granularity
        self.buckets: list[Bucket] = []
        self.end = 0  # where the open bucket begins in the arena
        self.segments: list[Segment] = []
        self.used = 0  # elements taken in the open bucket

    def add(self, parameter: int, numel: int) -> int:
        """Place a parameter; return its offset in the arena."""
        if self.segments and self.used + numel > self.capacity:
            self.close()
        offset = self.end + self.used
        start = 0
        while numel - start > self.capacity:  # starts at the beginning of a bucket
            self.segments.append(Segment(parameter, start, self.capacity, 0))
            self.used = self.capacity
            self.close()
            start += self.capacity
        self.segments.append(Segment(parameter, start, numel - start, self.used))
        self.used += _round_up(numel - start, ALIGNMENT_NUMEL)
        return offset

    def close(self) -> None:
        if not self.segments:
            return
        numel = _round_up(max(1, self.used), self.granularity)
        self.buckets.append(Bucket(self.arena, self.end, numel, self.world_size, tuple(self.segments)))
        self.end += numel
        self.segments, self.used = [], 0


def cut(start: int, stop: int, every: int) -> Iterator[tuple[int, int]]:
    """Cut ``start : stop`` at the multiples of ``every``."""
    while start < stop:
        end = min(stop, (start // every + 1) * every)
        yield start, end
        start = end


def _round_up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple
