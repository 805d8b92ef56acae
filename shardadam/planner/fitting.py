# SPDX-License-Identifier: Apache-2.0
"""Which settings fit into memory, and which of them is nearest to the requested one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch

from shardadam.optimizer import GradientSync
from shardadam.planner.need import Need, need_of
from shardadam.planner.planning import (
    Planned,
    PlannedParameter,
    Setting,
    described,
    lay_out,
    shard_group_multiple,
    trainable_of,
)
from shardadam.precision import Master, Moments


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a requested setting fits, and the nearest one that does.

    Args:
        asked: the requested setting.
        available: bytes of memory for each rank with ``asked``.
        need: what ``asked`` takes.
        nearest: the setting with the fewest changes that fits: ``asked`` itself if it fits, None if no setting fits.
        nearest_need: what ``nearest`` takes.
        changes: how ``nearest`` differs from ``asked``: of "moments", "world_size", "gradient_sync" and "master".
    """

    asked: Setting
    available: int
    need: Need
    nearest: Setting | None
    nearest_need: Need | None
    changes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.nearest == self.asked


def fitting(
    parameters: Planned, asked: Setting, available: int | Callable[[int], int], *, most_ranks: int = 1024
) -> Fit:
    """Find the setting nearest to ``asked`` that fits.

    Nearest is the setting that changes the fewest of moments, ranks, ``gradient_sync`` and master. Among equals, one
    that changes an earlier of these is nearer; then one with fewer steps down the formats, and up the powers of two of
    ranks before down them (times ``shard_group_multiple``). ``gradient_sync="external"`` is never proposed, though it
    may be kept or given up.

    Args:
        available: bytes of memory for each rank; or a function from the number of ranks to them, as for ranks that
            share a host: ``lambda ranks: host_bytes // ranks``.
        most_ranks: the largest number of ranks to propose.

    Raises:
        ValueError, TypeError: the optimizer would refuse ``asked``.
    """
    known = described(parameters)
    layouts = {asked.world_size: lay_out(known, asked)}
    room = available if callable(available) else lambda _: available
    asked_need = need_of(known, layouts[asked.world_size], asked)
    for candidate, changes in _candidates(known, asked, most_ranks):
        if candidate.world_size not in layouts:
            layouts[candidate.world_size] = lay_out(known, candidate)
        found = need_of(known, layouts[candidate.world_size], candidate)
        if found.total <= room(candidate.world_size):
            return Fit(asked, room(asked.world_size), asked_need, candidate, found, changes)
    return Fit(asked, room(asked.world_size), asked_need, None, None)


def _candidates(
    parameters: Sequence[PlannedParameter], asked: Setting, most_ranks: int
) -> Iterator[tuple[Setting, tuple[str, ...]]]:
    """Yield all settings with their changes, the nearest first.

    Includes changes that take more bytes: the nearest that fits never has one.
    """
    precision, dtypes = asked.precision, {one.dtype for one in trainable_of(parameters)}
    moments: list[Moments] = [precision.moments]
    if torch.float64 not in dtypes:
        moments += [other for other in get_args(Moments) if other != precision.moments]
    masters: list[Master] = [precision.master]
    if dtypes & {torch.bfloat16, torch.float16}:
        masters += [other for other in ("split", "none") if other != precision.master]
    syncs: list[GradientSync] = [asked.gradient_sync]
    syncs += [other for other in ("backward", "step") if other != asked.gradient_sync]
    least = shard_group_multiple(parameters)
    powers = [least * 2**power for power in range(most_ranks.bit_length()) if least * 2**power <= most_ranks]
    more = [ranks for ranks in powers if ranks > asked.world_size]
    fewer = [ranks for ranks in reversed(powers) if ranks < asked.world_size]
    choices = (moments, [asked.world_size, *more, *fewer], syncs, masters)
    names = ("moments", "world_size", "gradient_sync", "master")

    def distance(indices: tuple[int, ...]) -> tuple[int, tuple[bool, ...], int, tuple[int, ...]]:
        is_kept = tuple(index == 0 for index in indices)
        return is_kept.count(False), is_kept, sum(indices), indices  # a change of an earlier name is nearer

    for indices in sorted(itertools.product(*(range(len(some)) for some in choices)), key=distance):
        m, n, s, w = indices
        yield (
            replace(
                asked,
                world_size=choices[1][n],
                gradient_sync=syncs[s],
                precision=replace(precision, moments=moments[m], master=masters[w]),
            ),
            tuple(name for name, index in zip(names, indices, strict=True) if index),
        )
