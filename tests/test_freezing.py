# SPDX-License-Identifier: Apache-2.0
"""State of parameters that are frozen and unfrozen is kept, or refused by name, in every order of building, freezing,
saving and loading.

It was once dropped without a word when the parameters were frozen while the optimizer was built.
"""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import shardadam
from shardadam import Precision, ShardedAdamW
from tests.ranks import on_ranks

DSD = {
    "by name": StateDictOptions(),
    "not strict": StateDictOptions(strict=False),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
}
WAYS = ("whole", "own part", *DSD, "files")


def build(frozen: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, ShardedAdamW]:
    """``frozen``: "none", "one" weight or "all" parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 4), nn.Linear(4, 40)).to(dtype)
    if frozen != "none":
        (model if frozen == "all" else model[1].weight).requires_grad_(False)
    precision = Precision(reduce=torch.float32)
    return model, ShardedAdamW(model.named_parameters(), lr=1e-2, bucket_mb=0.0003, precision=precision)


def step(model: nn.Module, optimizer: ShardedAdamW) -> None:
    sum((p.float() ** 2).sum() for p in model.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()


def move(way: str, source: tuple[nn.Module, ShardedAdamW], target: tuple[nn.Module, ShardedAdamW], to: str) -> None:
    """Save the state of ``source`` and load it into ``target``."""
    (model, optimizer), (other_model, other) = source, target
    if way == "whole":
        other.load_state_dict(optimizer.full_state_dict(all_ranks=True))
    elif way == "own part":
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "files":
        shardadam.save(to, step=1, model=model, optimizer=optimizer)
        shardadam.load(to, model=other_model, optimizer=other)
    else:
        no_dist = not dist.is_initialized()
        saved = {"o": get_optimizer_state_dict(model, optimizer, options=DSD[way])}
        dcp.save(saved, checkpoint_id=to, no_dist=no_dist)
        found = {"o": get_optimizer_state_dict(other_model, other, options=DSD[way])}
        dcp.load(found, checkpoint_id=to, no_dist=no_dist)
        set_optimizer_state_dict(other_model, other, found["o"], options=DSD[way])


def same(one: tuple[nn.Module, ShardedAdamW], other: tuple[nn.Module, ShardedAdamW]) -> bool:
    """Whether all trainable parameters and their whole state are equal, bit for bit. Collective."""
    equal = True
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        mine, theirs = one[1].full_state(p), other[1].full_state(q)
        equal &= torch.equal(p, q) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    return equal


def resume(way: str, built: str, again: str, dtype: torch.dtype, to: str) -> tuple[bool, float, bool]:
    """Unfreeze in a first run; then build a second one frozen or not, unfreeze and load."""
    first = build(built, dtype)
    if built != "all":
        step(*first)
    first[0].requires_grad_(True)
    step(*first)
    step(*first)
    second = build(again, dtype)
    second[0].load_state_dict(first[0].state_dict())
    second[0].requires_grad_(True)
    move(way, first, second, to)
    loaded = same(first, second)
    step(*first)
    step(*second)
    return loaded, float(second[1].full_state(second[0][1].weight)["step"]), same(first, second)


@pytest.mark.sweep(14)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("way", "built", "again"),
    [
        (way, built, again)
        for way, built, again in product(WAYS, ("none", "one", "all"), ("one", "all"))
        if way != "own part" or built == again  # else ranks hold other elements
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_state_loads_into_what_was_frozen_at_the_build_and_is_trainable_now(
    world_size: int, way: str, built: str, again: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    for loaded, steps, continued in on_ranks(world_size, resume, way, built, again, dtype, str(tmp_path)):
        assert loaded and continued
        assert steps == (4.0 if built == "none" else 3.0)


def load_a_dict_of_torch(way: str) -> bool:
    first = build("none")
    step(*first)
    torchs = copy.deepcopy(first[0])
    plain = torch.optim.AdamW(torchs.parameters(), lr=1e-2)
    plain.load_state_dict(first[1].full_state_dict(all_ranks=True))
    saved = get_optimizer_state_dict(torchs, plain, options=DSD[way])
    second = build("one")
    second[0].load_state_dict(first[0].state_dict())
    second[0].requires_grad_(True)
    set_optimizer_state_dict(*second, saved, options=DSD[way])
    step(*first)
    step(*second)
    return same(first, second)


@pytest.mark.parametrize("way", DSD)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_dict_of_torch_loads_into_what_was_frozen_at_the_build(world_size: int, way: str) -> None:
    assert all(on_ranks(world_size, load_a_dict_of_torch, way))


def load_into_frozen(way: str, to: str) -> tuple[str, bool]:
    """Load into a run in which the weight is still frozen."""
    first, second = build("none"), build("one")
    step(*first)
    before = copy.deepcopy(second[1].full_state_dict(all_ranks=True)["state"])
    try:
        move(way, first, second, to)
    except (ValueError, RuntimeError) as error:
        after = second[1].full_state_dict(all_ranks=True)["state"]
        same = all(torch.equal(before[i][name], after[i][name]) for i in before for name in before[i])
        return str(error), same
    return "nothing", False


@pytest.mark.parametrize("way", ["whole", "own part", "files"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_state_of_what_is_frozen_now_is_refused_by_name(world_size: int, way: str, tmp_path: Path) -> None:
    for message, unchanged in on_ranks(world_size, load_into_frozen, way, str(tmp_path)):
        assert "has state of parameters that are frozen here: " in message and "1.weight" in message
        assert "Set requires_grad on them before loading" in message and unchanged


def freeze_after_the_build(way: str, unfrozen_first: bool, to: str) -> tuple[bool, bool]:
    """The weight is trainable at the build, and frozen while the state is saved and loaded."""
    first, second = build("none"), build("one" if unfrozen_first else "none")
    step(*first)
    second[0].load_state_dict(first[0].state_dict())
    if unfrozen_first:
        second[0].requires_grad_(True)
        step(*second)
        second[0].load_state_dict(first[0].state_dict())
    for model, _ in (first, second):
        model[1].weight.requires_grad_(False)
    move(way, first, second, to)
    loaded = same(first, second)
    for run in (first, second):
        step(*run)
        run[0].requires_grad_(True)
        step(*run)
    return loaded, same(first, second)


@pytest.mark.sweep(5)
@pytest.mark.parametrize(
    ("way", "unfrozen_first"), [(way, late) for way in WAYS for late in (False, True) if not late or way != "own part"]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_frozen_after_the_build_keeps_its_state_through_a_load(
    world_size: int, way: str, unfrozen_first: bool, tmp_path: Path
) -> None:
    """torch's set_optimizer_state_dict leaves out frozen parameters; their state was then reset."""
    for loaded, continued in on_ranks(world_size, freeze_after_the_build, way, unfrozen_first, str(tmp_path)):
        assert loaded and continued


def assign_while_frozen() -> tuple[bool, str]:
    first, second = build("none"), build("one")
    step(*first)
    second[0].load_state_dict(first[0].state_dict())
    whole = first[1].full_state_dict(all_ranks=True)["state"]
    for index, parameter in enumerate(second[0].parameters()):
        second[1].state[parameter] = whole[index]
    second[0].requires_grad_(True)
    assigned = same(first, second)
    third = build("one")
    third[1].state[third[0][1].weight] = {"exp_avg_sq_max": torch.zeros(40, 4)}
    third[0].requires_grad_(True)
    try:
        step(*third)
    except ValueError as error:
        return assigned, str(error)
    return assigned, "nothing"


def test_state_assigned_to_a_frozen_parameter_is_used_once_it_is_trainable() -> None:
    for assigned, message in on_ranks(2, assign_while_frozen):
        assert assigned
        assert "'exp_avg_sq_max' of parameter '1.weight' can be neither added nor removed" in message


def before_the_first_step(built: str) -> list[Any]:
    model, optimizer = build(built)
    entries = sorted(optimizer.state_dict()["state"])
    model.requires_grad_(True)
    get_optimizer_state_dict(model, optimizer)  # takes a step with zero gradients if the state is empty
    state = optimizer.full_state_dict(all_ranks=True)["state"]
    return [entries, sorted(state), any(bool(t.any()) for entry in state.values() for t in entry.values())]


@pytest.mark.parametrize(("built", "trainable"), [("one", [0, 1, 3]), ("all", [])])
@pytest.mark.parametrize("world_size", [1, 2])
def test_before_the_first_step_every_trainable_parameter_has_zeros(
    world_size: int, built: str, trainable: list[int]
) -> None:
    for entries, later, not_zero in on_ranks(world_size, before_the_first_step, built):
        assert entries == trainable and later == [0, 1, 2, 3] and not not_zero


def whole_on_every_rank() -> tuple[Any, Any, bool]:
    model, optimizer = build("none", torch.bfloat16)
    step(model, optimizer)
    whole, on_first = optimizer.full_state_dict(all_ranks=True), optimizer.full_state_dict()
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(whole)
    return whole, on_first, all(type(t) is torch.Tensor for e in whole["state"].values() for t in e.values())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_whole_state_on_every_rank_is_that_on_the_first(world_size: int) -> None:
    results = on_ranks(world_size, whole_on_every_rank)
    first = results[0][1]
    for rank, (whole, on_first, plain) in enumerate(results):
        assert plain and (rank == 0) == bool(on_first)
        assert whole["param_groups"] == first["param_groups"]
        for index, entry in first["state"].items():
            assert all(torch.equal(entry[name], whole["state"][index][name]) for name in entry)
