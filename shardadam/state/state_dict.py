# SPDX-License-Identifier: Apache-2.0
"""The optimizer's state dict in torch's form: this rank's shards, or whole on one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from shardadam.engine.parameters import ShardedParameters
from shardadam.state import local, whole
from shardadam.transport import Transport

ParamGroups = Sequence[Mapping[str, Any]]
StateDict = dict[str, Any]


def local_state_dict(parameters: ShardedParameters, param_groups: ParamGroups) -> StateDict:
    """Returns this rank's shard of every tensor, in the optimizer's own memory. Local."""
    params = parameters.by_id()
    entries = {
        position: local.saved_state(params[key]) for key, position in _positions(param_groups).items() if key in params
    }
    return {"state": entries, "param_groups": _packed(param_groups)}


def whole_state_dict(
    parameters: ShardedParameters, param_groups: ParamGroups, transport: Transport, *, to: int | None
) -> StateDict | None:
    """Returns new, whole tensors on the CPU on rank ``to``, or on all if it is None; None on the others. Collective.

    Raises:
        ValueError: ``to`` is not a rank of the optimizer's process group.
    """
    barrier = transport.store_barrier
    if to is not None and not 0 <= to < len(barrier.ranks):
        raise ValueError(f"to: found {to!r}, expected a rank from 0 to {len(barrier.ranks) - 1}")
    is_here = to is None or barrier.rank == to
    found = whole.of_all(parameters.arenas, keep=is_here)
    if not is_here:
        return None
    positions = _positions(param_groups)
    entries = {positions[id(param.parameter)]: entry for param, entry in found}
    return {"state": dict(sorted(entries.items())), "param_groups": deepcopy(_packed(param_groups))}


def shallow_copy(state_dict: StateDict) -> StateDict:
    """Copies dicts and lists, but no tensors: callers may rename keys, as get_optimizer_state_dict does."""
    return {
        "state": {index: {**entry} for index, entry in state_dict["state"].items()},
        "param_groups": [{**group} for group in state_dict["param_groups"]],
    }


def _positions(param_groups: ParamGroups) -> dict[int, int]:
    """Returns the position of every parameter among all of them, by its ``id``."""
    parameters = (parameter for group in param_groups for parameter in group["params"])
    return {id(parameter): position for position, parameter in enumerate(parameters)}


def _packed(param_groups: ParamGroups) -> list[dict[str, Any]]:
    """Returns the param groups with positions in place of parameters; ``params`` comes last, as in torch."""
    positions = _positions(param_groups)
    return [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [positions[id(parameter)] for parameter in group["params"]]}
        for group in param_groups
    ]
