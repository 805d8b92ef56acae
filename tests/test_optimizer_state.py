# SPDX-License-Identifier: Apache-2.0
"""Writes to ``optimizer.state`` act as in torch, or are refused by name.

Emptying Adam's state between phases of training is a common idiom. Here it was once silently ignored.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardadam import Precision, ShardedAdamW
from tests.ranks import on_ranks, rank_and_size

SHAPES = ((40, 7), (3,), (260,))
FORMATS: dict[str, tuple[torch.dtype, Precision]] = {
    "fp32": (torch.float32, Precision()),
    "fp32, int8": (torch.float32, Precision(moments="int8")),
    "bf16, split": (torch.bfloat16, Precision()),
    "bf16, master, bf16": (torch.bfloat16, Precision(moments="bf16", master="fp32")),
}


def build_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def train(optimizer: Any, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + index)
            weight = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            (parameter * weight).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def clear(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    optimizer.state.clear()


def replace(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    optimizer.state = defaultdict(dict)


def empty_one(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    optimizer.state[parameters[0]] = {}


def delete_one(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    del optimizer.state[parameters[1]]


def pop_one(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    assert float(optimizer.state.pop(parameters[2])["step"]) == 3
    assert optimizer.state.pop(torch.zeros(1), "absent") == "absent"


def clear_one(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    if isinstance(optimizer, ShardedAdamW):
        optimizer.state[parameters[0]].clear()
    else:
        optimizer.state[parameters[0]] = {}  # torch needs all keys in a dict that is not empty


def update(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    optimizer.state.update({parameters[0]: {}, parameters[2]: {}})


def set_state(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    optimizer.__setstate__({"state": defaultdict(dict)})


RESETS = (set_state, clear, replace, empty_one, delete_one, pop_one, clear_one, update)


def reset_in_both(reset: Callable[..., None]) -> tuple[list[Tensor], list[Tensor]]:
    ours, theirs = build_parameters(), build_parameters()
    optimizers = ShardedAdamW(ours, lr=0.1, bucket_mb=0.001), torch.optim.AdamW(theirs, lr=0.1)
    for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
        train(optimizer, parameters, range(3))
        reset(optimizer, parameters)
        train(optimizer, parameters, range(3, 6))
    return [p.detach() for p in ours], [p.detach() for p in theirs]


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_emptied_state_restarts_from_zero_as_in_torch(reset: Callable[..., None], world_size: int) -> None:
    for ours, theirs in on_ranks(world_size, reset_in_both, reset):
        for mine, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)


def assign_in_both(name: str) -> tuple[list[Tensor], list[Tensor]]:
    ours, theirs = build_parameters(), build_parameters()
    optimizers = ShardedAdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for optimizer, parameters in zip(optimizers, (ours, theirs), strict=True):
        train(optimizer, parameters, range(2))
        for index, parameter in enumerate(parameters):
            if name == "step":
                optimizer.state[parameter]["step"] = torch.tensor(7.0 + index)
            elif name == "step in place":
                optimizer.state[parameter]["step"].fill_(7.0 + index)
            elif name.endswith(".data"):
                entry = optimizer.state[parameter][name.removesuffix(".data")]
                entry.data = torch.full(entry.shape, 0.25)
            else:
                optimizer.state[parameter][name] = torch.full(parameter.shape, 0.25)  # the parameter's shape
        train(optimizer, parameters, range(2, 4))
    return [p.detach() for p in ours], [p.detach() for p in theirs]


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step", "step in place", "exp_avg_sq.data"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_assigned_entries_are_used_as_in_torch(name: str, world_size: int) -> None:
    """Parameters with different step counts need separate kernel calls."""
    for ours, theirs in on_ranks(world_size, assign_in_both, name):
        for mine, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)


def put_a_copy_back(form: str) -> bool:
    dtype, precision = FORMATS[form]
    parameters = build_parameters(dtype)
    optimizer = ShardedAdamW(parameters, lr=0.1, precision=precision)
    train(optimizer, parameters, range(3))
    kept = {p: copy.deepcopy(entry) for p, entry in optimizer.state.items()}
    weights = [p.detach().clone() for p in parameters]
    train(optimizer, parameters, range(3, 5))
    right = [p.detach().clone() for p in parameters]

    optimizer.state.clear()
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    optimizer.state = kept
    assert all(type(entry) is dict for entry in kept.values())
    train(optimizer, parameters, range(3, 5))
    return all(torch.equal(p, expected) for p, expected in zip(parameters, right, strict=True))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_copy_of_the_state_can_be_restored_bit_for_bit(form: str, world_size: int) -> None:
    assert all(on_ranks(world_size, put_a_copy_back, form))


def test_emptying_the_state_keeps_exact_masters() -> None:
    parameters = build_parameters(torch.bfloat16)
    optimizer = ShardedAdamW(parameters, lr=1e-4)
    train(optimizer, parameters, range(3))
    before = [optimizer.full_state(p)["master"] for p in parameters]
    optimizer.state.clear()
    after = [optimizer.full_state(p) for p in parameters]
    for master, state in zip(before, after, strict=True):
        assert torch.equal(master, state["master"]) and not torch.equal(master, master.bfloat16().float())
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any() and not state["step"]


WRONG: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "shape": (lambda state, p: state[p].__setitem__("exp_avg", torch.zeros(5)), r"'exp_avg'.*found.*\(5,\).*expected"),
    "dtype": (lambda state, p: state[p].__setitem__("exp_avg", torch.zeros(280, dtype=torch.int64)), "int64.*expected"),
    "name": (lambda state, p: state[p].__setitem__("max_exp_avg_sq", torch.zeros(40, 7)), "max_exp_avg_sq.*neither"),
    "deletion": (lambda state, p: state[p].__delitem__("step"), "'step'.*neither added nor removed"),
    "pop": (lambda state, p: state[p].pop("exp_avg"), "'exp_avg'.*neither added nor removed"),
    "half": (lambda state, p: state.__setitem__(p, {"step": 9.0, "exp_avg": torch.zeros(5)}), "exp_avg.*found"),
    "all": (lambda state, p: state.popitem(), "clear"),
}


@pytest.mark.parametrize("how", WRONG)
def test_invalid_assignments_are_refused_by_name_and_change_nothing(how: str) -> None:
    parameters = build_parameters()
    optimizer = ShardedAdamW(parameters)
    train(optimizer, parameters, range(2))
    before = {p: copy.deepcopy(entry) for p, entry in optimizer.state.items()}
    write, message = WRONG[how]
    with pytest.raises(ValueError, match=message):
        write(optimizer.state, parameters[0])
    for parameter, entry in before.items():
        assert all(torch.equal(tensor, optimizer.state[parameter][name]) for name, tensor in entry.items())


def test_entries_of_other_parameters_are_an_ordinary_dict() -> None:
    frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    optimizer = ShardedAdamW([*build_parameters(), frozen])
    assert frozen not in optimizer.state and optimizer.state[frozen] == {}
    optimizer.state[frozen]["mine"] = 3
    assert optimizer.state.pop(frozen) == {"mine": 3} and frozen not in optimizer.state
    assert rank_and_size() == (0, 1)
