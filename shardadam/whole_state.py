# SPDX-License-Identifier: Apache-2.0
"""Whole tensors of the state, exact whatever they are stored in, out of the shards of all ranks. Collective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller

from torch import Tensor

from shardadam.buckets import FlatArena, FlatBucket, Member
from shardadam.gathering import gather_shards
from shardadam.transport import Transport
from shardadam.update import formats


def gather(member: Member, shard_of: Callable[[FlatBucket], Tensor], transport: Transport) -> Tensor:
    """Of what ``shard_of`` takes from each of the parameter's buckets: a new tensor of its shape, on its device."""
    device = member.parameter.device
    return gather_shards(member.buckets, shard_of, transport, keep={member.ordinal}, device=device)[member.ordinal]


def of_one(member: Member, transport: Transport) -> dict[str, Tensor]:
    """Its step, moments and, where there is one, master; new tensors on its device."""
    whole = {"step": _step(member).clone()}
    for name in _names(member.arena):
        whole[name] = gather(member, methodcaller("exact_state", name), transport)
    return whole


def of_all(arenas: Sequence[FlatArena], transport: Transport, *, keep: bool) -> list[tuple[Member, dict[str, Tensor]]]:
    """The same of every parameter, on the CPU.

    Args:
        keep: whether this rank wants them; without it the dicts hold the step alone.
    """
    found: dict[int, tuple[Member, dict[str, Tensor]]] = {
        member.ordinal: (member, {"step": _step(member).cpu().clone()}) for arena in arenas for member in arena.members
    }
    for arena in arenas:
        wanted = {member.ordinal for member in arena.members} if keep else set()
        for name in _names(arena):
            gathered = gather_shards(
                arena.buckets, methodcaller("exact_state", name), transport, keep=wanted, device="cpu"
            )
            for ordinal, tensor in gathered.items():
                found[ordinal][1][name] = tensor
    return list(found.values())


def _step(member: Member) -> Tensor:
    return member.arena.counters.steps[member.index]


def _names(arena: FlatArena) -> list[str]:
    """What ``FlatBucket.exact_state`` can give of an arena."""
    return [*formats.MOMENTS, *(["master"] if arena.format.master in ("fp32", "split") else [])]
