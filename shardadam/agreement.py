# SPDX-License-Identifier: Apache-2.0
"""Do all ranks hold the same? Compared before anything is laid out, with an error on every rank where they do not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that must be equal on all ranks, as text: ``field`` of ``subject`` is ``value``."""

    subject: str
    field: str
    value: str


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str


def require(claims: Sequence[Claim], group: dist.ProcessGroup | None) -> None:
    """Collective: raises on every rank, with one message, unless all ranks make the same claims in the same order.

    Raises:
        ValueError: names the first claim that differs, and what it is on which ranks.
        RuntimeError: another rank has called ``announce_failure``.
    """
    if group is None:
        return
    digests = _exchange(hashlib.sha256(repr(claims).encode()).hexdigest(), group)
    _raise_failure_of_another(digests, group)
    if len(set(digests)) == 1:
        return
    everybody = _exchange(list(claims), group)
    for row in zip_longest(*everybody):
        if len(set(row)) > 1:
            raise ValueError(_describe_difference(row, dist.get_process_group_ranks(group)))


def largest(value: int, group: dist.ProcessGroup | None) -> int:
    """Collective: the largest ``value`` of all ranks."""
    return value if group is None else max(_exchange(value, group))


def announce_failure(error: Exception, group: dist.ProcessGroup | None) -> None:
    """Collective, called in place of ``require``: the other ranks raise too, instead of waiting for this one."""
    if group is not None:
        _exchange(_Failure(f"{type(error).__name__}: {error}"), group)


def _exchange(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, mine, group=group)
    return everybody


def _raise_failure_of_another(answers: Sequence[Any], group: dist.ProcessGroup) -> None:
    for rank, answer in zip(dist.get_process_group_ranks(group), answers, strict=True):
        if isinstance(answer, _Failure):
            raise RuntimeError(f"Rank {rank} could not build the optimizer, so no rank did. There: {answer.message}")


def _describe_difference(row: Sequence[Claim | None], ranks: Sequence[int]) -> str:
    """A row holds what each rank claims at one position; None where a rank has no more claims."""
    first = next(claim for claim in row if claim is not None)
    if all(claim is not None and (claim.subject, claim.field) == (first.subject, first.field) for claim in row):
        what = f"{first.subject}: {first.field}" if first.field else first.subject
        values = [claim.value for claim in row if claim is not None]
    else:
        what = "what comes next"
        values = ["nothing" if claim is None else f"{claim.subject} ({claim.field} {claim.value})" for claim in row]
    holders: dict[str, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        holders.setdefault(value, []).append(rank)
    differing = ", ".join(f"{value} on {_name_ranks(ranks)}" for value, ranks in holders.items())
    return f"Ranks disagree on {what} {differing}. Build the same model and the same optimizer on every rank."


def _name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 0-2, 5``."""
    stretches: list[list[int]] = []
    for rank in ranks:
        if stretches and stretches[-1][-1] == rank - 1:
            stretches[-1][1:] = [rank]
        else:
            stretches.append([rank])
    named = ", ".join("-".join(map(str, stretch)) for stretch in stretches)
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
