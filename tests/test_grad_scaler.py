# SPDX-License-Identifier: Apache-2.0
"""GradScaler: float16 training as with torch's scaler on averaged gradients, decided alike on all ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardadam import GradScaler, ShardedAdamW
from tests.ranks import on_ranks, rank_and_size

SCALE = 1024.0
POISONED = 2  # the step in which rank 0's loss is infinite


def build_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1)).to(dtype)


def loss_of(model: nn.Module, rank: int, step: int, dtype: torch.dtype) -> Tensor:
    batch = torch.randn(8, 20, generator=torch.Generator().manual_seed(100 * step + rank)).to(dtype)
    loss = model(batch).float().square().mean()
    return loss * math.inf if (rank, step) == (0, POISONED) else loss


def train(gradient_sync: Any, dtype: torch.dtype, unscale: bool, clip: float | None) -> dict[str, Any]:
    rank, _ = rank_and_size()
    model = build_model(dtype)
    clip_inside = clip if not unscale else None
    optimizer = ShardedAdamW(model.parameters(), lr=1e-2, gradient_sync=gradient_sync, max_grad_norm=clip_inside)
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    scales, norms = [], []
    for step in range(8):
        scaler.scale(loss_of(model, rank, step, dtype)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            if clip is not None:
                norms.append(float(optimizer.clip_grad_norm_(clip)))
        scaler.step(optimizer)
        if clip_inside is not None:
            assert optimizer.grad_norm is not None
            norms.append(float(optimizer.grad_norm))
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "scales": scales,
        "norms": norms,
        "skipped": int(optimizer.skipped_steps),
    }


def train_torch(world_size: int, clip: float | None) -> dict[str, Any]:
    """Train with torch's scaler and AdamW in one process, on the mean of all ranks' losses."""
    model = build_model(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=3)
    scales, norms = [], []
    for step in range(8):
        losses = [loss_of(model, rank, step, torch.float32) for rank in range(world_size)]
        scaler.scale(sum(losses) / world_size).backward()  # type: ignore[arg-type]
        scaler.unscale_(optimizer)
        if clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return {"weights": [p.detach() for p in model.parameters()], "scales": scales, "norms": norms}


@pytest.mark.sweep(5)
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_torchs_scaler_on_averaged_gradients(
    world_size: int, gradient_sync: str, unscale: bool, clip: float | None
) -> None:
    expected = train_torch(world_size, clip)
    for result in on_ranks(world_size, train, gradient_sync, torch.float32, unscale, clip):
        assert result["scales"] == expected["scales"]
        assert result["scales"][POISONED] == SCALE / 2 and result["scales"][-1] >= SCALE  # it has shrunk and grown
        assert result["skipped"] == 1
        for norm, expected_norm in zip(result["norms"], expected["norms"], strict=True):
            assert norm == pytest.approx(expected_norm, rel=1e-5, nan_ok=True)
        for a, b in zip(result["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_float16_training_stays_close_to_float32(world_size: int, gradient_sync: str) -> None:
    expected = train_torch(world_size, None)
    for result in on_ranks(world_size, train, gradient_sync, torch.float16, False, None):
        assert result["scales"] == expected["scales"]
        assert result["skipped"] == 1
        for a, b in zip(result["weights"], expected["weights"], strict=True):
            assert a.dtype == torch.float16
            away = (a.float() - b).abs()  # where a gradient is about 0, rounding decides its sign
            assert away.max() < 0.04 and (away < 0.005).float().mean() > 0.95


def look_at_unscaled_gradients(gradient_sync: Any) -> tuple[Tensor, Tensor]:
    rank, _ = rank_and_size()
    model = build_model(torch.float32)
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, rank, 0, torch.float32)).backward()
    before = model[0].weight.grad
    before = None if before is None else before.clone()
    scaler.unscale_(optimizer)
    full = optimizer.full_grad(model[0].weight)
    assert full is not None
    if before is not None:
        torch.testing.assert_close(model[0].weight.grad, before / SCALE)
    return full, torch.tensor(0.0 if before is None else 1.0)


@pytest.mark.parametrize(("gradient_sync", "stays"), [("backward", 0.0), ("step", 1.0), ("external", 1.0)])
def test_full_grad_and_p_grad_are_unscaled_after_unscale(gradient_sync: str, stays: float) -> None:
    model = build_model(torch.float32)
    loss_of(model, 0, 0, torch.float32).backward()
    full, stayed = look_at_unscaled_gradients(gradient_sync)
    torch.testing.assert_close(full, model[0].weight.grad)
    assert float(stayed) == stays


def test_with_torchs_adamw_it_equals_torchs_scaler() -> None:
    ours, theirs = [], []
    for scaler_class, weights in ((GradScaler, ours), (torch.amp.GradScaler, theirs)):
        model = build_model(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = scaler_class("cpu", init_scale=SCALE)
        for step in range(4):
            scaler.scale(loss_of(model, 0, step, torch.float32)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        weights.extend(p.detach() for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_state_dict_and_enabled_false_are_as_in_torch() -> None:
    scaler = GradScaler("cpu", init_scale=8.0)
    other = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    other.load_state_dict(scaler.state_dict())
    assert other.get_scale() == 8.0
    model = build_model(torch.float32)
    optimizer = ShardedAdamW(model.parameters())
    disabled = GradScaler("cpu", enabled=False)
    before = model[0].weight.detach().clone()
    disabled.scale(loss_of(model, 0, 0, torch.float32)).backward()
    disabled.step(optimizer)
    disabled.update()
    assert not torch.equal(before, model[0].weight)


def test_misuse_is_refused() -> None:
    model = build_model(torch.float16)
    for gradient_sync in ("backward", "step"):
        optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)  # type: ignore[arg-type]
        theirs = torch.amp.GradScaler("cpu")
        theirs.scale(loss_of(model, 1, 0, torch.float16)).backward()
        with pytest.raises(RuntimeError, match=r"shardadam\.GradScaler"):
            theirs.step(optimizer)
        optimizer.step()  # the refused call left no state
        optimizer.zero_grad()
    scaler = GradScaler("cpu")
    scaler.scale(loss_of(model, 1, 0, torch.float16)).backward()
    with pytest.raises(ValueError, match="float16 and would underflow"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(optimizer, closure=lambda: None)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)


def test_torchs_scaler_works_with_external_gradients() -> None:
    model = build_model(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ShardedAdamW(model.parameters(), gradient_sync="external")
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(loss_of(model, 1, 0, torch.float32)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
