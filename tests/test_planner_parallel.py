# SPDX-License-Identifier: Apache-2.0
"""A plan of what each rank holds equals ``optimizer.memory()`` byte for byte with tensor and expert parallelism."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from shardadam import Precision, ShardedAdamW
from shardadam.planner import PlannedParameter, Setting, plan
from shardadam.state.memory import Memory
from tests.ranks import on_ranks

Dtypes = tuple[torch.dtype, ...]
DTYPES: tuple[Dtypes, ...] = ((torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16))
PLACED: tuple[tuple[tuple[int, ...], Placement | None], ...] = (
    ((301, 40), Shard(0)),  # 151 and 150 rows
    ((64, 33), Shard(1)),
    ((1, 200), Shard(0)),  # the second rank holds nothing
    ((129,), None),
    ((17,), None),
    ((40, 3), Replicate()),
)


def settings(world_size: int) -> list[Setting]:
    """Return settings of every format, mode, transport and bucket size."""
    precisions = [
        Precision(moments=m, master=w) for m, w in itertools.product(("fp32", "int8"), ("auto", "split", "fp32"))
    ]
    return [
        Setting(
            world_size=world_size,
            precision=precision,
            gradient_sync=gradient_sync,  # type: ignore[arg-type]
            update=update,  # type: ignore[arg-type]
            bucket_mb=bucket_mb,
            transport=transport,  # type: ignore[arg-type]
        )
        for precision, (gradient_sync, update), bucket_mb, transport in itertools.product(
            [*precisions, Precision(reduce=torch.float32), Precision(accumulate="fp32")],
            (("backward", "step"), ("step", "step"), ("external", "step"), ("backward", "backward")),
            (0.001, None),
            ("auto", "collective"),
        )
    ]


PARTS = 28


def build(groups: list[dict[str, Any]], setting: Setting, process_group: Any) -> ShardedAdamW:
    return ShardedAdamW(
        groups,
        process_group=process_group,
        precision=setting.precision,
        gradient_sync=setting.gradient_sync,
        update=setting.update,
        bucket_mb=setting.bucket_mb,
        transport=setting.transport,
    )


def after_backward(optimizer: ShardedAdamW, parameters: list[nn.Parameter]) -> tuple[Memory, int, int]:
    """Return the memory after construction; staging and gradient shards after clipping, or updates in backward."""
    built = optimizer.memory()
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    if optimizer._engine.in_backward is None:
        optimizer.clip_grad_norm_(1.0)
    else:
        optimizer.step()
    memory = optimizer.memory()
    return built, memory.staging, memory.gradient_shard


def check(built: Memory, staging: int, gradient_shard: int, parameters: list[Any], setting: Setting) -> None:
    assert built == plan(parameters, setting), setting
    peak = plan(parameters, replace(setting, clips=setting.update == "step"), peak=True)
    assert gradient_shard == peak.gradient_shard, setting
    assert staging >= peak.staging, setting


# Tensor parallelism


def tensor_parallel(dtypes: Dtypes, some: list[Setting]) -> list[tuple[Memory, int, int]]:
    """Return what optimizers over DTensors and plain parameters hold."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = []
    for setting in some:
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "lr": 0.1}]
        for dtype, (index, (shape, placed)) in itertools.product(dtypes, enumerate(PLACED)):
            tensor = torch.zeros(shape, dtype=dtype)
            if placed is not None:
                tensor = distribute_tensor(tensor, mesh["tp"], [placed])
            groups[index % 2]["params"].append(nn.Parameter(tensor, requires_grad=index != 1))
        optimizer = build(groups, setting, mesh["dp"])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found.append(after_backward(optimizer, parameters))
    return found


def held(dtypes: Dtypes, rank: int) -> list[PlannedParameter]:
    """Return what a rank holds of ``PLACED``, written down from the shapes."""
    shapes = {Shard(0): [(151, 40), (150, 40)], Shard(1): [(64, 17), (64, 16)]}
    planned = []
    for dtype, (index, (shape, placed)) in itertools.product(dtypes, enumerate(PLACED)):
        local = shapes[placed][rank] if index < 2 and isinstance(placed, Shard) else shape
        if index == 2 and rank == 1:
            local = (0, 200)
        copies = 1 if isinstance(placed, Shard) else 2
        planned.append(
            PlannedParameter(local, dtype, index % 2, index != 1, copies=copies, is_dtensor=placed is not None)
        )
    return sorted(planned, key=lambda one: one.group)  # as the optimizer lists them


@pytest.mark.sweep(6)
@pytest.mark.parametrize(("dtypes", "part"), [*itertools.product(DTYPES, range(PARTS))])
def test_a_plan_equals_memory_with_tensor_parallelism(dtypes: Dtypes, part: int) -> None:
    some = settings(2)[part::PARTS]
    for rank, of_rank in enumerate(on_ranks(4, tensor_parallel, dtypes, some)):
        for setting, found in zip(some, of_rank, strict=True):
            check(*found, held(dtypes, rank % 2), setting)


def describe_themselves() -> tuple[list[PlannedParameter], Memory, Memory]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parameters = [
        nn.Parameter(
            torch.zeros(shape) if placed is None else distribute_tensor(torch.zeros(shape), mesh["tp"], [placed])
        )
        for shape, placed in PLACED
    ]
    setting = Setting(world_size=2)
    optimizer = build([{"params": parameters}], setting, mesh["dp"])
    described = [PlannedParameter.of(parameter) for parameter in parameters]
    return described, plan(parameters, setting), optimizer.memory()


def test_tensors_describe_what_a_rank_holds() -> None:
    for rank, (described, planned, memory) in enumerate(on_ranks(4, describe_themselves)):
        assert described[0] == PlannedParameter((151 - rank % 2, 40), is_dtensor=True)
        assert described[5] == PlannedParameter((40, 3), copies=2, is_dtensor=True)
        assert planned == memory


# Expert parallelism

DENSE = ((300, 40), (129,), (64, 64))
EXPERTS = ((2, 50, 40), (2, 40, 50), (2, 31))


def expert_parallel(size: int, dtypes: Dtypes, some: list[Setting]) -> list[tuple[Memory, int, int]]:
    """Return what optimizers hold whose experts are the same on every ``size`` ranks, in two param groups."""
    mesh = init_device_mesh("cpu", (4 // size, size), mesh_dim_names=("expert", "same"))
    found = []
    for setting in some:
        dense, experts = (
            [nn.Parameter(torch.zeros(shape, dtype=dtype)) for dtype in dtypes for shape in shapes]
            for shapes in (DENSE, EXPERTS)
        )
        groups = [
            {"params": dense},
            {"params": experts[::2], "process_group": mesh["same"]},
            {"params": experts[1::2], "process_group": mesh["same"]},
        ]
        found.append(after_backward(build(groups, setting, dist.group.WORLD), [*dense, *experts]))
    return found


@pytest.mark.sweep(6)
@pytest.mark.parametrize(("size", "dtypes", "part"), [*itertools.product((1, 2), DTYPES, range(PARTS))])
def test_a_plan_equals_memory_with_expert_parallelism(size: int, dtypes: Dtypes, part: int) -> None:
    some = settings(4)[part::PARTS]
    planned = [PlannedParameter(shape, dtype) for dtype in dtypes for shape in DENSE]
    experts = [PlannedParameter(shape, dtype, expert_parallel=4 // size) for dtype in dtypes for shape in EXPERTS]
    for group, members in ((1, experts[::2]), (2, experts[1::2])):
        planned += [PlannedParameter(one.shape, one.dtype, group, expert_parallel=4 // size) for one in members]
    for of_rank in on_ranks(4, expert_parallel, size, dtypes, some):
        for setting, found in zip(some, of_rank, strict=True):
            check(*found, planned, setting)
