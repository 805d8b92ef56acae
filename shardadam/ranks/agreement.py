# SPDX-License-Identifier: Apache-2.0
"""Checks that all ranks have equal values, and raises the same error on every rank if they do not.

Exchanges small Python objects over a control group. Must not move tensors of the model.
"""

from __future__ import annotations

import ctypes
import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from shardadam.ranks import desync


class Claim(NamedTuple):
    """A value that must be equal on all ranks, as text: ``field`` of ``subject`` is ``value``.

    Args:
        is_name: ``value`` is the name of a parameter. If ranks have different numbers of parameters, the message names
            the first one that a rank lacks.
    """

    subject: str
    field: str
    value: str
    is_name: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ManyClaims:
    """Claims about many parameters, which are spelled out only if ranks differ.

    Args:
        values: returns values whose ``repr`` is equal on all ranks if and only if the claims are.
        spelled_out: returns the claims.
    """

    values: Callable[[], list[object]]
    spelled_out: Callable[[], list[Claim]]


@dataclass(frozen=True, slots=True)
class _Failure:
    message: str


_BUILD_ALIKE = "Build the same model and the same optimizer on every rank."


def require(
    claims: Sequence[Claim | ManyClaims], group: dist.ProcessGroup | None, *, remedy: str = _BUILD_ALIKE
) -> None:
    """Check that all ranks make the same claims in the same order. Collective: all ranks must call it.

    Args:
        group: None for one rank.
        remedy: the end of the message.

    Raises:
        ValueError: on every rank; names the first claim that differs and its values by rank.
        RuntimeError: another rank has called ``announce_failure``.
    """
    if group is None:
        return
    values = [claim.values() if isinstance(claim, ManyClaims) else claim for claim in claims]
    digests = exchange(hashlib.sha256(repr(values).encode()).hexdigest(), group)
    _raise_failure_of_another(digests, group)
    if len(set(digests)) == 1:
        return
    spelled_out = [claim.spelled_out() if isinstance(claim, ManyClaims) else [claim] for claim in claims]
    all_claims: list[list[Claim]] = exchange([one for some in spelled_out for one in some], group)
    ranks = dist.get_process_group_ranks(group)
    difference = next(row for row in zip_longest(*all_claims) if len(set(row)) > 1)
    described = [_describe_difference(difference, ranks)]
    counts = [sum(claim.is_name for claim in own) for own in all_claims]
    if len(set(counts)) > 1:
        if any(claim is None or claim.is_name for claim in difference):
            described = _describe_lacking(all_claims, ranks) or described
        described.append(f"The number of parameters is {by_value(counts, ranks)}.")
    raise ValueError(" ".join([*described, remedy]))


def largest(value: int, group: dist.ProcessGroup | None) -> int:
    """Return the largest ``value`` of all ranks. Collective: all ranks must call it."""
    return value if group is None else max(exchange(value, group))


def announce_failure(error: Exception, group: dist.ProcessGroup | None) -> None:
    """Make ``require`` raise ``error`` on the other ranks. Call it in place of ``require``. Collective."""
    if group is not None:
        exchange(_Failure(f"{type(error).__name__}: {error}"), group)


def exchange(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return the objects of all ranks, in rank order. Collective: all ranks must call it.

    Like torch's all_gather_object, which needs NumPy.
    """
    device = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"
    text = pickle.dumps(mine)
    size = torch.tensor([len(text)], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(sizes, size, group=group)
        largest_size = max(int(one) for one in sizes)
        padded = torch.frombuffer(bytearray(text.ljust(largest_size)), dtype=torch.uint8).to(device)
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded, group=group)
    except RuntimeError as error:
        ranks = dist.get_process_group_ranks(group)
        raise desync.desync_error("An exchange of small objects between ranks", error, ranks) from error
    on_host = [one.cpu() for one in texts]
    return [pickle.loads(ctypes.string_at(one.data_ptr(), int(n))) for one, n in zip(on_host, sizes, strict=True)]


def _raise_failure_of_another(answers: Sequence[Any], group: dist.ProcessGroup) -> None:
    for rank, answer in zip(dist.get_process_group_ranks(group), answers, strict=True):
        if isinstance(answer, _Failure):
            raise RuntimeError(
                f"Rank {rank} could not build the optimizer, so no rank did. Its error: {answer.message}"
            )


def _describe_difference(row: Sequence[Claim | None], ranks: Sequence[int]) -> str:
    """Return a sentence that names the difference.

    Args:
        row: each rank's claim at one position; None if a rank has no more claims.
    """
    first = next(claim for claim in row if claim is not None)
    if all(claim is not None and (claim.subject, claim.field) == (first.subject, first.field) for claim in row):
        what = f" on {first.subject}: {first.field}" if first.field else f" on {first.subject}"
        values = [claim.value for claim in row if claim is not None]
    else:
        what = ":"
        values = ["nothing" if claim is None else f"{claim.subject} ({claim.field} {claim.value})" for claim in row]
    return f"Ranks disagree{what} {by_value(values, ranks)}."


def _describe_lacking(all_claims: Sequence[Sequence[Claim]], ranks: Sequence[int]) -> list[str]:
    """Return a sentence that names the first parameter that some ranks lack; an empty list if there is none."""
    names = [[claim.value for claim in claims if claim.is_name] for claims in all_claims]
    everywhere = set.intersection(*map(set, names))
    lacked = [(position, name) for own in names for position, name in enumerate(own) if name not in everywhere]
    if not lacked:
        return []
    _, name = min(lacked)
    having = [rank for rank, own in zip(ranks, names, strict=True) if name in own]
    lacking = [rank for rank in ranks if rank not in having]
    verb = "lacks" if len(lacking) == 1 else "lack"
    return [
        f"Ranks disagree on which parameters there are: {name_ranks(lacking)} {verb} {name} of {name_ranks(having)}."
    ]


def by_value(values: Sequence[object], ranks: Sequence[int]) -> str:
    """Return a text such as ``3 on ranks 0-1, 2 on rank 2``."""
    holders: dict[object, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        holders.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in holders.items())


def name_ranks(ranks: Sequence[int]) -> str:
    """Return a text such as ``rank 3`` or ``ranks 0-2, 5``."""
    intervals: list[list[int]] = []  # [first, last], or [only]
    for rank in ranks:
        if intervals and intervals[-1][-1] == rank - 1:
            intervals[-1][1:] = [rank]
        else:
            intervals.append([rank])
    named = ", ".join("-".join(map(str, interval)) for interval in intervals)
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
