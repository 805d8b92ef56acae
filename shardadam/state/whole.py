# SPDX-License-Identifier: Apache-2.0
"""Gathers whole tensors of the state, in exact values whatever their format. Collective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import methodcaller

from torch import Tensor

from shardadam.engine.borrowing import lent
from shardadam.engine.gathering import gather_shards
from shardadam.engine.storage import FlatArena, FlatBucket, ShardedParam
from shardadam.transport import placement
from shardadam.update import formats


def gather(param: ShardedParam, shard_of: Callable[[FlatBucket], Tensor]) -> Tensor:
    """Gathers what ``shard_of`` returns for the parameter's buckets into a new tensor of its shape, on its device.

    That of a DTensor is a DTensor.
    """
    device = param.local.device
    local = gather_shards(param.buckets, shard_of, keep={param.index}, device=device)[param.index]
    return placement.like(param.parameter, local)


def of_one(param: ShardedParam) -> dict[str, Tensor]:
    """Returns numbers, moments and, where there are some, master and average: new tensors on the parameter's device."""
    whole = {name: number.clone() for name, number in _numbers(param).items()}
    with lent([param.arena], written=False):
        for name in _names(param.arena):
            whole[name] = gather(param, methodcaller("exact_state", name))
    return whole


def of_all(arenas: Sequence[FlatArena], *, keep: bool) -> list[tuple[ShardedParam, dict[str, Tensor]]]:
    """Returns the same of every parameter, on the CPU. Those of DTensors are whole, too: collective over their mesh.

    Args:
        keep: whether this rank needs the tensors; otherwise the dicts contain only numbers.
    """
    found: dict[int, tuple[ShardedParam, dict[str, Tensor]]] = {
        param.index: (param, {name: number.cpu().clone() for name, number in _numbers(param).items()})
        for arena in arenas
        for param in arena.params
    }
    for arena in arenas:
        # Ranks that shard with each other (fully_shard) all take part, even if only one needs the result.
        wanted = {param.index for param in arena.params} if keep or arena.is_borrowed else set()
        with lent([arena], written=False):
            for name in _names(arena):
                has_dtensors = any(param.local is not param.parameter for param in arena.params)
                device = arena.parameters.device if has_dtensors else "cpu"
                gathered = gather_shards(arena.buckets, methodcaller("exact_state", name), keep=wanted, device=device)
                for index, tensor in gathered.items():
                    param, entry = found[index]
                    whole = placement.whole(placement.like(param.parameter, tensor)).cpu()
                    if keep:
                        entry[name] = whole
    return list(found.values())


def _numbers(param: ShardedParam) -> dict[str, Tensor]:
    """Returns ``step`` and, with averages, ``n_averaged``, 0-dim."""
    counters, index = param.arena.counters, param.arena_index
    averaged = {} if counters.n_averaged is None else {"n_averaged": counters.n_averaged[index]}
    return {"step": counters.steps[index], **averaged}


def _names(arena: FlatArena) -> list[str]:
    """Returns the names that ``FlatBucket.exact_state`` takes."""
    master = ["master"] if arena.format.master in ("fp32", "split") else []
    return [*formats.MOMENTS, *master, *([formats.AVERAGE] if arena.format.has_average else [])]
