# SPDX-License-Identifier: Apache-2.0
"""Sharded Adam and AdamW equal torch's on averaged gradients, over hyperparameters, shapes, ranks and transports."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardadam import ShardedAdam, ShardedAdamW
from shardadam import transport as transports
from tests.adversarial import AdversarialTransport
from tests.on_cuda import nccl_of_one
from tests.ranks import on_ranks, rank_and_size

SHAPES = ((), (0,), (1,), (7, 15), (129,), (3, 4, 5, 2))
STEPS = 30


@dataclass(frozen=True)
class Case:
    adamw: bool = True
    lr: float = 1e-2
    tensor_lr: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    maximize: bool = False
    gradient_sync: str = "backward"
    bucket_mb: float = 0.001
    accumulate: int = 1
    no_sync: bool = False
    unused: str = "none"  # "none" | "everywhere" | "some ranks" | "changing"
    clip: float | None = None
    two_groups: bool = False
    channels_last: bool = False
    device: str = "cpu"

    @property
    def id(self) -> str:
        changed = [f"{k}={v}" for k, v in self.__dict__.items() if v != Case.__dataclass_fields__[k].default]
        return ",".join(changed) or "default"


def build_parameters(case: Case) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in SHAPES:
        # Of magnitude 1 to 2: near zero, rounding errors would exceed the relative tolerance.
        value = torch.randn(shape, generator=generator).sign() * (1 + torch.rand(shape, generator=generator))
        if case.channels_last and value.dim() == 4:
            value = value.to(memory_format=torch.channels_last)
        parameters.append(nn.Parameter(value.to(case.device)))
    return parameters


def is_used(case: Case, index: int, rank: int, step: int) -> bool:
    match case.unused:
        case "everywhere":
            return index != 3
        case "some ranks":
            return not (index in (3, 4) and rank == index % 2)
        case "changing":
            return random.Random(1000 * step + 10 * index + rank).random() > 0.4
    return True


def loss_of(case: Case, parameters: list[nn.Parameter], rank: int, step: int, micro: int) -> Tensor:
    """Return a loss that depends on rank, step and the parameters in use, and on no others."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * micro + rank)
    total = parameters[0].new_zeros(())
    for index, parameter in enumerate(parameters):
        target = torch.randn(parameter.shape, generator=generator).to(parameter)
        if is_used(case, index, rank, step):
            total = total + ((parameter - target) ** 2 * (index + 1)).sum() + (parameter * target).sum() * 3
    return total


def groups_of(case: Case, parameters: list[nn.Parameter]) -> Any:
    if not case.two_groups:
        return parameters
    return [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": case.lr / 3, "weight_decay": 0.0}]


def lr_of(case: Case) -> float | Tensor:
    return torch.tensor(case.lr) if case.tensor_lr else case.lr


def hyperparameters(case: Case) -> dict[str, Any]:
    return dict(lr=lr_of(case), betas=case.betas, eps=case.eps, weight_decay=case.weight_decay, maximize=case.maximize)


def train_sharded(case: Case, transport: str) -> list[Tensor]:
    rank, _ = rank_and_size()
    parameters = build_parameters(case)
    if rank > 0:  # all ranks must get rank 0's values
        for parameter in parameters:
            parameter.data += rank
    optimizer_class = ShardedAdamW if case.adamw else ShardedAdam
    connected = nccl_of_one() if transport == "nccl" else transports.connect(None)
    optimizer = optimizer_class(
        groups_of(case, parameters),
        **hyperparameters(case),
        gradient_sync=case.gradient_sync,
        bucket_mb=case.bucket_mb,
        transport=AdversarialTransport(connected) if transport == "adversarial" else connected,
    )
    for step in range(STEPS):
        for micro in range(case.accumulate):
            loss = loss_of(case, parameters, rank, step, micro) / case.accumulate
            if not loss.requires_grad:
                continue
            if case.no_sync and micro < case.accumulate - 1:
                with optimizer.no_sync():
                    loss.backward()
            else:
                loss.backward()
        if case.clip is not None:
            optimizer.clip_grad_norm_(case.clip)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().cpu().clone() for parameter in parameters]


def train_torch(case: Case, world_size: int) -> list[Tensor]:
    """Train with torch's optimizer in one process on the averages of all ranks' gradients."""
    parameters = build_parameters(case)
    optimizer_class = torch.optim.AdamW if case.adamw else torch.optim.Adam
    optimizer = optimizer_class(groups_of(case, parameters), **hyperparameters(case))
    for step in range(STEPS):
        for rank, micro in itertools.product(range(world_size), range(case.accumulate)):
            loss = loss_of(case, parameters, rank, step, micro) / case.accumulate / world_size
            if loss.requires_grad:
                loss.backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(parameters, case.clip)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in parameters]


def assert_close(results: list[list[Tensor]], expected: list[Tensor], lr: float) -> None:
    tolerance = {1: 1e-6, 2: 1e-6, 4: 1e-6}.get(len(results), 1e-5)
    for rank, result in enumerate(results):
        for index, (a, b) in enumerate(zip(result, expected, strict=True)):
            assert a.stride() == b.stride()
            excess = (a - b).abs() - tolerance * b.abs().clamp(min=lr)
            assert b.numel() == 0 or excess.max() <= 0, f"rank {rank}, parameter {index}: {(a - b).abs().max()}"
            assert torch.equal(a, results[0][index]), f"ranks 0 and {rank} differ in parameter {index}"


SWEEP = [
    Case(adamw=adamw, tensor_lr=tensor_lr, betas=betas, eps=eps, weight_decay=decay, maximize=maximize, two_groups=two)
    for adamw, tensor_lr, betas, eps, decay, maximize, two in itertools.product(
        (True, False),
        (False, True),
        ((0.9, 0.999), (0.8, 0.95), (0.0, 0.5)),
        (1e-8, 1e-3),
        (0.0, 0.1),
        (False, True),
        (False, True),
    )
]
FEATURES = [
    Case(),
    Case(channels_last=True),
    Case(bucket_mb=32),
    *(
        Case(gradient_sync=sync, unused=unused)
        for sync in ("backward", "step")
        for unused in ("everywhere", "some ranks")
    ),
    *(Case(gradient_sync=sync, unused="changing", two_groups=True) for sync in ("backward", "step")),
    *(
        Case(accumulate=3, no_sync=no_sync, gradient_sync=sync)
        for no_sync in (False, True)
        for sync in ("backward", "step")
    ),
    Case(accumulate=3, unused="some ranks"),
    Case(accumulate=2, no_sync=True, unused="some ranks", clip=0.7),
    *(Case(clip=clip, gradient_sync=sync) for clip in (0.5, 1e6) for sync in ("backward", "step")),
    Case(clip=0.0, adamw=False, weight_decay=0.0),
]


def sample(cases: list[Case], count: int, long: bool) -> list[Case]:
    return cases if long else random.Random(0).sample(cases, count)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "hyper_case" in metafunc.fixturenames:
        cases = sample(SWEEP, 24, metafunc.config.getoption("--long"))
        metafunc.parametrize("hyper_case", cases, ids=lambda case: case.id)


@pytest.mark.sweep(6)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_torch_over_hyperparameters(hyper_case: Case, world_size: int) -> None:
    results = on_ranks(world_size, train_sharded, hyper_case, "collective")
    assert_close(results, train_torch(hyper_case, world_size), hyper_case.lr)


@pytest.mark.sweep(13)
@pytest.mark.parametrize("transport", ["collective", "adversarial"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", FEATURES, ids=lambda case: case.id)
def test_equals_torch_in_every_feature(case: Case, world_size: int, transport: str) -> None:
    if transport == "adversarial" and world_size == 3:
        pytest.skip("2 and 4 ranks show it")
    results = on_ranks(world_size, train_sharded, case, transport)
    assert_close(results, train_torch(case, world_size), case.lr)
