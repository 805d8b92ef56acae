# SPDX-License-Identifier: Apache-2.0
"""This rank's shards of the optimizer's state as torch's dict of tensors, and loading from such a dict. Local."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from shardadam.engine.storage import ShardedParam, memory_order
from shardadam.layout import ALIGNMENT_NUMEL, Span
from shardadam.state.flat_shard import FlatShard, dimension_order, in_shape
from shardadam.update import formats, reference

_CODES = {"exp_avg": "exp_avg_code", "exp_avg_sq": "exp_avg_sq_code"}
_NAMES = {code: name for name, code in _CODES.items()}


def local_state(param: ShardedParam) -> dict[str, Tensor]:
    """Returns views of this rank's elements of the parameter's state, in memory order and in the format they are stored
    in. All are 1-D, except step and bound (0-dim).
    """
    arena = param.arena
    state = {"step": arena.counters.steps[param.arena_index]}
    for name, flat in arena.state.items():
        state[name] = flat[param.block_slice if name in formats.SCALES else param.state_slice]
    if arena.format.moments == "int8":
        state["bound"] = arena.counters.bounds[param.arena_index]
    return state


def saved_name(name: str, param: ShardedParam) -> str:
    """Returns the name under which torch sees a tensor of the state.

    Codes have other names than moments, because DCP and torch's optimizers convert dtypes and would read codes as
    moments. A remainder is saved as the master it encodes.
    """
    if name == "remainder":
        return "master"
    return _CODES.get(name, name) if param.arena.format.moments == "int8" else name


def torch_state(param: ShardedParam) -> dict[str, Tensor]:
    """Returns what torch keeps in ``optimizer.state[p]``: the local state, with a remainder as it is stored.

    The keys are those of ``saved_state``: set_optimizer_state_dict drops other keys of a flattened dict.
    """
    return {saved_name(name, param): tensor for name, tensor in local_state(param).items()}


def saved_state(param: ShardedParam, *, world_size: int) -> dict[str, Tensor]:
    """Returns the parameter's entry of ``optimizer.state_dict()``: tensors of its shape, each with this rank's spans.

    They share memory with the optimizer, except a ``master`` that is computed from a remainder.
    """
    saved: dict[str, Tensor] = {}
    for name, tensor in local_state(param).items():
        key = saved_name(name, param)
        if name in ("step", "bound"):
            saved[key] = tensor
        elif name in formats.SCALES:
            saved[key] = _whole_or_shard(tensor, state_spans(name, param), (block_count(param),), (0,), world_size)
        else:
            if name == "remainder":
                tensor = reference.join(own_elements(param, param.parameter.detach()), tensor)
            order = dimension_order(param.parameter)
            saved[key] = _whole_or_shard(tensor, state_spans(name, param), param.shape, order, world_size)
    return saved


def state_spans(name: str, param: ShardedParam) -> list[Span]:
    """Returns the spans of the whole tensor that a tensor of ``local_state`` holds; none for step and bound."""
    if name in ("step", "bound"):
        return []
    return block_spans(param) if name in formats.SCALES else spans_of(param)


def _whole_or_shard(
    local: Tensor, spans: Sequence[Span], shape: Sequence[int], order: Sequence[int], world_size: int
) -> Tensor:
    """Returns a ``FlatShard``, or an ordinary tensor where the shard is the whole: on one rank, or if it is empty."""
    if world_size > 1 and torch.Size(shape).numel() > 0:
        return FlatShard(local, spans, shape, order)
    return in_shape(local, shape, order)


def spans_of(param: ShardedParam) -> list[Span]:
    """Returns the spans of the parameter that lie in this rank's shards, with adjacent ones joined."""
    joined: list[Span] = []
    for segment in param.shard_segments:
        if joined and joined[-1].stop == segment.start:
            joined[-1] = Span(joined[-1].start, joined[-1].numel + segment.numel)
        else:
            joined.append(Span(segment.start, segment.numel))
    return joined


def block_spans(param: ShardedParam) -> list[Span]:
    """Returns ``spans_of`` in blocks of ``ALIGNMENT_NUMEL`` elements; spans start at multiples of it."""
    return [Span(span.start // ALIGNMENT_NUMEL, -(-span.numel // ALIGNMENT_NUMEL)) for span in spans_of(param)]


def block_count(param: ShardedParam) -> int:
    return -(-param.shape.numel() // ALIGNMENT_NUMEL)


def load_local(
    param_groups: list[dict[str, Any]], params: Sequence[ShardedParam], state_dict: Mapping[str, Any]
) -> None:
    """Copies ``state_dict`` into the params' state and ``param_groups``, after checking all of it.

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
    own = {id(param.parameter): _own(param, saved.get(id(param.parameter), {})) for param in params}
    betas = {
        id(parameter): saved_group.get("betas", group["betas"])
        for group, saved_group in zip(param_groups, saved_groups, strict=True)
        for parameter in group["params"]
    }
    for param in params:
        key = id(param.parameter)
        load_param_(param, own[key], betas=betas[key])
    for group, saved_group in zip(param_groups, saved_groups, strict=True):
        load_group_(group, saved_group)


def load_group_(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Copies hyperparameters into a param group, except ``decoupled_weight_decay``: Adam stays Adam."""
    kept = ("params", "param_names", "decoupled_weight_decay")
    for key, value in saved.items():
        if key not in kept:
            before, value = group.get(key), deepcopy(value)
            both = isinstance(before, Tensor) and isinstance(value, Tensor)
            group[key] = value.to(before.device) if both else value  # type: ignore[union-attr]


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
    for name in (*formats.MOMENTS, "master"):
        if name in own:
            own[name] = _own_part(param, name, own[name], param.shape, spans_of(param))
    for name in formats.SCALES:
        if name in own:
            own[name] = _own_part(param, name, own[name], (block_count(param),), block_spans(param))
    return own


def _own_part(param: ShardedParam, name: str, saved: Tensor, shape: Sequence[int], spans: Sequence[Span]) -> Tensor:
    if tuple(saved.shape) != tuple(shape):
        raise ValueError(
            f"Parameter {param.name!r}: {name} has shape {tuple(saved.shape)} in state_dict, expected {tuple(shape)}."
        )
    if isinstance(saved, FlatShard):
        in_order = name in formats.SCALES or saved.order == dimension_order(param.parameter)
        if saved.spans != tuple(spans) or not in_order:
            raise ValueError(
                f"Parameter {param.name!r}: state_dict has the elements {_describe(saved.spans)} of {name}, expected "
                f"this rank's {_describe(spans)}. It comes from another rank, number of ranks, bucket_mb or memory "
                "format. To reshard, save to a file and load it: with shardadam.save and shardadam.load, or with "
                "torch.distributed.checkpoint."
            )
        return saved.local
    if name in formats.SCALES:
        return _take(saved, spans)
    return own_elements(param, saved)


def _describe(spans: Sequence[Span]) -> str:
    return ", ".join(f"{span.start}:{span.stop}" for span in spans) or "none"


def load_param_(param: ShardedParam, saved: Mapping[str, Any], *, betas: tuple[float, float]) -> None:
    """Writes this rank's elements into the state, converted to its format. If ``saved`` is empty, Adam restarts.

    Args:
        saved: 1-D tensors, in any format; ``step`` and ``bound`` are numbers.
        betas: for the bound, if ``saved`` has none.
    """
    state = local_state(param)
    steps = float(saved.get("step", 0.0))
    state["step"].fill_(steps)
    param.arena.counters.bounds[param.arena_index] = saved.get("bound", reference.bound_squared_at(steps, betas))
    parameter = own_elements(param, param.parameter.detach())
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
    formats.write_master_(state, parameter, saved.get("master", parameter))


def own_elements(param: ShardedParam, whole: Tensor) -> Tensor:
    """Returns this rank's elements of a tensor of the parameter's shape, 1-D."""
    return _take(memory_order(whole, param.parameter), spans_of(param))


def _take(flat: Tensor, spans: Sequence[Span]) -> Tensor:
    parts = [flat[span.start : span.stop] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else flat[:0]
