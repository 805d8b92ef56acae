# SPDX-License-Identifier: Apache-2.0
"""Every storage format in the whole optimizer: on any number of ranks, with outside writes, saved and loaded."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardadam import Precision, ShardedAdamW
from tests.ranks import on_ranks, rank_and_size

SHAPES = ((300,), (7, 40), (), (0,), (129,), (3, 4, 5, 2), (1000,))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 12
FORMATS = [
    ("fp32", "fp32", "auto"),
    ("fp32", "bf16", "auto"),
    ("fp32", "int8", "auto"),
    *itertools.product(("bf16", "fp16"), ("fp32", "bf16", "int8"), ("split", "fp32", "none")),
]
every_format = pytest.mark.parametrize(("dtype", "moments", "master"), FORMATS)


def build_parameters(dtypes: tuple[str, ...], device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device, DTYPES[d])) for d in dtypes for s in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Compute gradients that are the same on every rank, so their mean is, too; one parameter has none at times."""
    generator = torch.Generator().manual_seed(100 + step)
    loss = torch.zeros((), device=parameters[0].device)
    for index, parameter in enumerate(parameters):
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        if (index, step % 3) != (2, 1):
            loss = loss + (parameter.float() * noise).sum()
    loss.backward()


def train(
    dtypes: tuple[str, ...],
    moments: Any,
    master: Any,
    bucket_mb: float,
    seed: int = 0,
    clip: float | None = None,
    device: str = "cpu",
) -> list[Tensor]:
    parameters = build_parameters(dtypes, device)
    optimizer = ShardedAdamW(
        parameters,
        lr=1e-2,
        weight_decay=0.1,
        bucket_mb=bucket_mb,
        max_grad_norm=clip,
        precision=Precision(moments=moments, master=master, seed=seed, reduce=torch.float32),
    )
    for step in range(STEPS):
        set_gradients(parameters, step)
        optimizer.step()
    states = [state for p in parameters for state in optimizer.full_state(p).values()]
    return [whole.detach().cpu().clone() for whole in (*parameters, *states)]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("master", ["split", "fp32", "none"])
@pytest.mark.parametrize(("world_size", "bucket_mb"), [(1, 0.003), (2, 0.003), (2, 32), (4, 32), (3, 0.003)])
def test_results_are_the_same_on_any_number_of_ranks_and_at_any_bucket_size(
    world_size: int, bucket_mb: float, moments: str, master: str
) -> None:
    dtypes = ("fp32", "bf16", "fp16")
    expected = train(dtypes, moments, master, 32.0)
    for result in on_ranks(world_size, train, dtypes, moments, master, bucket_mb):
        for a, b in zip(result, expected, strict=True):
            if world_size == 3:  # the mean of three equal numbers may round to another
                torch.testing.assert_close(a, b, rtol=0.1, atol=0.03)
            else:
                assert torch.equal(a, b)


def test_the_seed_changes_stochastic_roundings_and_nothing_else() -> None:
    one, same, other = (train(("bf16",), "int8", "none", 32.0, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    exact, other_exact = (train(("bf16",), "fp32", "split", 32.0, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(exact, other_exact, strict=True))


@every_format
def test_compressed_state_trains_like_exact_state(dtype: str, moments: str, master: str) -> None:
    expected = train((dtype,), "fp32", "fp32", 32.0)[: len(SHAPES)]
    found = train((dtype,), moments, master, 32.0)[: len(SHAPES)]
    start = build_parameters((dtype,))
    for a, b, first in zip(found, expected, start, strict=True):
        if a.numel() < 100:
            continue
        moved, apart = (b.float() - first.detach().float()).norm(), (a.float() - b.float()).norm()
        assert moved > 0 and apart < 0.25 * moved


def train_on_each_ranks_own_data(master: Any, steps: int, clip: float | None) -> list[Tensor]:
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1)).bfloat16()
    optimizer = ShardedAdamW(model.parameters(), lr=3e-3, max_grad_norm=clip, precision=Precision(master=master))
    for step in range(steps):
        batch = torch.randn(16, 20, generator=torch.Generator().manual_seed(100 * step + rank)).bfloat16()
        (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    exact = [optimizer.full_state(p)["master"] for p in model.parameters()]
    return [*(p.detach().clone() for p in model.parameters()), *exact]


@pytest.mark.parametrize(("world_size", "clip"), [(1, None), (2, None), (2, 0.5)])
def test_split_masters_equal_fp32_masters_bit_for_bit_over_200_steps(world_size: int, clip: float | None) -> None:
    split = on_ranks(world_size, train_on_each_ranks_own_data, "split", 200, clip)
    whole = on_ranks(world_size, train_on_each_ranks_own_data, "fp32", 200, clip)
    for of_split, of_whole in zip(split, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(of_split, of_whole, strict=True))


# Writes from outside


def swapped(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def averages(parameters: list[nn.Parameter]) -> None:
    """Swap averages (EMA) in and the old values back, as for validation."""
    kept = [p.detach().clone() for p in parameters]
    swapped(parameters, [p.detach() * 0.5 for p in parameters])
    swapped(parameters, kept)


def replaced(parameters: list[nn.Parameter]) -> None:
    """Call the model's load_state_dict after construction."""
    other = nn.ParameterList(build_parameters(("fp32",)))
    target = nn.ParameterList(parameters)
    target.load_state_dict(
        {name: value.flip(0) if value.dim() else -value for name, value in other.state_dict().items()}
    )


WRITES: dict[str, Callable[[list[nn.Parameter]], None]] = {
    "load_state_dict": replaced,
    "zeroed": lambda parameters: swapped(parameters, [torch.zeros(()).expand_as(p) for p in parameters]),
    "negated": lambda parameters: swapped(parameters, [-p.detach() for p in parameters]),
    "pruned": lambda parameters: swapped(parameters, [p.detach() * (p.detach() > 0) for p in parameters]),
}


def write_and_step(dtype: str, moments: Any, master: Any, write: str) -> list[tuple[Tensor, Tensor]]:
    """Return the written values and those after a step with lr 0."""
    parameters = build_parameters((dtype,))
    precision = Precision(moments=moments, master=master)
    optimizer = ShardedAdamW(parameters, lr=1e-2, weight_decay=0.0, bucket_mb=0.003, precision=precision)
    for step in range(3):
        set_gradients(parameters, step)
        optimizer.step()
    WRITES[write](parameters)
    written = [p.detach().clone() for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    set_gradients(parameters, 3)
    optimizer.step()
    exact = [optimizer.full_state(p).get("master", p.detach()) for p in parameters]
    return list(zip(written, [p.detach() for p in parameters], exact, strict=True))  # type: ignore[arg-type]


@pytest.mark.sweep(5)
@every_format
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_next_step_starts_from_values_written_from_outside(
    world_size: int, write: str, dtype: str, moments: str, master: str
) -> None:
    for result in on_ranks(world_size, write_and_step, dtype, moments, master, write):
        for written, after, exact in result:  # type: ignore[misc]
            assert torch.equal(written, after)
            unit = torch.finfo(after.dtype).eps * after.float().abs() + torch.finfo(after.dtype).smallest_normal
            assert not exact.isnan().any()
            assert ((exact - after.float()).abs() <= unit).all()


@pytest.mark.sweep(4)
@every_format
def test_an_ema_swap_and_back_changes_nothing(dtype: str, moments: str, master: str) -> None:
    results = []
    for swap in (False, True):
        parameters = build_parameters((dtype,))
        optimizer = ShardedAdamW(parameters, lr=1e-2, precision=Precision(moments=moments, master=master))  # type: ignore[arg-type]
        for step in range(4):
            if swap:
                averages(parameters)
            set_gradients(parameters, step)
            optimizer.step()
        results.append([p.detach().clone() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# State


def resume(dtype: str, moments: Any, master: Any, other: tuple[Any, Any] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of an uninterrupted run and of one resumed halfway, in format ``other`` if given."""
    parameters = build_parameters((dtype,))

    def build(members: list[nn.Parameter], formats: tuple[Any, Any]) -> ShardedAdamW:
        return ShardedAdamW(
            members, lr=1e-2, bucket_mb=0.003, precision=Precision(moments=formats[0], master=formats[1])
        )

    optimizer = build(parameters, (moments, master))
    for step in range(STEPS):
        if step == STEPS // 2:
            values = [p.detach().clone() for p in parameters]
            state = optimizer.state_dict()
            state = {**state, "state": {i: {k: v.clone() for k, v in s.items()} for i, s in state["state"].items()}}
        set_gradients(parameters, step)
        optimizer.step()
    fresh = [nn.Parameter(value) for value in values]
    resumed = build(fresh, other or (moments, master))
    resumed.load_state_dict(state)
    for step in range(STEPS // 2, STEPS):
        set_gradients(fresh, step)
        resumed.step()
    return [p.detach() for p in parameters], [p.detach() for p in fresh]


@pytest.mark.sweep(5)
@every_format
def test_a_saved_run_resumes_bit_for_bit(dtype: str, moments: str, master: str) -> None:
    for one, other in on_ranks(2, resume, dtype, moments, master, None):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("dtype", "master"), [("bf16", "split"), ("fp16", "split"), ("bf16", "none"), ("fp32", "auto")]
)
@pytest.mark.parametrize(("saved", "loaded"), [("fp32", "int8"), ("int8", "fp32"), ("bf16", "int8"), ("fp32", "bf16")])
def test_state_of_another_format_is_converted(dtype: str, master: str, saved: str, loaded: str) -> None:
    for one, other in on_ranks(2, resume, dtype, saved, master, (loaded, "fp32" if master == "split" else master)):
        for a, b in zip(one, other, strict=True):
            away = (a.float() - b.float()).abs()
            assert away.numel() == 0 or away.mean() < 0.01  # of six steps of 0.01


def load_torchs_state(dtype: str, moments: Any, master: Any) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    parameters = build_parameters((dtype,))
    theirs = torch.optim.AdamW([nn.Parameter(p.detach().float()) for p in parameters], lr=1e-2)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in theirs.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
        theirs.step()
    ours = ShardedAdamW(parameters, precision=Precision(moments=moments, master=master), bucket_mb=0.003)
    ours.load_state_dict(theirs.state_dict())
    return [
        (ours.full_state(p), theirs.state[q]) for p, q in zip(parameters, theirs.param_groups[0]["params"], strict=True)
    ]


@pytest.mark.sweep(4)
@every_format
def test_torchs_state_loads_into_every_format(dtype: str, moments: str, master: str) -> None:
    tolerance = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 0.02}[moments]
    for pairs in on_ranks(2, load_torchs_state, dtype, moments, master):
        for ours, theirs in pairs:
            assert ours["step"] == theirs["step"] == 3
            for name in ("exp_avg", "exp_avg_sq"):
                a, b = ours[name], theirs[name]
                largest = b.abs().max() if b.numel() else torch.zeros(())
                assert ((a - b).abs() <= tolerance * largest).all()


# Arguments


@pytest.mark.parametrize("accumulate", ["wire", "fp32"])
@pytest.mark.parametrize("reduce", [None, torch.bfloat16, torch.float32])
def test_bf16_gradients_are_summed_in_fp32_in_rank_order(reduce: torch.dtype | None, accumulate: str) -> None:
    gradients = [torch.randn(1000, generator=torch.Generator().manual_seed(rank)).bfloat16() for rank in range(4)]
    total = torch.zeros(1000)
    for gradient in gradients:
        total += gradient.float()
    for found in on_ranks(4, reduced_gradient, reduce, accumulate):
        assert torch.equal(found, total / 4)


def reduced_gradient(reduce: torch.dtype | None, accumulate: Any) -> Tensor:
    rank, _ = rank_and_size()
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    optimizer = ShardedAdamW([parameter], precision=Precision(reduce=reduce, accumulate=accumulate))
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(rank)).bfloat16()
    (parameter * gradient).sum().backward()
    full = optimizer.full_grad(parameter)
    assert full is not None
    return full


def test_float64_parameters_have_no_compressed_moments() -> None:
    with pytest.raises(TypeError, match="is float64, expected float32, bfloat16 or float16"):
        ShardedAdamW([nn.Parameter(torch.zeros(3, dtype=torch.float64))], precision=Precision(moments="int8"))
    with pytest.raises(ValueError, match=r"Precision\.seed: found -1"):
        Precision(seed=-1)


BYTES = {
    ("bf16", "fp32", "fp32"): 12,
    ("bf16", "fp32", "split"): 10,
    ("bf16", "bf16", "split"): 6,
    ("bf16", "int8", "split"): 4.0625,
    ("bf16", "int8", "none"): 2.0625,
    ("fp32", "fp32", "auto"): 8,
    ("fp32", "int8", "auto"): 2.0625,
}


def state_bytes(dtype: str, moments: Any, master: Any) -> tuple[int, int]:
    shapes = [(576, 192), (192, 192), (768, 192), (192, 768), (768,), (192,)] * 4
    parameters = [nn.Parameter(torch.zeros(shape, dtype=DTYPES[dtype])) for shape in shapes]
    memory = ShardedAdamW(parameters, precision=Precision(moments=moments, master=master)).memory()
    return sum(p.numel() for p in parameters), memory.state


@pytest.mark.sweep(3)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "moments", "master"), BYTES)
def test_state_takes_the_documented_bytes_per_parameter(world_size: int, dtype: str, moments: str, master: str) -> None:
    for numel, state in on_ranks(world_size, state_bytes, dtype, moments, master):
        assert 1.0 <= state / (BYTES[dtype, moments, master] * numel / world_size) < 1.01
