# SPDX-License-Identifier: Apache-2.0
"""Samples of sweeps have every value that so many cases can have, and most pairs of values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tests.sampling import covering_sample


@dataclass(frozen=True)
class Case:
    first: str
    options: tuple[int, bool]


CASES = [
    {"case": Case(first, (number, flag)), "last": last}
    for first, number, flag, last in itertools.product("abcde", range(4), [False, True], [None, 1.5, "x"])
]
AXES = [lambda c: c["case"].first, lambda c: c["case"].options[0], lambda c: c["case"].options[1], lambda c: c["last"]]


def test_as_many_cases_as_the_longest_axis_has_values_have_every_value() -> None:
    for seed in "pqrst":
        sample = [CASES[index] for index in covering_sample(CASES, 5, seed=seed)]
        assert all({axis(case) for case in sample} == {axis(case) for case in CASES} for axis in AXES)


def test_few_more_cases_than_the_two_longest_axes_have_pairs_have_all_pairs() -> None:
    for seed in "pqrst":
        sample = [CASES[index] for index in covering_sample(CASES, 25, seed=seed)]
        for one, other in itertools.combinations(AXES, 2):
            assert {(one(c), other(c)) for c in sample} == {(one(c), other(c)) for c in CASES}


def test_samples_are_seeded_and_have_no_case_twice() -> None:
    for keep in (1, 7, 60, len(CASES), 1000):
        sample = covering_sample(CASES, keep, seed="p")
        assert len(sample) == len(set(sample)) == min(keep, len(CASES))
        assert sample == covering_sample(CASES, keep, seed="p")
    assert covering_sample(CASES, 7, seed="p") != covering_sample(CASES, 7, seed="q")
