# SPDX-License-Identifier: Apache-2.0
"""Seeded samples of the cases of a sweep that combine as many pairs of values as so many cases can."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def covering_sample(cases: Sequence[Mapping[str, Any]], keep: int, *, seed: str) -> list[int]:
    """Return the indices of ``keep`` of ``cases``, or all if there are fewer.

    Each case is the one, of all that are left, that adds most values of an axis to the sample, and among those the one
    that adds most pairs of values of two axes; ``seed`` decides between equals. When all pairs are there, it begins
    anew with those that are left.

    Args:
        cases: values by the names of their axes. Fields of dataclasses and entries of tuples and dicts are axes of
            their own.
    """
    order = list(range(len(cases)))
    random.Random(seed).shuffle(order)
    values = {index: _values_of(cases[index]) for index in order}
    pairs = {index: set(itertools.combinations(values[index], 2)) for index in order}
    chosen: list[int] = []
    while len(chosen) < min(keep, len(cases)):
        left = [index for index in order if index not in set(chosen)]
        chosen += _cover(left, values, pairs, min(keep, len(cases)) - len(chosen))
    return chosen


def _cover(order: list[int], values: dict[int, Any], pairs: dict[int, Any], keep: int) -> list[int]:
    """Return up to ``keep`` cases until no other one would add a pair; at least one."""
    seen_values: set[Any] = set()
    seen_pairs: set[Any] = set()

    def gain(index: int) -> tuple[int, int]:
        return -len(values[index].keys() - seen_values), -len(pairs[index] - seen_pairs)

    # What a case adds only falls as others are chosen, so one whose number is still right adds most.
    waiting = [(*gain(index), position, index) for position, index in enumerate(order)]
    heapq.heapify(waiting)
    chosen: list[int] = []
    while waiting and len(chosen) < keep:
        *known, position, index = heapq.heappop(waiting)
        now = gain(index)
        if now != tuple(known):
            heapq.heappush(waiting, (*now, position, index))
        elif chosen and now == (0, 0):
            break
        else:
            chosen.append(index)
            seen_values |= values[index].keys()
            seen_pairs |= pairs[index]
    return chosen


def _values_of(case: Mapping[str, Any]) -> dict[tuple[str, str], None]:
    """Return the values of a case with the names of their axes, in the order of the axes."""
    found: dict[tuple[str, str], None] = {}
    for axis, value in case.items():
        inner: Mapping[str, Any] = {}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        elif isinstance(value, dict):
            inner = value
        elif isinstance(value, tuple):
            inner = {str(position): entry for position, entry in enumerate(value)}
        if inner:
            found |= {(f"{axis}.{name}", text): None for name, text in _values_of(inner)}
        else:
            found[axis, repr(value)] = None
    return found
