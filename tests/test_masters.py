# SPDX-License-Identifier: Apache-2.0
"""Masters are exact in any order of loading the model and the optimizer, and follow writes to parameters from outside.

Split masters once lost their low bits when the optimizer was loaded before the model, and a float32 master told its old
value until the next step after a write to its parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

import shardadam
from shardadam import Precision, ShardedAdamW
from tests.ranks import on_ranks

FORMATS = [(torch.bfloat16, "split"), (torch.bfloat16, "fp32"), (torch.float16, "split"), (torch.float16, "fp32")]
every_format = pytest.mark.parametrize(("dtype", "master"), FORMATS, ids=str)


class Net(nn.Module):
    """Parameters that span several buckets, one in channels_last, one empty."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {"matrix": (40, 17), "image": (4, 3, 5, 2), "scalar": (), "empty": (0, 3)}.items():
            value = 1 + torch.rand(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(value.to(dtype)))
        self.image.data = self.image.data.to(memory_format=torch.channels_last)


def build(dtype: torch.dtype, master: Any, seed: int = 0) -> tuple[Net, ShardedAdamW]:
    model = Net(dtype, seed)
    return model, ShardedAdamW(
        model.named_parameters(), lr=1e-2, bucket_mb=0.002, precision=Precision(master=master, reduce=torch.float32)
    )


def train(model: Net, optimizer: ShardedAdamW, steps: range) -> None:
    for step in steps:
        for index, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + index))
            (parameter.float() * noise).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def masters(model: Net, optimizer: ShardedAdamW) -> list[Tensor]:
    return [optimizer.full_state(p)["master"] for p in model.parameters()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def values(model: Net) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# Orders of loading


def whole(model: Net, optimizer: ShardedAdamW) -> Callable[[Net, ShardedAdamW], None]:
    saved = optimizer.full_state_dict(all_ranks=True)
    return lambda again, other: other.load_state_dict(saved)


def own_part(model: Net, optimizer: ShardedAdamW) -> Callable[[Net, ShardedAdamW], None]:
    saved = copy.deepcopy(optimizer.state_dict())
    return lambda again, other: other.load_state_dict(saved)


def by_name(model: Net, optimizer: ShardedAdamW) -> Callable[[Net, ShardedAdamW], None]:
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    return lambda again, other: set_optimizer_state_dict(again, other, saved)


def assigned(model: Net, optimizer: ShardedAdamW) -> Callable[[Net, ShardedAdamW], None]:
    saved = optimizer.full_state_dict(all_ranks=True)["state"]

    def load(again: Net, other: ShardedAdamW) -> None:
        for index, parameter in enumerate(again.parameters()):
            other.state[parameter] = saved[index]

    return load


WAYS = (whole, own_part, by_name, assigned)


def load_in_order(dtype: torch.dtype, master: str, way: Callable[..., Any], order: str) -> list[bool]:
    model, optimizer = build(dtype, master)
    train(model, optimizer, range(3))
    load_optimizer, saved_model = way(model, optimizer), copy.deepcopy(get_model_state_dict(model))
    right = masters(model, optimizer)
    rounded = all(torch.equal(m, m.to(dtype).float()) for m in right)

    again, other = build(dtype, master, seed=1)
    train(again, other, range(10, 11))
    for what in order:
        if what == "m":
            set_model_state_dict(again, saved_model)
        elif what == "o":
            load_optimizer(again, other)
        else:  # a look at the state in between must not settle anything
            masters(again, other)
            other.state_dict()
            assert all(other.state[p]["master"].numel() >= 0 for p in again.parameters())
    found = [not rounded, equal(masters(again, other), right)]
    train(model, optimizer, range(3, 4))
    train(again, other, range(3, 4))
    return [*found, equal(masters(again, other), masters(model, optimizer)), equal(values(again), values(model))]


@pytest.mark.sweep(12)
@every_format
@pytest.mark.parametrize("order", ["mo", "om", "ovm", "mov", "omo"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_masters_are_exact_in_every_order_of_loading(
    world_size: int, way: Callable[..., Any], order: str, dtype: torch.dtype, master: str
) -> None:
    for found in on_ranks(world_size, load_in_order, dtype, master, way, order):
        assert found == [True] * 4


def load_files_without_the_model(directory: str, dtype: torch.dtype, master: str) -> list[bool]:
    model, optimizer = build(dtype, master)
    train(model, optimizer, range(3))
    shardadam.save(directory, step=3, model=model, optimizer=optimizer)
    right, saved_model = masters(model, optimizer), copy.deepcopy(model.state_dict())
    again, other = build(dtype, master, seed=1)
    shardadam.load(directory, optimizer=other)
    waits = bool(other.memory().master > optimizer.memory().master)
    again.load_state_dict(saved_model)
    found = [waits == (master == "split"), equal(masters(again, other), right)]
    train(again, other, range(3, 4))
    return [*found, other.memory().master == optimizer.memory().master]


@every_format
def test_files_of_the_optimizer_may_be_loaded_before_the_model(dtype: torch.dtype, master: str, tmp_path: Path) -> None:
    for found in on_ranks(2, load_files_without_the_model, str(tmp_path), dtype, master):
        assert found == [True] * 3


def write_after_a_load(dtype: torch.dtype, master: str, look: bool) -> list[bool]:
    """After both loads, the user writes half of a parameter by hand."""
    model, optimizer = build(dtype, master)
    train(model, optimizer, range(3))
    saved, saved_model, right = whole(model, optimizer), copy.deepcopy(model.state_dict()), masters(model, optimizer)
    again, other = build(dtype, master, seed=1)
    saved(again, other)
    again.load_state_dict(saved_model)
    if look:
        masters(again, other)
    with torch.no_grad():
        again.matrix[:20] = -3.25
    found = masters(again, other)[0]
    unit = torch.finfo(dtype).eps * 4
    result = [torch.equal(found[20:], right[0][20:]), bool(((found[:20] + 3.25).abs() <= unit / 2).all())]
    other.param_groups[0].update(lr=0.0, weight_decay=0.0)
    train(again, other, range(3, 4))
    return [*result, equal(masters(again, other)[:1], [found]), bool((again.matrix[:20] == -3.25).all())]


@pytest.mark.parametrize("look", [False, True])
@every_format
def test_a_write_after_both_loads_is_respected(dtype: torch.dtype, master: str, look: bool) -> None:
    for found in on_ranks(2, write_after_a_load, dtype, master, look):
        assert found == [True] * 4


# Writes from outside


def write(model: Net, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def replace_data(model: Net, value: float) -> None:
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, value)


def copy_back(model: Net, weights: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)


def in_state_dict(model: Net, optimizer: ShardedAdamW) -> list[Tensor]:
    entries = optimizer.state_dict()["state"].values()
    return [getattr(entry["master"], "local", entry["master"]) for entry in entries]


LOOKS: dict[str, Callable[[Net, ShardedAdamW], list[Tensor]]] = {
    "full_state": masters,
    "full_state_dict": lambda _, o: [e["master"] for e in o.full_state_dict(all_ranks=True)["state"].values()],
    "state_dict": in_state_dict,
}
LOOKS_AT_FP32 = LOOKS | {  # with split masters, optimizer.state holds remainders
    "state": lambda model, o: [o.state[p]["master"] for p in model.parameters()],
    "get": lambda model, o: [o.state[p].get("master") for p in model.parameters()],
    "items": lambda model, o: [dict(o.state[p].items())["master"] for p in model.parameters()],
    "copy": lambda model, o: [{**o.state[p]}["master"] for p in model.parameters()],
    "deepcopy": lambda model, o: [entry["master"] for entry in copy.deepcopy(o.state).values()],
}


def look_at_written(dtype: torch.dtype, master: str, how: Callable[..., None], directory: str) -> tuple[Any, bool]:
    """Return how far masters are from what was written, in units of the last place, as each way to look tells; and
    whether they are the old ones when the old values are back.
    """
    model, optimizer = build(dtype, master)
    train(model, optimizer, range(3))
    before, weights = masters(model, optimizer), values(model)
    found = {}

    def compare(name: str, seen: list[Tensor], value: float) -> None:
        unit = torch.finfo(dtype).eps * 2  # of values from 2 to 4
        found[name] = max([0.0, *(float((t.float() - value).abs().max()) / unit for t in seen if t.numel())])

    for index, (name, look) in enumerate((LOOKS_AT_FP32 if master == "fp32" else LOOKS).items()):
        value = 2.5 + index / 8
        how(model, value)
        compare(name, look(model, optimizer), value)
    how(model, 3.75)
    shardadam.save(directory, step=1, model=model, optimizer=optimizer)
    again, other = build(dtype, master, seed=1)
    shardadam.load(directory, model=again, optimizer=other)
    compare("file", masters(again, other), 3.75)
    copy_back(model, weights)
    return found, equal(masters(model, optimizer), before)


@pytest.mark.parametrize("how", [write, replace_data])
@every_format
def test_the_state_tells_what_was_written_and_the_old_masters_when_the_values_are_back(
    dtype: torch.dtype, master: str, how: Callable[..., None], tmp_path: Path
) -> None:
    """Averages of weights may be swapped in, saved, and out again."""
    for found, restored in on_ranks(2, look_at_written, dtype, master, how, str(tmp_path)):
        assert max(found.values()) <= 0.5, found
        assert restored


def train_with_averages(dtype: torch.dtype, master: str, look: str) -> tuple[list[Tensor], list[Tensor]]:
    """Unless ``look`` is empty, swap averages in and out between steps, and look at the state meanwhile."""
    model, optimizer = build(dtype, master)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        weights = values(model)
        if look:
            write(model, 3.0)
        if look == "state_dict":
            optimizer.state_dict()
        elif look == "state":
            assert all(optimizer.state[p]["master"].numel() >= 0 for p in model.parameters())
        copy_back(model, weights)
    return masters(model, optimizer), values(model)


@pytest.mark.parametrize("look", ["nothing", "state_dict", "state"])
@every_format
def test_looking_at_the_state_between_a_swap_and_its_end_changes_nothing(
    dtype: torch.dtype, master: str, look: str
) -> None:
    expected, found = train_with_averages(dtype, master, ""), train_with_averages(dtype, master, look)
    assert equal(expected[0], found[0]) and equal(expected[1], found[1])


def look_on_one_replica(dtype: torch.dtype, master: str) -> bool:
    model = Net(dtype)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard"))
    optimizer = ShardedAdamW(model.parameters(), process_group=mesh, precision=Precision(master=master))  # type: ignore[arg-type]
    train(model, optimizer, range(2))
    weights = values(model)
    write(model, 3.0)
    if dist.get_rank() == 0:
        optimizer.state_dict()
    optimizer.check_in_sync()
    copy_back(model, weights)
    optimizer.check_in_sync()
    return True


@every_format
def test_replicas_stay_in_sync_where_one_has_looked_at_the_state(dtype: torch.dtype, master: str) -> None:
    assert on_ranks(2, look_on_one_replica, dtype, master) == [True, True]
