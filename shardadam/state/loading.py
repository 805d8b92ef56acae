# SPDX-License-Identifier: Apache-2.0
"""Loads torch's dict of tensors, or this rank's own one, into this rank's shards of the optimizer's state. Local."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardadam.engine.parameters import ShardedParameters
from shardadam.engine.storage import NamedParameter, ShardedParam
from shardadam.layout import Span
from shardadam.state.flat_shard import FlatShard, dimension_order
from shardadam.state.local import CODES, block_spans, local_state, own_elements, place_in_state, spans_of, take
from shardadam.state.masters import write_master_
from shardadam.transport import placement
from shardadam.update import formats, reference

_NAMES = {code: name for name, code in CODES.items()}


def load_local(param_groups: list[dict[str, Any]], held: ShardedParameters, state_dict: Mapping[str, Any]) -> None:
    """Copies ``state_dict`` into the state of ``held`` and into ``param_groups``, after checking all of it.

    Raises:
        ValueError: it does not fit; nothing has changed.
    """
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in param_groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict has param groups of {saved_sizes} parameters, expected {sizes}. Build the optimizer over the "
            "model and groups that were saved."
        )
    indices = [index for group in saved_groups for index in group["params"]]
    parameters = [parameter for group in param_groups for parameter in group["params"]]
    saved = {
        id(p): state_dict["state"][i] for p, i in zip(parameters, indices, strict=True) if i in state_dict["state"]
    }
    _refuse_state_of_frozen(held.frozen, saved)
    # torch's set_optimizer_state_dict leaves out parameters that are frozen now: their state stays.
    params = [param for param in held.params if param.parameter.requires_grad or saved.get(id(param.parameter))]
    own = {id(param.parameter): _own(param, saved.get(id(param.parameter), {})) for param in params}
    betas = {
        id(parameter): saved_group.get("betas", group["betas"])
        for group, saved_group in zip(param_groups, saved_groups, strict=True)
        for parameter in group["params"]
    }
    for param in params:
        key = id(param.parameter)
        load_param_(param, own[key], betas=betas[key])
    load_groups_(param_groups, saved_groups)


def _refuse_state_of_frozen(frozen: Iterable[NamedParameter], saved: Mapping[int, Mapping[str, Any]]) -> None:
    """Raises ValueError if ``saved``, by the ``id`` of a parameter, has state of frozen ones: it would be lost."""
    names = [
        repr(named.name)
        for named in frozen
        if any(isinstance(value, (Tensor, float, int)) for value in saved.get(id(named.parameter), {}).values())
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"state_dict has state of parameters that are frozen here: {', '.join(names[:3])}{more}. Set requires_grad "
            "on them before loading. You may freeze them again afterwards; their state stays."
        )


def load_groups_(groups: Sequence[dict[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Copies hyperparameters into param groups, except ``decoupled_weight_decay``: Adam stays Adam.

    Note: tensors stay
        A captured CUDA graph reads a learning rate that is a tensor at its address. So such a hyperparameter stays the
        same tensor, and gets the saved value. In torch, groups share a tensor that was passed as a default: if their
        saved values differ, the first group keeps it.
    """
    loaded: set[int] = set()  # ids of the tensors that have their values
    for group, saved in zip(groups, saved_groups, strict=True):
        for key, value in saved.items():
            if key in ("params", "param_names", "decoupled_weight_decay"):
                continue
            before = group.get(key)
            if not isinstance(before, Tensor):
                group[key] = deepcopy(value)
            elif not _can_hold(before, value):
                group[key] = value.detach().clone().to(before.device) if isinstance(value, Tensor) else deepcopy(value)
            elif id(before) not in loaded:
                loaded.add(id(before))
                _fill_(before, value)
            else:
                own = before.detach().clone()
                _fill_(own, value)
                if not torch.equal(own, before):
                    group[key] = own


def _can_hold(tensor: Tensor, value: Any) -> bool:
    """Returns whether ``value``, a tensor or a number, can be copied into ``tensor``."""
    if isinstance(value, Tensor):
        return value.numel() == tensor.numel() and torch.can_cast(value.dtype, tensor.dtype)
    is_whole = isinstance(value, Integral)
    return isinstance(value, Real) and tensor.numel() == 1 and (is_whole or tensor.is_floating_point())


def _fill_(tensor: Tensor, value: Tensor | float) -> None:
    if isinstance(value, Tensor):
        tensor.detach().copy_(value.detach().reshape(tensor.shape))
    else:
        tensor.detach().fill_(value)


def _own(param: ShardedParam, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns this rank's elements of all tensors in ``saved``.

    Raises:
        ValueError: they do not fit the parameter.
    """
    if saved.get("max_exp_avg_sq") is not None:
        raise ValueError(f"Parameter {param.name!r}: state_dict comes from amsgrad=True, which is not supported.")
    # set_optimizer_state_dict passes an empty dict for a key that a flattened dict lacks
    own = {_NAMES.get(name, name): value for name, value in saved.items() if not isinstance(value, Mapping)}
    expected = ["step", *formats.MOMENTS, *(formats.SCALES if saved.keys() & _NAMES.keys() else ())]
    missing = [name for name in expected if saved and name not in own]
    if missing:
        raise ValueError(f"Parameter {param.name!r}: found only {sorted(saved)} in state_dict, {missing} are missing.")
    for name in (*formats.MOMENTS, "master", formats.AVERAGE):
        if name in own:
            own[name] = _own_part(param, name, own[name], spans_of(param))
    for name in formats.SCALES:
        if name in own:
            own[name] = _own_part(param, name, own[name], block_spans(param))
    return own


def _own_part(param: ShardedParam, name: str, saved: Tensor, spans: Sequence[Span]) -> Tensor:
    shape, runs = place_in_state(name, param)
    if tuple(saved.shape) != shape:
        raise ValueError(
            f"Parameter {param.name!r}: {name} has shape {tuple(saved.shape)} in state_dict, expected {shape}."
        )
    if isinstance(saved, FlatShard):
        in_order = name in formats.SCALES or saved.order == dimension_order(param.local)
        if saved.spans != tuple(spans) or saved.runs != runs or not in_order:
            raise ValueError(
                f"Parameter {param.name!r}: state_dict has the elements {_describe(saved.spans)} of {name}, expected "
                f"this rank's {_describe(spans)}. It comes from another rank, number of ranks, bucket_mb or memory "
                "format, or parameters were unfrozen at other times. To reshard, save to a file and load it: with "
                "shardadam.save and shardadam.load, or with torch.distributed.checkpoint."
            )
        return saved.local
    if isinstance(saved, DTensor):
        if placement.runs_of(saved) != runs:
            raise ValueError(
                f"Parameter {param.name!r}: state_dict has a DTensor {saved.placements} as {name}, expected one that "
                "is placed like the parameter. Pass its full_tensor() on all ranks."
            )
        saved = placement.local_tensor(saved)
    else:
        for dim, of_dim in enumerate(runs):
            parts = [saved.narrow(dim, start, length) for start, length in of_dim]
            saved = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    if name in formats.SCALES:
        return take(saved, spans)
    return own_elements(param, saved)


def _describe(spans: Sequence[Span]) -> str:
    return ", ".join(f"{span.start}:{span.stop}" for span in spans) or "none"


def load_param_(param: ShardedParam, saved: Mapping[str, Any], *, betas: tuple[float, float]) -> None:
    """Writes this rank's elements into the state, converted to its format. If ``saved`` is empty, Adam restarts.

    Args:
        saved: 1-D tensors, in any format; ``step``, ``bound`` and ``n_averaged`` are numbers. Without an average, the
            average becomes the exact weight, as before the first step.
        betas: for the bound, if ``saved`` has none.
    """
    state = local_state(param)
    steps = float(saved.get("step", 0.0))
    state["step"].fill_(steps)
    param.arena.counters.bounds[param.arena_index] = saved.get("bound", reference.bound_squared_at(steps, betas))
    parameter = own_elements(param, param.local.detach())
    names = (*formats.MOMENTS, *formats.SCALES)
    if not saved:
        for name in names:
            if name in state:
                state[name].zero_()
    elif all(name in saved and saved[name].dtype == state[name].dtype for name in names if name in state):
        for name in names:
            if name in state:
                state[name].copy_(saved[name])
    else:
        formats.write_moments_(state, *formats.read_moments(saved))
    param.kept_master = None
    write_master_(param, saved.get("master", parameter), state=state, parameter=parameter)
    if formats.AVERAGE in state:
        if formats.AVERAGE in saved:
            state[formats.AVERAGE].copy_(saved[formats.AVERAGE])
        state["n_averaged"].fill_(int(saved.get("n_averaged", 1)) if formats.AVERAGE in saved else 0)
