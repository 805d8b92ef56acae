# SPDX-License-Identifier: Apache-2.0
"""Which settings fit into memory, and which of them is nearest to the requested one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

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
from shardadam.precision import Moments

CHANGES = ("gradients", "moments", "update", "clips", "gradient_sync", "master", "world_size", "offload")
"""What ``fitting`` may change of a setting, from what costs least to what costs most.

Gradient shards in bfloat16 are rounded once a step, and moments with an unbiased error. An update in backward rounds
nothing, but takes clipping and other access to gradients away. Another ``gradient_sync`` changes the code around it.
Without masters the parameters themselves are rounded. More ranks cost hardware.
State on disk takes time in every step. "host" is never proposed, as the memory of the
host is not known here; it may be taken instead of "disk" on GPUs.
"""
_OF_PRECISION = ("gradients", "moments", "master")


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a requested setting fits, and the nearest one that does.

    Args:
        asked: the requested setting.
        available: bytes of memory for each rank with ``asked``.
        need: what ``asked`` takes.
        nearest: the setting with the fewest changes that fits: ``asked`` itself if it fits, None if no setting fits.
        nearest_need: what ``nearest`` takes.
        changes: how ``nearest`` differs from ``asked``: some of ``CHANGES``, in their order.
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
    parameters: Planned,
    asked: Setting,
    available: int | Callable[[int], int],
    *,
    most_ranks: int = 1024,
    keep: Collection[str] = (),
) -> Fit:
    """Find the setting nearest to ``asked`` that fits.

    Nearest is the setting with the fewest of ``CHANGES``; the state goes to disk only where nothing fits without that.
    Among equals, one that changes an earlier of these is nearer:
    they are in the order of what they cost. Then one with fewer steps down the formats, and up the powers of two of
    ranks before down them (times ``shard_group_multiple``). ``update="backward"`` is proposed with ``gradient_sync=
    "backward"`` and without clipping only, as the optimizer refuses it otherwise. ``gradient_sync="external"`` is never
    proposed, though it may be kept or given up.

    Args:
        available: bytes of memory for each rank; or a function from the number of ranks to them, as for ranks that
            share a host: ``lambda ranks: host_bytes // ranks``.
        most_ranks: the largest number of ranks to propose.
        keep: those of ``CHANGES`` that must not be changed.

    Raises:
        ValueError, TypeError: the optimizer would refuse ``asked``.
    """
    known = described(parameters)
    layouts = {asked.world_size: lay_out(known, asked)}
    room = available if callable(available) else lambda _: available
    asked_need = need_of(known, layouts[asked.world_size], asked)
    for candidate, changes in _candidates(known, asked, most_ranks, keep):
        if candidate.world_size not in layouts:
            layouts[candidate.world_size] = lay_out(known, candidate)
        found = need_of(known, layouts[candidate.world_size], candidate)
        if found.total <= room(candidate.world_size):
            return Fit(asked, room(asked.world_size), asked_need, candidate, found, changes)
    return Fit(asked, room(asked.world_size), asked_need, None, None)


def _candidates(
    parameters: Sequence[PlannedParameter], asked: Setting, most_ranks: int, keep: Collection[str]
) -> Iterator[tuple[Setting, tuple[str, ...]]]:
    """Yield all settings with their changes, the nearest first."""
    choices = _choices(parameters, asked, most_ranks)
    choices |= {name: choices[name][:1] for name in keep}

    def distance(indices: tuple[int, ...]) -> tuple[bool, int, tuple[bool, ...], int, tuple[int, ...]]:
        is_kept = tuple(index == 0 for index in indices)
        stays = is_kept[CHANGES.index("offload")]
        return not stays, is_kept.count(False), is_kept, sum(indices), indices  # a change of an earlier name is nearer

    for indices in sorted(itertools.product(*(range(len(choices[name])) for name in CHANGES)), key=distance):
        values = {name: choices[name][index] for name, index in zip(CHANGES, indices, strict=True)}
        in_backward = values["update"] == "backward"
        if in_backward and (values["clips"] or values["gradient_sync"] != "backward"):
            continue
        if values["clips"] != asked.clips and not in_backward:
            continue
        precision = replace(asked.precision, **{name: values.pop(name) for name in _OF_PRECISION})
        changes = tuple(name for name, index in zip(CHANGES, indices, strict=True) if index)
        yield replace(asked, precision=precision, **values), changes


def _choices(parameters: Sequence[PlannedParameter], asked: Setting, most_ranks: int) -> dict[str, list[Any]]:
    """Return what each of ``CHANGES`` may become, the requested value first."""
    precision, dtypes = asked.precision, {one.dtype for one in trainable_of(parameters)}
    is_low = bool(dtypes & {torch.bfloat16, torch.float16})
    may_be_narrow = torch.float64 not in dtypes
    masters = ("auto" if precision.master == "auto" else "fp32", "split", "none")
    least = shard_group_multiple(parameters)
    powers = [least * 2**power for power in range(most_ranks.bit_length()) if least * 2**power <= most_ranks]
    more = [ranks for ranks in powers if ranks > asked.world_size]
    fewer = [ranks for ranks in reversed(powers) if ranks < asked.world_size]
    return {
        "gradients": _narrower(precision.gradients, ("fp32", "auto", "bf16") if may_be_narrow else ()),
        "moments": _narrower(precision.moments, get_args(Moments) if may_be_narrow else ()),
        "update": list(dict.fromkeys((asked.update, "backward"))),
        "clips": [True, False] if asked.clips else [False],
        "gradient_sync": list(dict.fromkeys((asked.gradient_sync, "backward", "step"))),
        "master": _narrower(precision.master, masters if is_low else ()),
        "world_size": [asked.world_size, *more, *fewer],
        "offload": [asked.offload] if asked.offload else [None, "disk"],
    }


def _narrower(asked: str, formats: Sequence[str]) -> list[str]:
    """Return the requested format, and those after it in ``formats``."""
    return [asked, *(formats[formats.index(asked) + 1 :] if asked in formats else ())]
