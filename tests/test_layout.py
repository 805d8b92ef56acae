# SPDX-License-Identifier: Apache-2.0
"""The layout puts every element into exactly one shard, aligned and equal, for any model and any number of ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardadam.layout import ALIGNMENT_NUMEL, Bucket, Layout, ParameterSpec, build_layout
from shardadam.update.runs import Run, equal_runs

ITEMSIZES = {"bf16": 2, "fp32": 4, "fp64": 8}
MAX_WORLD_SIZE = 16_384
AWKWARD_NUMELS = (0, 1, 2, 105, 127, 128, 129, 255, 256, 257)


@dataclass(frozen=True)
class Case:
    parameters: tuple[ParameterSpec, ...]
    world_size: int
    bucket_bytes: int

    def build(self) -> Layout:
        return build_layout(self.parameters, world_size=self.world_size, bucket_bytes=self.bucket_bytes)

    def capacity(self, itemsize: int) -> int:
        """Return the elements that fit into ``bucket_bytes``, at least one block for each rank."""
        granularity = self.world_size * ALIGNMENT_NUMEL
        return max(granularity, self.bucket_bytes // itemsize // granularity * granularity)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    numels = st.one_of(st.sampled_from(AWKWARD_NUMELS), st.integers(0, 2_000), st.integers(0, 60_000))
    specs = st.builds(
        lambda numel, arena: ParameterSpec(numel, ITEMSIZES[arena], arena), numels, st.sampled_from(sorted(ITEMSIZES))
    )
    return Case(
        parameters=tuple(draw(st.lists(specs, min_size=1, max_size=20))),
        world_size=draw(st.one_of(st.integers(1, 8), st.integers(1, MAX_WORLD_SIZE), st.just(MAX_WORLD_SIZE))),
        bucket_bytes=draw(st.one_of(st.integers(1, 2**12), st.integers(1, 2**20), st.just(2**25))),
    )


def segments_of(layout: Layout) -> dict[int, list[tuple[Bucket, int, int, int]]]:
    """Return for each parameter the ``(bucket, start, numel, offset in the arena)`` of its segments, by bucket."""
    segments: dict[int, list[tuple[Bucket, int, int, int]]] = {}
    for bucket in layout.buckets:
        for segment in bucket.segments:
            entry = (bucket, segment.start, segment.numel, bucket.offset + segment.offset)
            segments.setdefault(segment.parameter, []).append(entry)
    return segments


def ranks_that_matter(bucket: Bucket) -> set[int]:
    """Return all ranks where they are few, else those in whose shards a segment begins or ends, and adjacent ones."""
    if bucket.world_size * len(bucket.segments) <= 2_000:
        return set(range(bucket.world_size))
    ranks = {0, bucket.world_size - 1}
    for segment in bucket.segments:
        for end in (segment.offset, segment.offset + max(segment.numel, 1) - 1):
            owner = end // bucket.shard_numel
            ranks |= {owner - 1, owner, owner + 1}
    return {rank for rank in ranks if 0 <= rank < bucket.world_size}


@given(cases())
def test_every_element_lies_in_exactly_one_shard(case: Case) -> None:
    for bucket in case.build().buckets:
        visited = ranks_that_matter(bucket)
        covered = {(segment.parameter, segment.start): 0 for segment in bucket.segments}
        for rank in visited:
            end = 0
            for segment in bucket.shard_segments(rank):
                assert segment.numel > 0
                assert segment.offset >= end, "segments of a shard overlap or are out of order"
                end = segment.offset + segment.numel
                position = rank * bucket.shard_numel + segment.offset
                owners = [
                    whole
                    for whole in bucket.segments
                    if whole.parameter == segment.parameter
                    and whole.offset <= position
                    and position + segment.numel <= whole.offset + whole.numel
                ]
                assert len(owners) == 1, f"{segment} of rank {rank} lies in {len(owners)} segments of the bucket"
                assert segment.start - owners[0].start == position - owners[0].offset
                covered[owners[0].parameter, owners[0].start] += segment.numel
            assert end <= bucket.shard_numel
        for segment in bucket.segments:
            # Shards that were skipped lie wholly inside the segment.
            first = -(-segment.offset // bucket.shard_numel)
            last = (segment.offset + segment.numel) // bucket.shard_numel
            between = sum(rank not in visited for rank in range(first, last))
            assert covered[segment.parameter, segment.start] + between * bucket.shard_numel == segment.numel


@given(cases())
def test_segments_cover_each_parameter_once_and_in_order_and_are_contiguous_in_the_arena(case: Case) -> None:
    layout = case.build()
    segments = segments_of(layout)
    assert sorted(segments) == list(range(len(case.parameters)))
    for arena in layout.arenas:
        for parameter, offset in zip(arena.parameters, arena.offsets, strict=True):
            start = 0
            for _, segment_start, numel, position in segments[parameter]:
                assert segment_start == start
                assert position == offset + start
                start += numel
            assert start == case.parameters[parameter].numel


@given(cases())
def test_parameters_buckets_and_shards_are_aligned_and_shards_are_equal(case: Case) -> None:
    layout = case.build()
    assert layout.world_size == case.world_size
    for arena in layout.arenas:
        assert all(offset % ALIGNMENT_NUMEL == 0 for offset in arena.offsets)
    for bucket in layout.buckets:
        assert all(segment.offset % ALIGNMENT_NUMEL == 0 for segment in bucket.segments)
        assert bucket.numel > 0
        assert bucket.world_size == case.world_size
        assert bucket.shard_numel * bucket.world_size == bucket.numel
        assert bucket.shard_numel % ALIGNMENT_NUMEL == 0


@given(cases())
def test_segments_do_not_overlap_and_gaps_are_their_exact_complement(case: Case) -> None:
    for bucket in case.build().buckets:
        stretches = [
            (segment.offset, segment.offset + segment.numel) for segment in bucket.segments if segment.numel > 0
        ]
        gaps = list(bucket.gaps)
        assert all(start < stop for start, stop in gaps)
        joined = sorted(stretches + gaps)
        assert [joined[0][0], joined[-1][1]] == [0, bucket.numel]
        assert all(stop == start for (_, stop), (start, _) in pairwise(joined))


@given(cases())
def test_buckets_are_contiguous_and_fill_their_arenas(case: Case) -> None:
    layout = case.build()
    for index, arena in enumerate(layout.arenas):
        end = 0
        for bucket in layout.buckets:
            if bucket.arena == index:
                assert bucket.offset == end
                end += bucket.numel
        assert end == arena.numel


@given(cases())
def test_only_parameters_larger_than_a_bucket_are_split_and_no_bucket_exceeds_its_capacity(case: Case) -> None:
    layout = case.build()
    for parameter, segments in segments_of(layout).items():
        spec = case.parameters[parameter]
        assert len(segments) == max(1, -(-spec.numel // case.capacity(spec.itemsize)))
    for bucket in layout.buckets:
        assert bucket.numel <= case.capacity(layout.arenas[bucket.arena].itemsize)


@given(cases())
def test_a_bucket_is_closed_only_where_the_next_parameter_does_not_fit(case: Case) -> None:
    layout = case.build()
    for bucket, following in pairwise(layout.buckets):
        if bucket.arena != following.arena:
            continue
        following_numel = case.parameters[following.segments[0].parameter].numel
        used = max(
            segment.offset + -(-segment.numel // ALIGNMENT_NUMEL) * ALIGNMENT_NUMEL for segment in bucket.segments
        )
        assert used + following_numel > case.capacity(layout.arenas[bucket.arena].itemsize)


def test_a_parameter_that_fills_the_rest_of_a_bucket_exactly_goes_into_it() -> None:
    specs = [ParameterSpec(256, 4, ""), ParameterSpec(257, 4, ""), ParameterSpec(640, 4, "")]
    buckets = build_layout(specs, world_size=2, bucket_bytes=1024 * 4).buckets
    assert [[segment.parameter for segment in bucket.segments] for bucket in buckets] == [[2, 1], [0]]
    specs[0] = ParameterSpec(384, 4, "")
    specs[1] = ParameterSpec(0, 4, "")
    assert [len(bucket.segments) for bucket in build_layout(specs, world_size=2, bucket_bytes=1024 * 4).buckets] == [3]


@given(cases())
def test_padding_is_less_than_a_block_per_parameter_and_per_rank_of_each_bucket(case: Case) -> None:
    for bucket in case.build().buckets:
        filled = [segment.numel for segment in bucket.segments if segment.numel > 0]
        blocks = sum(-(-numel // ALIGNMENT_NUMEL) for numel in filled)
        padding = bucket.numel - sum(filled)
        if filled:
            assert padding < case.world_size * ALIGNMENT_NUMEL + len(filled) * ALIGNMENT_NUMEL
            assert 0 <= bucket.numel - blocks * ALIGNMENT_NUMEL < case.world_size * ALIGNMENT_NUMEL
        else:
            assert bucket.numel == case.world_size * ALIGNMENT_NUMEL  # only empty parameters: one block per rank


@given(cases())
def test_parameters_are_taken_in_reverse_order(case: Case) -> None:
    layout = case.build()
    for index, arena in enumerate(layout.arenas):
        members = [i for i, spec in enumerate(case.parameters) if spec.arena == arena.key]
        assert list(arena.parameters) == members[::-1]
        assert list(arena.offsets) == sorted(arena.offsets)
        order = [segment.parameter for bucket in layout.buckets if bucket.arena == index for segment in bucket.segments]
        assert list(dict.fromkeys(order)) == members[::-1]


@given(cases())
def test_parameters_of_different_arenas_never_share_a_bucket(case: Case) -> None:
    layout = case.build()
    assert len({arena.key for arena in layout.arenas}) == len(layout.arenas)
    for bucket in layout.buckets:
        arena = layout.arenas[bucket.arena]
        for segment in bucket.segments:
            spec = case.parameters[segment.parameter]
            assert (spec.arena, spec.itemsize) == (arena.key, arena.itemsize)


@given(cases(), cases())
def test_the_layout_depends_only_on_its_arguments(case: Case, other: Case) -> None:
    before = case.build()
    other.build()
    assert case.build() == before


@given(cases())
def test_an_empty_parameter_has_one_segment_in_a_bucket_and_none_in_shards(case: Case) -> None:
    layout = case.build()
    segments = segments_of(layout)
    empty = {index for index, spec in enumerate(case.parameters) if spec.numel == 0}
    for index in empty:
        assert [(start, numel) for _, start, numel, _ in segments[index]] == [(0, 0)]
    for bucket in layout.buckets:
        for rank in ranks_that_matter(bucket):
            assert empty.isdisjoint(segment.parameter for segment in bucket.shard_segments(rank))


def test_no_parameters_give_no_bucket() -> None:
    assert build_layout([], world_size=4, bucket_bytes=1024) == Layout(4, (), ())


@given(cases(), st.data())
def test_equal_runs_cover_exactly_the_labelled_segments(case: Case, data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.sampled_from([None, 0, 1]), min_size=20, max_size=20))
    for bucket in case.build().buckets[:4]:
        for rank in sorted(ranks_that_matter(bucket))[:20]:
            segments = list(bucket.shard_segments(rank))
            runs = equal_runs(bucket, rank, labels)
            assert all(run.start % ALIGNMENT_NUMEL == run.stop % ALIGNMENT_NUMEL == 0 for run in runs)
            assert all(0 <= run.start < run.stop <= bucket.shard_numel for run in runs)
            for run, following in pairwise(runs):
                assert run.stop <= following.start
                if run.stop == following.start:
                    assert labels[run.parameter] != labels[following.parameter], "two adjacent runs have one label"
            for segment in segments:
                stop = segment.offset + segment.numel
                inside = [run for run in runs if run.start <= segment.offset and stop <= run.stop]
                touching = [run for run in runs if run.start < stop and segment.offset < run.stop]
                assert inside == touching
                expected = [] if labels[segment.parameter] is None else [labels[segment.parameter]]
                assert [labels[run.parameter] for run in inside] == expected
            first_at = {segment.offset: segment.parameter for segment in segments}
            assert all(first_at[run.start] == run.parameter for run in runs)


@given(cases())
def test_equal_labels_give_one_run_over_the_whole_shard(case: Case) -> None:
    labels = [7] * len(case.parameters)
    for bucket in case.build().buckets[:4]:
        for rank in sorted(ranks_that_matter(bucket))[:20]:
            segments = list(bucket.shard_segments(rank))
            expected = [Run(0, bucket.shard_numel, segments[0].parameter)] if segments else []
            assert equal_runs(bucket, rank, labels) == expected


def test_equal_runs_on_a_bucket_worked_out_by_hand() -> None:
    # Reverse order: parameter 2 at 0, 1 at 256, 0 at 384; two shards of 256.
    specs = [ParameterSpec(100, 4, ""), ParameterSpec(128, 4, ""), ParameterSpec(130, 4, "")]
    (bucket,) = build_layout(specs, world_size=2, bucket_bytes=2**20).buckets
    assert (bucket.numel, bucket.gaps) == (512, ((130, 256), (484, 512)))
    assert equal_runs(bucket, 0, ["a", "a", "a"]) == [Run(0, 256, 2)]
    assert equal_runs(bucket, 1, ["a", "b", "a"]) == [Run(0, 128, 1), Run(128, 256, 0)]
    assert equal_runs(bucket, 1, [None, "a", "a"]) == [Run(0, 128, 1)]
    assert equal_runs(bucket, 1, ["a", None, "a"]) == [Run(128, 256, 0)]
    assert equal_runs(bucket, 0, ["a", "a", None]) == []


def lay_out(count: int, numel: int) -> Layout:
    specs = [ParameterSpec(numel + index % 7, 4, index % 3) for index in range(count)]
    return build_layout(specs, world_size=MAX_WORLD_SIZE, bucket_bytes=32 * 2**20)


def lines_run(function: Callable[[], object]) -> int:
    """Return the number of lines that ``function`` runs, which unlike its time is the same everywhere."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("numel", [0, 3, 4_096, 300_000])
def test_work_grows_linearly_with_the_number_of_parameters(numel: int) -> None:
    assert lines_run(lambda: lay_out(4_000, numel)) < 2.1 * lines_run(lambda: lay_out(2_000, numel))
    assert sum(len(arena.parameters) for arena in lay_out(100_000, numel).arenas) == 100_000


@pytest.mark.parametrize("world_size", [0, -1])
def test_refuses_a_world_without_ranks(world_size: int) -> None:
    with pytest.raises(ValueError, match=f"world_size: found {world_size}, expected 1 or more"):
        build_layout([ParameterSpec(1, 4, "")], world_size=world_size, bucket_bytes=1024)


@pytest.mark.parametrize("bucket_bytes", [0, -4])
def test_refuses_buckets_without_bytes(bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"bucket_bytes: found {bucket_bytes}, expected 1 or more"):
        build_layout([ParameterSpec(1, 4, "")], world_size=2, bucket_bytes=bucket_bytes)
