# SPDX-License-Identifier: Apache-2.0
"""The state of an optimizer as torch's dict of tensors: this rank's part of it, and back."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from shardadam.buckets import Member, memory_order
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.update import formats, reference

SHARD_KEY = "shard"
"""Where ``state_dict()`` says whose part it is."""


def local_state(member: Member) -> dict[str, Tensor]:
    """What torch keeps in ``optimizer.state[p]``, as views of the arena: sharded tensors hold this rank's elements of
    the parameter, in memory order, in one dimension, in the format they are stored in.
    """
    arena = member.arena
    state = {"step": arena.counters.steps[member.index]}
    for name, flat in arena.state.items():
        state[name] = flat[member.block_slice if name in formats.SCALES else member.state_slice]
    if arena.format.moments == "int8":
        state["bound"] = arena.counters.bounds[member.index]
    return state


def load_local(
    param_groups: list[dict[str, Any]],
    state: MutableMapping[Tensor, dict[str, Tensor]],
    members: Sequence[Member],
    state_dict: Mapping[str, Any],
    shard: Mapping[str, Any],
) -> None:
    """Copies ``state_dict`` into the views of ``state`` and the dicts of ``param_groups``, after checking all of it.

    Args:
        shard: whose part this rank can load.
    """
    found = state_dict.get(SHARD_KEY)
    if found is not None and dict(found) != dict(shard):
        raise ValueError(
            f"state_dict is the part of {dict(found)}, expected that of {dict(shard)}. Each rank loads what it has "
            "saved itself, with as many ranks and the same bucket_mb; anything else can load a whole state_dict of "
            "torch.optim.AdamW."
        )
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in param_groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict has param groups of {saved_sizes} parameters, expected {sizes}. Build the optimizer over the "
            "same model and groups as the one that was saved."
        )
    indices = [index for group in saved_groups for index in group["params"]]
    parameters = [parameter for group in param_groups for parameter in group["params"]]
    saved = {
        id(p): state_dict["state"][i] for p, i in zip(parameters, indices, strict=True) if i in state_dict["state"]
    }

    is_part = found is not None
    for member in members:
        _check(member, state[member.parameter], saved.get(id(member.parameter), {}), is_part=is_part)
    betas = {
        id(parameter): saved_group.get("betas", group["betas"])
        for group, saved_group in zip(param_groups, saved_groups, strict=True)
        for parameter in group["params"]
    }
    for member in members:
        of_member = saved.get(id(member.parameter), {})
        _load_(member, state[member.parameter], of_member, is_part=is_part, betas=betas[id(member.parameter)])
    for group, saved_group in zip(param_groups, saved_groups, strict=True):
        group.update(
            {
                key: deepcopy(value)
                for key, value in saved_group.items()
                if key not in ("params", "decoupled_weight_decay")
            }
        )


def _check(member: Member, state: Mapping[str, Tensor], saved: Mapping[str, Any], *, is_part: bool) -> None:
    """Raises unless ``saved`` can be loaded; a parameter that it has nothing of starts anew.

    Args:
        is_part: ``saved`` holds this rank's elements, not whole tensors.
    """
    if saved.get("max_exp_avg_sq") is not None:
        raise ValueError(f"Parameter {member.name!r}: state_dict comes from amsgrad=True, which is not supported.")
    missing = [name for name in ("step", "exp_avg", "exp_avg_sq") if saved and name not in saved]
    if missing:
        raise ValueError(
            f"Parameter {member.name!r}: state_dict has only {sorted(saved)} of it, {missing} are missing."
        )
    for name in (*formats.MOMENTS, *formats.MASTERS):
        expected = state["exp_avg"].shape if is_part else member.parameter.shape
        if name in saved and saved[name].shape != expected:
            raise ValueError(
                f"Parameter {member.name!r}: {name} has shape {tuple(saved[name].shape)} in state_dict, expected "
                f"{tuple(expected)}."
            )
    for name in formats.SCALES:
        expected_numel = -(-state["exp_avg"].numel() // ALIGNMENT_NUMEL)
        if name in saved and saved[name].numel() != expected_numel:
            raise ValueError(
                f"Parameter {member.name!r}: {name} has {saved[name].numel()} elements in state_dict, expected "
                f"{expected_numel}."
            )


def _load_(
    member: Member, state: Mapping[str, Tensor], saved: Mapping[str, Any], *, is_part: bool, betas: tuple[float, float]
) -> None:
    """Writes what ``saved`` has into the views of ``state``, converted to the format they are in."""

    def own(whole: Tensor) -> Tensor:
        return whole if is_part else _own_elements(member, whole)

    steps = float(saved.get("step", 0.0))
    state["step"].fill_(steps)
    member.arena.counters.bounds[member.index] = saved.get("bound", reference.bound_squared_at(steps, betas))
    parameter = _own_elements(member, member.parameter.detach())
    if not saved:
        for name in (*formats.MOMENTS, *formats.SCALES):
            if name in state:
                state[name].zero_()
        formats.write_master_(state, parameter, parameter)
        return
    names = (*formats.MOMENTS, *formats.SCALES)
    if is_part and all((name in saved) == (name in state) for name in names):
        for name in names:
            if name in state:
                state[name].copy_(saved[name])
    elif is_part:
        formats.write_moments_(state, *formats.read_moments(saved))
    else:
        formats.write_moments_(state, *(own(saved[name]) for name in formats.MOMENTS))
    master = formats.read_master({name: own(saved[name]) for name in formats.MASTERS if name in saved}, parameter)
    formats.write_master_(state, parameter, parameter if master is None else master)


def _own_elements(member: Member, whole: Tensor) -> Tensor:
    """This rank's elements of a tensor of the parameter's shape."""
    flat = memory_order(whole, member.parameter)
    spans = [flat[span.start : span.start + span.numel] for span in member.spans]
    return torch.cat(spans) if spans else flat[:0]
