# SPDX-License-Identifier: Apache-2.0
"""A hyperparameter that is a tensor stays the same tensor: a captured CUDA graph reads it at its address. Loading and
joining write their values into it, as schedulers do.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.optim import lr_scheduler

import shardadam
from shardadam import ShardedAdamW
from shardadam.engine.updating import Updater
from tests.ranks import on_ranks, rank_and_size

LOADED_LR = 0.25


def build(lrs: list[Any], **options: Any) -> ShardedAdamW:
    groups = [{"params": [nn.Parameter(torch.ones(5) * index)], "lr": lr} for index, lr in enumerate(lrs)]
    return ShardedAdamW(groups, **options)


def step(optimizer: ShardedAdamW) -> None:
    for group in optimizer.param_groups:
        sum(parameter.sum() for parameter in group["params"]).backward()
    optimizer.step()


def load(how: str, source: ShardedAdamW, target: ShardedAdamW, directory: Path) -> None:
    if how == "load_state_dict":
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    elif how == "whole":
        target.load_state_dict(source.full_state_dict())
    else:
        for optimizer in (source, target):
            for index, group in enumerate(optimizer.param_groups):
                group["param_names"] = [f"p{index}"]
        shardadam.save(directory, step=1, optimizer=source)
        shardadam.load(directory, optimizer=target)


@pytest.mark.parametrize("how", ["load_state_dict", "whole", "checkpoint"])
@pytest.mark.parametrize("saved", [LOADED_LR, torch.tensor(LOADED_LR), torch.tensor([LOADED_LR], dtype=torch.float64)])
def test_a_load_writes_into_the_tensor(how: str, saved: Any, tmp_path: Path) -> None:
    lr = torch.tensor(0.1)
    target = build([lr])
    load(how, build([saved]), target, tmp_path)
    assert target.param_groups[0]["lr"] is lr and lr.dtype == torch.float32 and lr.shape == () and lr == LOADED_LR


def test_a_load_writes_into_every_tensor_also_a_schedulers() -> None:
    """OneCycleLR and LRScheduler keep tensors of their own in the group."""

    def scheduled() -> tuple[ShardedAdamW, lr_scheduler.LRScheduler]:
        optimizer = build([torch.tensor(0.1)], weight_decay=torch.tensor(0.3), eps=torch.tensor(1e-3))
        return optimizer, lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)

    source, schedule = scheduled()
    target, _ = scheduled()
    with_tensors = {key: value for key, value in target.param_groups[0].items() if isinstance(value, Tensor)}
    assert with_tensors.keys() >= {"lr", "weight_decay", "eps"}
    for _ in range(3):
        step(source)
        schedule.step()
    source.param_groups[0]["weight_decay"] = 0.7
    target.load_state_dict(source.state_dict())
    for key, tensor in with_tensors.items():
        assert target.param_groups[0][key] is tensor
        torch.testing.assert_close(float(tensor), float(source.param_groups[0][key]))


def test_a_scheduler_goes_on_in_the_tensor_after_a_load() -> None:
    lr = torch.tensor(1.0)
    target = build([lr])
    schedule = lr_scheduler.ExponentialLR(target, 0.5)
    target.load_state_dict(build([0.25]).state_dict())
    step(target)
    schedule.step()
    assert target.param_groups[0]["lr"] is lr and lr == 0.125


@pytest.mark.parametrize(("second", "stays_shared"), [(LOADED_LR, True), (0.5, False)])
def test_groups_that_share_a_tensor_get_values_of_their_own(second: float, stays_shared: bool) -> None:
    """torch lets all groups share the default ``lr``; a load into one wrote into all."""
    lr = torch.tensor(0.1)
    parameters = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    target = ShardedAdamW([{"params": [parameter]} for parameter in parameters], lr=lr)
    target.load_state_dict(build([LOADED_LR, second]).state_dict())
    found = [group["lr"] for group in target.param_groups]
    assert found[0] is lr and found == [LOADED_LR, second] and (found[1] is lr) == stays_shared


@pytest.mark.parametrize("value", [0.25, 0, torch.tensor(0.25).double()])
def test_numbers_of_every_kind_are_written(value: Any) -> None:
    target = build([torch.tensor(0.1)])
    saved = target.state_dict()
    saved["param_groups"][0]["lr"] = value
    lr = target.param_groups[0]["lr"]
    target.load_state_dict(saved)
    assert target.param_groups[0]["lr"] is lr and lr == float(value)


def test_what_the_tensor_cannot_hold_replaces_it() -> None:
    """Values of a key of the user's: another shape, a fraction in a tensor of integers, or no number at all."""
    target = build([0.1])
    group = target.param_groups[0]
    for before, value in (
        (torch.tensor(0.1), torch.tensor([1.0, 2.0])),
        (torch.tensor(1), 0.5),
        (torch.tensor(1), torch.tensor(0.5)),
        (torch.tensor(0.1), None),
        (torch.tensor([1.0, 2.0]), 3.0),
    ):
        group["mine"] = before
        saved = target.state_dict()
        saved["param_groups"][0]["mine"] = value
        target.load_state_dict(saved)
        assert type(group["mine"]) is type(value) and repr(group["mine"]) == repr(value)
        assert group["mine"] is not before and (value is None or float(torch.as_tensor(before).sum()) != 3.5)


def test_a_float_stays_a_float_and_becomes_the_saved_tensor_as_in_torch() -> None:
    sharded, plain = build([0.1]), torch.optim.AdamW([nn.Parameter(torch.ones(5))], lr=0.1)
    for value in (0.5, torch.tensor(0.5)):
        for optimizer in (sharded, plain):
            saved = copy.deepcopy(optimizer.state_dict())
            saved["param_groups"][0]["lr"] = value
            optimizer.load_state_dict(saved)
        assert type(sharded.param_groups[0]["lr"]) is type(plain.param_groups[0]["lr"]) is type(value)


def join_with_a_tensor() -> tuple[bool, float]:
    rank, _ = rank_and_size()
    parameter = nn.Parameter(torch.ones(5))
    lr = torch.tensor(0.5)
    optimizer = ShardedAdamW([parameter], lr=lr)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    with Join([optimizer]):
        for _ in range(1 + 2 * rank):
            parameter.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return optimizer.param_groups[0]["lr"] is lr, float(lr)


def test_a_rank_without_batches_writes_into_its_tensor() -> None:
    assert on_ranks(2, join_with_a_tensor) == [(True, 0.0625)] * 2


def test_a_tensor_of_more_elements_is_refused_by_its_shape_and_the_next_step_goes_on() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    lr = torch.tensor(0.1)
    optimizer = ShardedAdamW([parameter], lr=lr)
    parameter.sum().backward()
    optimizer.param_groups[0]["lr"] = torch.ones(30, 40)
    found = r"lr: found a tensor of shape \(30, 40\), torch\.float32, expected a number, or a tensor of one\. Nothing"
    with pytest.raises(TypeError, match=found):
        optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(3))


def test_the_copy_of_a_learning_rate_on_a_device_follows_one_of_another_shape() -> None:
    """A 0-dim tensor on a GPU that was replaced by one of shape (1,) failed half-way through the step."""
    updater = Updater(None, None)
    for shape in ((), (1,), (1, 1), ()):
        copied = updater._copied(torch.empty(shape, device="meta"), 0)
        assert isinstance(copied, torch.Tensor) and copied.shape == ()
