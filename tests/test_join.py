# SPDX-License-Identifier: Apache-2.0
"""torch's Join: ranks with different numbers of batches train what one process trains on the same batches."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable
from torch.distributed.device_mesh import init_device_mesh

from shardadam import GradScaler, ShardedAdamW
from tests.ranks import on_ranks, rank_and_size

LR = 1e-2


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 1))
    return model.double()  # as exact as the coefficients must be


def loss_of(model: nn.Module, batch: int, rank: int) -> Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(100 * batch + rank), dtype=torch.float64)
    return model(x).square().mean() * 10


def batches_of(rank: int) -> int:
    return (3, 6, 1, 4)[rank]


def train(how: dict[str, Any]) -> tuple[list[Tensor], list[float], list[str]]:
    rank, _ = rank_and_size()
    model = build_model()
    group = init_device_mesh("cpu", how["mesh"]) if "mesh" in how else None
    optimizer = ShardedAdamW(
        model.parameters(),
        lr=LR,
        bucket_mb=0.0005,
        gradient_sync=how.get("sync", "backward"),
        max_grad_norm=how.get("max_grad_norm"),
        process_group=group,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if how.get("schedule") == "in a hook":
        optimizer.register_step_post_hook(lambda *_: schedule.step())
    scaler = GradScaler("cpu", init_scale=64.0, enabled=how.get("scaler", False))
    keywords = {"divide_by_initial_world_size": False} if how.get("divide") == "by the rest" else {}
    norms = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Join([optimizer], **keywords):
            for batch in range(batches_of(rank)):
                if how.get("zero_grad") == "first":
                    optimizer.zero_grad()
                if how.get("backwards") == 2:
                    scaler.scale(loss_of(model, batch, rank) / 2).backward()
                    scaler.scale(loss_of(model, batch, rank) / 2).backward()
                elif how.get("backwards") == "local":
                    with optimizer.no_sync():
                        scaler.scale(loss_of(model, batch, rank)).backward()
                else:
                    scaler.scale(loss_of(model, batch, rank)).backward()
                if "clip" in how:
                    scaler.unscale_(optimizer)
                    norms += optimizer.gradient_norms().parameters.values()
                if how.get("clip") == "norm":
                    norms.append(float(optimizer.clip_grad_norm_(torch.tensor(0.5))))
                if how.get("clip") == "some":
                    norms.append(float(optimizer.clip_grad_norm_(0.5, parameters=model[0].parameters())))
                    optimizer.clip_grad_value_(0.1)
                scaler.step(optimizer)
                scaler.update()
                if "schedule" not in how:
                    schedule.step()
                if "zero_grad" not in how:
                    optimizer.zero_grad()
    optimizer.zero_grad()
    optimizer.check_in_sync()
    for step in range(2):  # and on, without the context
        loss_of(model, 10 + step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        if "schedule" not in how:
            optimizer.param_groups[0]["lr"] /= 2  # the schedules of ranks with fewer batches are behind
    texts = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    return [p.detach().clone() for p in model.parameters()], norms, texts


def train_in_one_process(how: dict[str, Any], world_size: int) -> tuple[list[Tensor], list[float]]:
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    norms = []
    for batch in range(max(batches_of(rank) for rank in range(world_size))):
        left = [rank for rank in range(world_size) if batch < batches_of(rank)]
        divisor = len(left) if how.get("divide") == "by the rest" else world_size
        (sum(loss_of(model, batch, rank) for rank in left) / divisor).backward()
        if "clip" in how:
            norms += [float(p.grad.norm()) for p in model.parameters()]
        if how.get("clip") == "norm":
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        if how.get("clip") == "some":
            norms.append(float(nn.utils.clip_grad_norm_(model[0].parameters(), 0.5)))
            nn.utils.clip_grad_value_(model.parameters(), 0.1)
        if "max_grad_norm" in how:
            nn.utils.clip_grad_norm_(model.parameters(), how["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for step in range(2):
        (sum(loss_of(model, 10 + step, rank) for rank in range(world_size)) / world_size).backward()
        if "max_grad_norm" in how:
            nn.utils.clip_grad_norm_(model.parameters(), how["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if "schedule" in how:
            schedule.step()
        else:
            optimizer.param_groups[0]["lr"] /= 2
    return [p.detach() for p in model.parameters()], norms


@pytest.mark.parametrize(
    ("world_size", "how"),
    [
        (2, {}),
        (3, {"sync": "step"}),
        (3, {"sync": "step", "zero_grad": "first"}),
        (3, {"schedule": "in a hook"}),
        (3, {"backwards": 2, "max_grad_norm": 0.5}),
        (2, {"backwards": "local", "divide": "by the rest"}),
        (3, {"clip": "norm", "scaler": True}),
        (2, {"clip": "some", "scaler": True, "divide": "by the rest"}),
        (2, {"clip": "some", "sync": "step"}),
        (4, {"mesh": (2, 2), "clip": "norm"}),
    ],
    ids=str,
)
def test_uneven_batches_train_what_one_process_trains(world_size: int, how: dict[str, Any]) -> None:
    expected, norms = train_in_one_process(how, world_size)
    for rank, (parameters, ours, texts) in enumerate(on_ranks(world_size, train, how)):
        assert texts == []
        assert len(ours) == batches_of(rank) * (1 + len(expected) if "clip" in how else 0)
        assert ours == pytest.approx(norms[: len(ours)], rel=1e-10)
        for a, b in zip(parameters, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def stop_early() -> str:
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR)
    try:
        with Join([optimizer], throw_on_early_termination=True):
            for batch in range(batches_of(rank)):
                loss_of(model, batch, rank).backward()
                optimizer.step()
                optimizer.zero_grad()
    except RuntimeError as error:
        return str(error)
    return ""


def test_early_termination_raises_on_all_ranks() -> None:
    first, second = on_ranks(2, stop_early)
    assert first == "Rank 0 exhausted all inputs." and "exhausted inputs" in second


def refuse() -> str:
    optimizer = ShardedAdamW(build_model().parameters(), gradient_sync="external")
    assert isinstance(optimizer, Joinable)
    try:
        Join([optimizer])
    except ValueError as error:
        return str(error)
    return ""


def test_gradients_averaged_elsewhere_are_refused() -> None:
    for message in on_ranks(2, refuse):
        assert 'found gradient_sync="external", expected "backward" or "step"' in message


def look(method: str, first: int) -> tuple[str, float]:
    """Call what is refused within Join, from a batch on; return the error, and after how many seconds it came."""
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), update="backward")
    rank, _ = rank_and_size()
    start = time.monotonic()
    with pytest.raises((RuntimeError, ValueError)) as found, Join([optimizer]):
        for batch in range(batches_of(rank)):
            loss_of(model, batch, rank).backward()
            if method == "gradient_norms" and batch >= first:
                optimizer.gradient_norms()
            optimizer.step()
            if method == "update_ratios" and batch >= first:
                optimizer.update_ratios()
    return str(found.value), time.monotonic() - start


REFUSED = {
    "update_ratios": "update_ratios: found a call within Join",
    "gradient_norms": 'gradient_norms: found update="backward"',
}


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("method", REFUSED)
def test_what_is_refused_within_join_is_on_all_ranks(method: str, first: int) -> None:
    """Ranks waited for it until the timeout: those with batches, or those without (``first=4``: rank 0 has three)."""
    for message, seconds in on_ranks(2, look, method, first):
        assert REFUSED[method] in message and seconds < 10


def train_two_models() -> list[Tensor]:
    rank, _ = rank_and_size()
    models = [build_model(), build_model()]
    optimizers = [ShardedAdamW(model.parameters(), lr=LR, bucket_mb=0.0005) for model in models]
    with Join(optimizers):
        for batch in range(batches_of(rank)):
            for index, model in enumerate(models):
                (loss_of(model, batch, rank) * (1 + index)).backward()
            for optimizer in optimizers:
                optimizer.clip_grad_norm_(0.5)
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach().clone() for model in models for p in model.parameters()]


def test_two_optimizers_join_together() -> None:
    models = [build_model(), build_model()]
    for index, model in enumerate(models):
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        for batch in range(6):
            left = [rank for rank in range(2) if batch < batches_of(rank)]
            (sum(loss_of(model, batch, rank) for rank in left) * (1 + index) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    for parameters in on_ranks(2, train_two_models):
        for a, b in zip(parameters, [p for model in models for p in model.parameters()], strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-12)
