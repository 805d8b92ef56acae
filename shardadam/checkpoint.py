# SPDX-License-Identifier: Apache-2.0
"""The state of an optimizer as torch's dict of tensors: this rank's part of it, and back."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from copy import deepcopy
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
        copies += _copies_of_member(
            member, state[member.parameter], saved.get(id(member.parameter), {}), is_part=found is not None
        )
    for target, source in copies:
        if isinstance(source, Tensor):
            target.copy_(source)
        else:
            target.fill_(source)
    for group, saved_group in zip(param_groups, saved_groups, strict=True):
        group.update(
            {
                key: deepcopy(value)
                for key, value in saved_group.items()
                if key not in ("params", "decoupled_weight_decay")
            }
        )


def _copies_of_member(
    member: Member, state: Mapping[str, Tensor], saved: Mapping[str, Any], *, is_part: bool
) -> list[tuple[Tensor, Tensor | float]]:
    """Pairs of a view and what it must become; a parameter that ``saved`` has nothing of starts anew.

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
    copies: list[tuple[Tensor, Tensor | float]] = [(state["step"], float(saved.get("step", 0.0)))]
    for name in SHARDED_STATE:
        if name not in state:
            continue
        target = state[name]
        if name not in saved and name == "master":
            copies.append((target, _own_elements(member, member.parameter.detach())))
        elif name not in saved:
            copies.append((target, 0.0))
        else:
            expected = target.shape if is_part else member.parameter.shape
            if saved[name].shape != expected:
                raise ValueError(
                    f"Parameter {member.name!r}: {name} has shape {tuple(saved[name].shape)} in state_dict, expected "
                    f"{tuple(expected)}."
                )
            copies.append((target, saved[name] if is_part else _own_elements(member, saved[name])))
    return copies


def _own_elements(member: Member, whole: Tensor) -> Tensor:
    """This rank's elements of a tensor of the parameter's shape."""
    flat = memory_order(whole, member.parameter)
    spans = [flat[span.start : span.start + span.numel] for span in member.spans]
    return torch.cat(spans) if spans else flat[:0]
