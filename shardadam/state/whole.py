# SPDX-License-Identifier: Apache-2.0
"""Gathers whole tensors of the state, in exact values whatever their format. Collective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller

from torch import Tensor

from shardadam.engine.gathering import gather_shards
from shardadam.engine.storage import FlatArena, FlatBucket, ShardedParam
from shardadam.transport import Transport
from shardadam.update import formats


def gather(param: ShardedParam, shard_of: Callable[[FlatBucket], Tensor], transport: Transport) -> Tensor:
    """Gathers what ``shard_of`` returns for the parameter's buckets into a new tensor of its shape, on its device."""
    device = param.parameter.device
    return gather_shards(param.buckets, shard_of, transport, keep={param.index}, device=device)[param.index]


def of_one(param: ShardedParam, transport: Transport) -> dict[str, Tensor]:
    """Returns step, moments and, if there is one, master of a parameter, as new tensors on its device."""
    whole = {"step": _step(param).clone()}
    for name in _names(param.arena):
        whole[name] = gather(param, methodcaller("exact_state", name), transport)
    return whole


def of_all(
    arenas: Sequence[FlatArena], transport: Transport, *, keep: bool
) -> list[tuple[ShardedParam, dict[str, Tensor]]]:
    """Returns the same of every parameter, on the CPU.

    Args:
        keep: whether this rank needs the tensors; otherwise the dicts contain only the step.
    """
    found: dict[int, tuple[ShardedParam, dict[str, Tensor]]] = {
        param.index: (param, {"step": _step(param).cpu().clone()}) for arena in arenas for param in arena.params
    }
    for arena in arenas:
        wanted = {param.index for param in arena.params} if keep else set()
        for name in _names(arena):
            gathered = gather_shards(
                arena.buckets, methodcaller("exact_state", name), transport, keep=wanted, device="cpu"
            )
            for index, tensor in gathered.items():
                found[index][1][name] = tensor
    return list(found.values())


def _step(param: ShardedParam) -> Tensor:
    return param.arena.counters.steps[param.arena_index]


def _names(arena: FlatArena) -> list[str]:
    """Returns the names that ``FlatBucket.exact_state`` takes."""
    return [*formats.MOMENTS, *(["master"] if arena.format.master in ("fp32", "split") else [])]
