# SPDX-License-Identifier: Apache-2.0
"""Clipping equals torch's on averaged gradients; a non-finite gradient on one rank changes no parameter on any rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardadam import GradScaler, ShardedAdamW
from tests.ranks import on_ranks, rank_and_size

LR = 1e-2


def build_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 17), nn.Tanh(), nn.Linear(17, 130), nn.Tanh(), nn.Linear(130, 1)).to(dtype)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(100 * step + rank))
    y = model(x.to(next(model.parameters()).dtype))
    return (y if y.dtype == torch.float64 else y.float()).square().mean() * 10


def train_clipped(how: str, max_norm: float, gradient_sync: str) -> tuple[list[float], list[float], list[Tensor]]:
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(
        model.parameters(),
        lr=LR,
        bucket_mb=0.001,
        gradient_sync=gradient_sync,
        max_grad_norm=max_norm if how == "inside step" else None,
    )
    returned, recorded = [], []
    for step in range(8):
        loss_of(model, step, rank).backward()
        if how == "method":
            returned.append(float(optimizer.clip_grad_norm_(max_norm)))
        if how == "method twice":
            returned.append(float(optimizer.clip_grad_norm_(max_norm)))
            assert float(optimizer.clip_grad_norm_(torch.tensor(max_norm / 2))) <= max_norm * 1.0001
        optimizer.step()
        optimizer.zero_grad()
        recorded.append(float(optimizer.grad_norm))
    return returned, recorded, [parameter.detach().clone() for parameter in model.parameters()]


def train_clipped_by_torch(how: str, max_norm: float, world_size: int) -> tuple[list[float], list[Tensor]]:
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    norms = []
    for step in range(8):
        (sum(loss_of(model, step, rank) for rank in range(world_size)) / world_size).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
        if how == "method twice":
            nn.utils.clip_grad_norm_(model.parameters(), max_norm / 2)
        optimizer.step()
        optimizer.zero_grad()
    return norms, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.sweep(5)
@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("max_norm", [0.5, 1e4])
@pytest.mark.parametrize("how", ["inside step", "method", "method twice"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_torchs_clip_grad_norm(world_size: int, how: str, max_norm: float, gradient_sync: str) -> None:
    norms, expected = train_clipped_by_torch(how, max_norm, world_size)
    for returned, recorded, parameters in on_ranks(world_size, train_clipped, how, max_norm, gradient_sync):
        assert recorded == pytest.approx(norms, rel=1e-5)
        if how != "inside step":
            assert returned == pytest.approx(norms, rel=1e-5)
        for a, b in zip(parameters, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def clip_in_float64(how: str, gradient_sync: str, mixed: bool) -> tuple[list[Tensor], float, torch.dtype]:
    """One rank's gradients on all ranks, so that their mean has their bits."""
    model = build_model(torch.float64)
    if mixed:
        model[2].float()
    options = {"max_grad_norm": 0.3} if how == "inside step" else {}
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=0.001, gradient_sync=gradient_sync, **options)
    norms: list[Tensor] = []
    for step in range(4):
        gradients_of(model, step)
        if how == "method":
            norms.append(optimizer.clip_grad_norm_(0.3))
        elif how == "full_grad":
            norms.append(optimizer.clip_grad_norm_(0.3))
            assert optimizer.full_grad(model[0].weight) is not None
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.grad_norm is not None
    return [p.detach().clone() for p in model.parameters()], float(optimizer.grad_norm), optimizer.grad_norm.dtype


def gradients_of(model: nn.Module, step: int) -> None:
    loss = torch.zeros((), dtype=torch.float64)
    for index, parameter in enumerate(model.parameters()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + index))
        loss = loss + (parameter * noise.to(parameter.dtype)).sum()
    loss.backward()


@pytest.mark.sweep(5)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize("how", ["inside step", "method", "full_grad"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_float64_gradients_are_clipped_as_exactly_as_in_torch(
    world_size: int, how: str, gradient_sync: str, mixed: bool
) -> None:
    """They were once clipped by a float32 coefficient: wrong by up to 6e-8 of the gradient."""
    model = build_model(torch.float64)
    if mixed:
        model[2].float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for step in range(4):
        optimizer.zero_grad()
        gradients_of(model, step)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    for parameters, found, dtype in on_ranks(world_size, clip_in_float64, how, gradient_sync, mixed):
        assert dtype == torch.float64
        assert found == pytest.approx(float(norm), rel=1e-6 if mixed else 1e-14)
        for ours, theirs in zip(parameters, model.parameters(), strict=True):
            exact = {"rtol": 1e-13, "atol": 1e-14} if not mixed else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(ours, theirs, **exact)


def everything(model: nn.Module, optimizer: ShardedAdamW) -> list[Tensor]:
    state = [tensor for value in optimizer.state.values() for tensor in value.values()]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *state]]


def poison(value: float, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    rank, world_size = rank_and_size()
    model = build_model(dtype)
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=0.001, **options)
    result: dict[str, Any] = {"unchanged": []}
    for step in range(6):
        loss_of(model, step, rank).backward()
        before = everything(model, optimizer)
        if step in (0, 3):
            optimizer.zero_grad()
            loss = loss_of(model, step, rank)
            if rank == world_size - 1:
                loss = loss + (model[2].bias[5] * value).float()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, 3):
            after = everything(model, optimizer)
            result["unchanged"].append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    result["skipped"] = int(optimizer.skipped_steps)
    result["steps"] = {float(state["step"]) for state in optimizer.state.values()}
    result["parameters"] = [parameter.detach().clone() for parameter in model.parameters()]
    return result


@pytest.mark.sweep(6)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"gradient_sync": "step"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_non_finite_gradient_on_one_rank_changes_no_bit_on_any(
    world_size: int, value: float, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    for result in on_ranks(world_size, poison, value, dtype, options):
        assert result["unchanged"] == [True, True]
        assert result["skipped"] == 2
        assert result["steps"] == {4.0}
        assert all(bool(parameter.isfinite().all()) for parameter in result["parameters"])


def overflow_the_sum() -> tuple[bool, int]:
    """Train with gradients that are finite on every rank but overflow in the sum."""
    parameter = nn.Parameter(torch.ones(200))
    optimizer = ShardedAdamW([parameter])
    parameter.grad = torch.full((200,), 3e38)
    optimizer.step()
    return torch.equal(parameter.detach(), torch.ones(200)), int(optimizer.skipped_steps)


def test_finite_gradients_whose_sum_overflows_are_not_applied() -> None:
    assert on_ranks(2, overflow_the_sum) == [(True, 1), (True, 1)]


def norm_of_external_gradients() -> tuple[float, Tensor]:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), gradient_sync="external", lr=LR)
    loss_of(model, 0, 0).backward()  # equal on all ranks, as if averaged
    norm = optimizer.clip_grad_norm_(0.1)
    optimizer.step()
    return float(norm), model[0].weight.detach().clone()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_external_gradients_are_clipped_without_dividing_them_again(world_size: int) -> None:
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    loss_of(model, 0, 0).backward()
    expected = float(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    optimizer.step()
    for norm, weight in on_ranks(world_size, norm_of_external_gradients):
        assert norm == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(weight, model[0].weight.detach(), rtol=1e-6, atol=1e-7)


def look_inside(dtype: torch.dtype) -> dict[str, Any]:
    rank, _ = rank_and_size()
    model = build_model(dtype)
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=0.001)
    loss_of(model, 0, rank).backward()
    gradients = [optimizer.full_grad(parameter) for parameter in model.parameters()]
    optimizer.step()
    states = [optimizer.full_state(parameter) for parameter in model.parameters()]
    unused = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [unused]})
    loss_of(model, 1, rank).backward()
    nothing = optimizer.full_grad(unused)
    optimizer.step()
    return {"gradients": gradients, "states": states, "nothing": nothing, "last": optimizer.full_state(unused)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_full_grad_and_full_state_return_whole_tensors(world_size: int, dtype: torch.dtype) -> None:
    model = build_model(dtype)
    wholes = []
    for rank in range(world_size):
        model.zero_grad()
        loss_of(model, 0, rank).backward()
        wholes.append([parameter.grad.float() for parameter in model.parameters()])
    averages = [sum(gradients) / world_size for gradients in zip(*wholes, strict=True)]
    for result in on_ranks(world_size, look_inside, dtype):
        for gradient, state, average in zip(result["gradients"], result["states"], averages, strict=True):
            torch.testing.assert_close(gradient, average, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
            torch.testing.assert_close(state["exp_avg"], 0.1 * gradient, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(state["exp_avg_sq"], 0.001 * gradient**2, rtol=1e-5, atol=1e-12)
            assert float(state["step"]) == 1.0
            assert ("master" in state) == (dtype == torch.bfloat16)
        assert result["nothing"] is None
        assert float(result["last"]["step"]) == 0.0 and not result["last"]["exp_avg"].any()


# Other ways to clip

TOLERANCES = {torch.float32: (1e-4, 2e-5), torch.float64: (1e-9, 1e-9)}
"""Of norms, relative, and of parameters: Adam makes full updates of what sums that cancel out leave of a gradient."""

CLIPS = {
    "1-norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 5.0, norm_type=1.0),
    "3-norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1, norm_type=3),
    "inf-norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.01, norm_type=math.inf),
    "some": lambda parameters: nn.utils.clip_grad_norm_(parameters[2:5], 0.05),
    "some, inf-norm": lambda parameters: nn.utils.clip_grad_norm_(parameters[2:4], 0.01, norm_type=math.inf),
    "value": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.003),
    "some by value": lambda parameters: nn.utils.clip_grad_value_(parameters[:2], 0.003),
}
OUR_CLIPS = {
    "1-norm": lambda optimizer, parameters: optimizer.clip_grad_norm_(5.0, 1.0),
    "3-norm": lambda optimizer, parameters: optimizer.clip_grad_norm_(torch.tensor(0.1), norm_type=3),
    "inf-norm": lambda optimizer, parameters: optimizer.clip_grad_norm_(0.01, math.inf),
    "some": lambda optimizer, parameters: optimizer.clip_grad_norm_(0.05, parameters=parameters[2:5]),
    "some, inf-norm": lambda optimizer, parameters: optimizer.clip_grad_norm_(
        0.01, float("inf"), parameters=iter(parameters[2:4])
    ),
    "value": lambda optimizer, parameters: optimizer.clip_grad_value_(0.003),
    "some by value": lambda optimizer, parameters: optimizer.clip_grad_value_(0.003, parameters=parameters[:2]),
}


def train_with(how: list[str], options: dict[str, Any], dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
    rank, world_size = rank_and_size()
    model = build_model(dtype)
    parameters = list(model.parameters())
    if mesh := options.get("process_group"):
        options = {**options, "process_group": init_device_mesh("cpu", mesh)}
    optimizer = ShardedAdamW(parameters, lr=LR, bucket_mb=0.001, **options)
    scaler = GradScaler("cpu", init_scale=128.0, enabled=options.get("gradient_sync") == "backward")
    returned = []
    for step in range(6):
        if options.get("gradient_sync") == "external":
            (sum(loss_of(model, step, r) for r in range(world_size)) / world_size).backward()
        else:
            scaler.scale(loss_of(model, step, rank)).backward()
        scaler.unscale_(optimizer)
        returned += [float(OUR_CLIPS[one](optimizer, parameters) or 0.0) for one in how]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return returned, [parameter.detach().clone() for parameter in parameters]


@pytest.mark.sweep(10)
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_sync": "backward"},
        {"gradient_sync": "step"},
        {"gradient_sync": "external"},
        {"gradient_sync": "backward", "max_grad_norm": 0.04},
        {"gradient_sync": "step", "transport": "collective"},
        {"gradient_sync": "backward", "process_group": (2, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [*([one] for one in CLIPS), ["value", "some", "1-norm", "some by value"]], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torchs_other_ways_to_clip(
    dtype: torch.dtype, world_size: int, how: list[str], options: dict[str, Any]
) -> None:
    if "process_group" in options:
        world_size = 4
    model = build_model(dtype)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    norms = []
    for step in range(6):
        (sum(loss_of(model, step, rank) for rank in range(world_size)) / world_size).backward()
        norms += [float(CLIPS[one](parameters) or 0.0) for one in how]
        if "max_grad_norm" in options:
            nn.utils.clip_grad_norm_(parameters, options["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
    of_norms, of_parameters = TOLERANCES[dtype]
    for returned, ours in on_ranks(world_size, train_with, how, options, dtype):
        assert returned == pytest.approx(norms, rel=of_norms)  # torch sums in float32
        for a, b in zip(ours, parameters, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=0, atol=of_parameters)


def clip_an_infinite_gradient() -> tuple[int, bool]:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR)
    before = everything(model, optimizer)
    loss = loss_of(model, 0, 0)
    if rank_and_size()[0] == 0:
        loss = loss + model[2].bias[5] * math.inf  # one gradient is infinite, none is NaN: clamped, all are finite
    loss.backward()
    optimizer.clip_grad_value_(0.1)
    optimizer.clip_grad_norm_(0.1, 1.0, parameters=[model[0].weight])
    optimizer.step()
    after = everything(model, optimizer)
    return int(optimizer.skipped_steps), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_clipping_does_not_hide_a_non_finite_gradient(world_size: int) -> None:
    assert on_ranks(world_size, clip_an_infinite_gradient) == [(1, True)] * world_size


def test_what_cannot_be_clipped_is_refused_by_name() -> None:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters())
    with pytest.raises(ValueError, match=r"norm_type: found 0\.0, expected a positive number"):
        optimizer.clip_grad_norm_(1.0, 0)
    with pytest.raises(ValueError, match=r"clip_value: found -1\.0, expected a number of 0 or more"):
        optimizer.clip_grad_value_(-1.0)
    with pytest.raises(ValueError, match=r"Tensor 1 of \(3,\) is not a parameter of the optimizer"):
        optimizer.clip_grad_norm_(1.0, parameters=[model[0].weight, torch.zeros(3)])


def test_one_tensor_is_clipped_as_one_parameter() -> None:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters())
    loss_of(model, 0, 0).backward()
    whole = optimizer.full_grad(model[0].weight)
    assert whole is not None
    norm = optimizer.clip_grad_norm_(1e-3, parameters=model[0].weight)
    torch.testing.assert_close(norm, whole.norm())
    optimizer.clip_grad_value_(1e-5, parameters=model[0].weight)
    clipped = optimizer.full_grad(model[0].weight)
    assert clipped is not None and float(clipped.abs().max()) <= 1.001e-5


def clip_different_parameters() -> str:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters())
    loss_of(model, 0, 0).backward()
    some = list(model.parameters())[: 1 + rank_and_size()[0]]
    try:
        optimizer.clip_grad_norm_(1.0, parameters=some)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_clip_different_parameters_are_told() -> None:
    for message in on_ranks(2, clip_different_parameters):
        assert "of 1 parameters on rank 0" in message and "of 2 parameters on rank 1" in message


def backward_after_an_infinite_gradient_was_clamped(gradient_sync: str) -> tuple[int, bool]:
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.ones(300)) for _ in range(3)]
    optimizer = ShardedAdamW(weights, lr=0.1, gradient_sync=gradient_sync, bucket_mb=0.002)  # type: ignore[arg-type]
    (weights[1] * (float("inf") if rank == 0 else 1.0)).sum().backward()
    optimizer.clip_grad_value_(1.0)
    if gradient_sync == "backward":
        sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
    optimizer.step()
    return int(optimizer.skipped_steps), all(torch.equal(weight, torch.ones(300)) for weight in weights)


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_clamped_infinite_gradient_skips_the_step_whatever_comes_after(world_size: int, gradient_sync: str) -> None:
    """A second backward measured the shard anew, and forgot what it had held."""
    for found in on_ranks(world_size, backward_after_an_infinite_gradient_was_clamped, gradient_sync):
        assert found == (1, True)
