# SPDX-License-Identifier: Apache-2.0
"""Boxes of a tensor: which elements two of them share, where these lie in the memory of each, whether they tile it.

Knows no files and no ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from torch import Tensor

from shardadam.layout import Span
from shardadam.state.flat_shard import Runs, boxes, in_shape, narrowed, split_by_runs

Ints = tuple[int, ...]

MAX_CUT_DIMENSIONS = 6
"""In how many dimensions boxes may cut a tensor. The check that they tile it looks at 2^6 corners of each."""


class Region(NamedTuple):
    """The elements ``whole[offset[0] : offset[0] + shape[0], ...]``."""

    offset: Ints
    shape: Ints

    def __str__(self) -> str:
        return f"[{', '.join(f'{at}:{at + size}' for at, size in zip(self.offset, self.shape, strict=True))}]"


@dataclass(frozen=True, slots=True)
class BoxSpec:
    """A part of a tensor that is dense in memory: a box, or several that a rank has side by side.

    Args:
        offset: of the first element.
        order: its dimensions, from the outermost to the innermost in memory.
        runs: for each dimension, offset and length of each run of the whole, in order; empty if it is one box. Fused
            projections are placed so (``_StridedShard``): a rank has some columns of each.
    """

    offset: Ints
    shape: Ints
    order: Ints
    runs: Runs = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def all_runs(self) -> Runs:
        return self.runs or tuple(((at, size),) for at, size in zip(self.offset, self.shape, strict=True))

    @property
    def parts(self) -> list[Region]:
        """All that it has: one region, if it is a box."""
        if not self.runs:
            return [Region(self.offset, self.shape)]
        return [Region(*zip(*runs, strict=True)) for runs in product(*self.runs)]

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """Yield what follows each other in ``start : stop`` of it, counted in memory order."""
        runs = self.all_runs
        for chunk in boxes(Span(start, stop - start), self.shape, self.order):
            split = split_by_runs(chunk.offsets, chunk.sizes, runs)
            regions = [(Region(tuple(place.offsets), tuple(place.sizes)), begins) for place, begins in split]
            yield Chunk(start, tuple(chunk.sizes), regions)
            start += chunk.sizes.numel()

    def regions(self, start: int, stop: int) -> list[Region]:
        """Return all regions of ``chunks``."""
        return [region for chunk in self.chunks(start, stop) for region, _ in chunk.regions]

    def position(self, element: Sequence[int]) -> int:
        """Return where an element, by its coordinates in the whole tensor, lies in memory order."""
        position = 0
        for dim in self.order:
            begin = index = 0
            for at, length in self.all_runs[dim]:
                if at <= element[dim] < at + length:
                    index = begin + element[dim] - at
                begin += length
            position = position * self.shape[dim] + index
        return position


class Chunk(NamedTuple):
    """Elements of a part from ``start`` on, in memory order, of this shape there: some regions of the whole, each with
    the place in the shape where it begins.
    """

    start: int
    shape: Ints
    regions: list[tuple[Region, Ints]]


def whole_box(shape: Ints, order: Ints) -> BoxSpec:
    return BoxSpec((0,) * len(shape), shape, order)


def common(one: Region, other: Region) -> Region | None:
    """Return the elements that are in both; None if there are none."""
    offset = tuple(map(max, one.offset, other.offset))
    ends = (min(a + m, b + n) for a, m, b, n in zip(one.offset, one.shape, other.offset, other.shape, strict=True))
    shape = tuple(end - start for start, end in zip(offset, ends, strict=True))
    return Region(offset, shape) if all(size > 0 for size in shape) else None


class Run:
    """Elements of a box from ``start`` on, in memory order: ``flat``, 1-D. ``parts``: views of it, one a region."""

    def __init__(self, box: BoxSpec, start: int, flat: Tensor) -> None:
        self.regions: list[Region] = []
        self.parts: list[Tensor] = []
        for chunk in box.chunks(start, start + flat.numel()):
            begin = chunk.start - start
            held = in_shape(flat[begin : begin + math.prod(chunk.shape)], chunk.shape, box.order)
            for region, begins in chunk.regions:
                self.regions.append(region)
                self.parts.append(narrowed(held, begins, region.shape))

    def copy_(self, other: Run) -> None:
        """Copy the elements that both have from ``other``."""
        for region, part in zip(self.regions, self.parts, strict=True):
            for other_region, other_part in zip(other.regions, other.parts, strict=True):
                shared = common(region, other_region)
                if shared is not None:
                    _cut_out(part, region, shared).copy_(_cut_out(other_part, other_region, shared))


def _cut_out(part: Tensor, region: Region, shared: Region) -> Tensor:
    begins = [at - start for at, start in zip(shared.offset, region.offset, strict=True)]
    return narrowed(part, begins, shared.shape)


def check_tiling(shape: Ints, found: Iterable[Region]) -> None:
    """Raise ValueError unless the regions make up the whole tensor, without gaps and overlaps.

    Regions tile the tensor if and only if their indicator functions add up to that of the tensor. Both are zero far
    outside, so they are equal if their mixed differences are: those of a region are 1 or -1 at each of its corners.
    """
    regions = list(found)
    for region in regions:
        fits = len(region.offset) == len(region.shape) == len(shape)
        if not fits or any(at < 0 or at + size > end for at, size, end in zip(*region, shape, strict=True)):
            raise ValueError(f"found a box {region}, expected one inside the shape {shape}")
    if math.prod(shape) == 0:
        if len(regions) != 1 or regions[0].shape != shape:
            raise ValueError(f"found {len(regions)} boxes, expected the whole of shape {shape}")
        return
    empty = next((region for region in regions if 0 in region.shape), None)
    if empty is not None:
        raise ValueError(f"found a box {empty} without elements")
    cut = [dim for dim, size in enumerate(shape) if any(region.shape[dim] != size for region in regions)]
    if len(cut) > MAX_CUT_DIMENSIONS:
        raise ValueError(f"found boxes cut in {len(cut)} dimensions, expected at most {MAX_CUT_DIMENSIONS}")
    corners: Counter[Ints] = Counter()
    for region, sign in [(Region((0,) * len(shape), shape), -1), *((region, 1) for region in regions)]:
        for ends in product((0, 1), repeat=len(cut)):
            corner = tuple(region.offset[d] + end * region.shape[d] for d, end in zip(cut, ends, strict=True))
            corners[corner] += sign if sum(ends) % 2 == 0 else -sign
    if any(corners.values()):
        overlap = _overlap(regions) if len(regions) <= 1000 else None
        if overlap is not None:
            raise ValueError(f"found the boxes {overlap[0]} and {overlap[1]}, expected none that overlap")
        numel = sum(math.prod(region.shape) for region in regions)
        raise ValueError(f"found {len(regions)} boxes of {numel} elements, expected all of shape {shape}, each once")


def _overlap(regions: Sequence[Region]) -> tuple[Region, Region] | None:
    for index, one in enumerate(regions):
        for other in regions[:index]:
            if common(one, other) is not None:
                return other, one
    return None
