# SPDX-License-Identifier: Apache-2.0
"""The state of an optimizer as torch's dict of tensors: this rank's part of it, and back."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardadam.buckets import Member, memory_order

SHARDED_STATE = ("exp_avg", "exp_avg_sq", "master")
SHARD_KEY = "shard"
"""Where ``state_dict()`` says whose part it is."""


def local_state(member: Member) -> dict[str, Tensor]:
    """What torch keeps in ``optimizer.state[p]``, as views of the arena: sharded tensors hold this rank's elements of
    the parameter, in memory order, in one dimension.
    """
    arena = member.arena
    state = {"step": arena.steps[member.ordinal - arena.members[0].ordinal]}
    for name in SHARDED_STATE:
        flat = getattr(arena, name)
        if flat is not None:
            state[name] = flat[member.state_slice]
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

    copies: list[tuple[Tensor, Tensor | float]] = []
    for member in members:
        copies += _copies_of_member(member, state[member.parameter], saved.get(id(member.parameter), {}))
    for target, source in copies:
        if isinstance(source, Tensor):
            target.copy_(source)
        else:
            target.fill_(source)
    for group, saved_group in zip(param_groups, saved_groups, strict=True):
        group.update({key: value for key, value in saved_group.items() if key not in ("params", "param_names")})


def _copies_of_member(
    member: Member, state: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor | float]]:
    """Pairs of a view and what it must become; a parameter that ``saved`` has nothing of starts anew."""
    if saved.get("max_exp_avg_sq") is not None:
        raise ValueError(f"Parameter {member.name!r}: state_dict comes from amsgrad=True, which is not supported.")
    copies: list[tuple[Tensor, Tensor | float]] = [(state["step"], float(saved.get("step", 0.0)))]
    for name in SHARDED_STATE:
        if name not in state:
            continue
        target = state[name]
        if name not in saved and name == "master":
            copies.append((target, _own_elements(member, member.parameter.detach())))
        elif name not in saved:
            if saved:
                raise ValueError(f"Parameter {member.name!r}: state_dict has no {name!r} for it, only {sorted(saved)}.")
            copies.append((target, 0.0))
        else:
            copies.append((target, _own_elements_checked(member, name, saved[name], target)))
    return copies


def _own_elements_checked(member: Member, name: str, value: Tensor, target: Tensor) -> Tensor:
    if value.shape == member.parameter.shape:
        return _own_elements(member, value)
    if value.shape == target.shape:
        return value
    raise ValueError(
        f"Parameter {member.name!r}: {name} has shape {tuple(value.shape)} in state_dict, expected "
        f"{tuple(member.parameter.shape)} (whole) or {tuple(target.shape)} (this rank's part)."
    )


def _own_elements(member: Member, whole: Tensor) -> Tensor:
    """This rank's elements of a tensor of the parameter's shape."""
    flat = memory_order(whole, member.parameter)
    spans = [flat[span.start : span.start + span.numel] for span in member.spans]
    return torch.cat(spans) if spans else flat[:0]
