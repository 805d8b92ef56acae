# SPDX-License-Identifier: Apache-2.0
"""Every learning-rate scheduler of torch works with the sharded optimizer as with torch's."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler, swa_utils

from tests.parity import LR, Implementation, assert_close, build_parameters, clones, quadratic, run_sharded, run_torch
from tests.ranks import on_ranks

STEPS = 30

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + 0.1 * step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=7, gamma=0.3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[4, 11, 20], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=12),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=25, power=1.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=12, eta_min=LR / 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5, T_mult=2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=LR / 5, max_lr=LR, step_size_up=6, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=LR, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=8), lr_scheduler.CosineAnnealingLR(o, T_max=20)],
        milestones=[8],
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.2, total_iters=5), lr_scheduler.ExponentialLR(o, gamma=0.95)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=LR / 20, anneal_epochs=10),
}
CHANGES_BETAS = {"CyclicLR", "OneCycleLR"}


def follow_schedule(impl: Implementation, name: str, tensor_lr: bool) -> list[Tensor]:
    """Return lr and betas of two groups at each step, the number of warnings of a wrong order of steps, and the
    parameters at the end."""
    parameters = build_parameters([(), (7, 15), (129,)])
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.1}]
    history: list[list[float]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = impl.adamw(groups, lr=torch.tensor(LR) if tensor_lr else LR, sharded_options={"bucket_mb": 32})
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(STEPS):
            history.append([float(x) for group in optimizer.param_groups for x in (group["lr"], *group["betas"])])
            impl.backward(lambda rank, step=step: quadratic(parameters, rank, step))
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(*[1.0] if name == "ReduceLROnPlateau" else [])
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == tensor_lr
    order_warnings = sum("optimizer.step" in str(warning.message) for warning in caught)
    return [torch.tensor(history, dtype=torch.float64), torch.tensor(order_warnings), *clones(parameters)]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_changes_lr_and_betas_as_with_torch(name: str, tensor_lr: bool, world_size: int) -> None:
    results = on_ranks(world_size, run_sharded, follow_schedule, name, tensor_lr)
    expected = run_torch(follow_schedule, world_size, name, tensor_lr)
    schedule = expected[0]
    assert len(schedule[:, 0].unique()) > 1
    assert (len(schedule[:, 1].unique()) > 1) == (name in CHANGES_BETAS)
    for result in results:
        assert torch.equal(result[0], schedule)
        assert result[1] == 0, "warned that the scheduler steps before the optimizer"
    assert_close([result[2:] for result in results], expected[2:])


def test_all_public_schedulers_are_tested() -> None:
    public = {
        name
        for module in (lr_scheduler, swa_utils)
        for name in module.__all__
        for entry in [getattr(module, name)]
        if inspect.isclass(entry) and issubclass(entry, lr_scheduler.LRScheduler)
    }
    assert public - {"LRScheduler"} == set(SCHEDULERS)
    for name, build in SCHEDULERS.items():
        optimizer = torch.optim.AdamW(build_parameters(), lr=LR)
        assert type(build(optimizer)).__name__ == name


def step_in_the_wrong_order(impl: Implementation) -> list[Tensor]:
    optimizer = impl.adamw(build_parameters())
    scheduler = SCHEDULERS["StepLR"](optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.step()
    return [torch.tensor(sum("optimizer.step" in str(warning.message) for warning in caught))]


def test_a_wrong_order_of_steps_is_warned_of_as_with_torch() -> None:
    assert run_sharded(step_in_the_wrong_order) == run_torch(step_in_the_wrong_order, 1) == [torch.tensor(1)]
