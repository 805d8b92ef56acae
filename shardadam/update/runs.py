# SPDX-License-Identifier: Apache-2.0
"""Which slices of a shard one fused kernel call may treat alike: parameters that have taken equal numbers of steps.

Known on the host without asking the device: whether a step was skipped is not, but a skipped step is skipped by all, so
parameters that took part in the same steps have the same count whatever became of those steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from shardadam.layout import Bucket, Run, equal_runs


class RunTable:
    """The runs of every bucket's shard of one arena on one rank; all its parameters start with no step taken."""

    def __init__(self, rank: int, count: int) -> None:
        self._rank = rank
        self._labels: list[int] = [0] * count  # of each parameter; equal labels: equal counts of steps
        self._whole: dict[int, list[Run]] = {}  # by a bucket's offset: its runs when all its parameters take part

    def load(self, counts: Iterable[Hashable]) -> None:
        """Sets the counts of all parameters."""
        self._relabel(list(counts))

    def advance(self, used: Sequence[bool]) -> None:
        """A step is taken in which only ``used`` parameters take part."""
        self._relabel(list(zip(self._labels, used, strict=True)))

    def runs(self, bucket: Bucket, used: Sequence[bool] | None) -> list[Run]:
        """The runs of one bucket; ``used`` None: all parameters take part."""
        if used is not None:
            labels = [label if takes_part else None for label, takes_part in zip(self._labels, used, strict=True)]
            return equal_runs(bucket, self._rank, labels)
        if bucket.offset not in self._whole:
            self._whole[bucket.offset] = equal_runs(bucket, self._rank, self._labels)
        return self._whole[bucket.offset]

    def _relabel(self, keys: Sequence[Hashable]) -> None:
        numbers: dict[Hashable, int] = {}
        self._labels = [numbers.setdefault(key, len(numbers)) for key in keys]
        self._whole.clear()
