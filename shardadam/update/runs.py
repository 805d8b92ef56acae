# SPDX-License-Identifier: Apache-2.0
"""Cuts a shard into runs: slices whose parameters have taken equally many steps, so that one fused call updates them.

Works on the host and never reads the device. The device alone knows whether a step was skipped, but all parameters skip
it together, so parameters that took part in the same steps have equal counts either way.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from shardadam.layout import Bucket


@dataclass(frozen=True, slots=True)
class Run:
    """``shard[start : stop]``, whose parameters all have the same label; ``parameter`` is the first of them."""

    start: int
    stop: int
    parameter: int


def equal_runs(bucket: Bucket, rank: int, labels: Sequence[int | None]) -> list[Run]:
    """Cut ``rank``'s shard where the label of its parameters changes; leave out parameters with the label None.

    A run includes the padding at its end. So its length is a multiple of ``ALIGNMENT_NUMEL``, and if all labels are
    equal, one run covers the whole shard.
    """
    runs: list[Run] = []
    segments = list(bucket.shard_segments(rank))
    for index, segment in enumerate(segments):
        label = labels[segment.parameter]
        if label is None:
            continue
        stop = segments[index + 1].offset if index + 1 < len(segments) else bucket.shard_numel
        if runs and runs[-1].stop == segment.offset and labels[runs[-1].parameter] == label:
            runs[-1] = Run(runs[-1].start, stop, runs[-1].parameter)
        else:
            runs.append(Run(segment.offset, stop, segment.parameter))
    return runs


class RunTable:
    """The runs of each bucket's shard, for one arena on one rank. At first no parameter has taken a step.

    Args:
        rank: whose shards are cut.
        count: number of parameters in the arena.
    """

    def __init__(self, rank: int, count: int) -> None:
        self._rank = rank
        self._labels: list[int] = [0] * count  # one for each parameter; equal labels mean equally many steps
        # By offset and length of a bucket: its runs when all of its parameters take part.
        self._cached: dict[tuple[int, int], list[Run]] = {}

    def load(self, counts: Iterable[Hashable]) -> None:
        """Replace the step counts of all parameters."""
        self._relabel(list(counts))

    def advance(self, used: Sequence[bool]) -> None:
        """Count a step in which only the ``used`` parameters take part."""
        self._relabel(list(zip(self._labels, used, strict=True)))

    def runs(self, bucket: Bucket, used: Sequence[bool] | None) -> list[Run]:
        """Return the runs of one bucket's shard. ``used`` None: all parameters take part."""
        if used is not None:
            labels = [label if takes_part else None for label, takes_part in zip(self._labels, used, strict=True)]
            return equal_runs(bucket, self._rank, labels)
        key = bucket.offset, bucket.numel
        if key not in self._cached:
            self._cached[key] = equal_runs(bucket, self._rank, self._labels)
        return self._cached[key]

    def _relabel(self, keys: Sequence[Hashable]) -> None:
        numbers: dict[Hashable, int] = {}
        self._labels = [numbers.setdefault(key, len(numbers)) for key in keys]
        self._cached.clear()
