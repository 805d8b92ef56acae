# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of Adam and the rounding of masters: the reference equals the papers, torch and exact definitions."""

from __future__ import annotations

import itertools
import math
import random
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from shardadam.update import fused
from shardadam.update.reference import adam_, round_half_away

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = True
    maximize: bool = False

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dict(self.__dict__)


CASES = [
    Case(lr, betas, eps, decay, decoupled, maximize)
    for (lr, betas, eps), decay, decoupled, maximize in itertools.product(
        ((1e-2, (0.9, 0.999), 1e-8), (1e-3, (0.5, 0.8), 1e-3), (3e-4, (0.0, 0.99), 1e-6)),
        (0.0, 0.1),
        (True, False),
        (False, True),
    )
]


def random_tensor(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def paper_adam(weight: float, gradients: list[float], case: Case) -> tuple[float, float, float]:
    """Take a step of Kingma & Ba, algorithm 1, or Loshchilov & Hutter, algorithm 2, on one number in float64."""
    m = v = 0.0
    for t, given in enumerate(gradients, start=1):
        gradient = -given if case.maximize else given
        decay = case.lr * case.weight_decay * weight if case.decoupled_weight_decay else 0.0
        if not case.decoupled_weight_decay:
            gradient += case.weight_decay * weight
        m = case.betas[0] * m + (1.0 - case.betas[0]) * gradient
        v = case.betas[1] * v + (1.0 - case.betas[1]) * gradient**2
        m_hat = m / (1.0 - math.pow(case.betas[0], t))
        v_hat = v / (1.0 - math.pow(case.betas[1], t))
        weight = weight - decay - case.lr * m_hat / (math.sqrt(v_hat) + case.eps)
    return weight, m, v


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_the_papers_in_float64(case: Case) -> None:
    weights = random_tensor(16, 0, torch.float64)
    gradients = [random_tensor(16, step, torch.float64) for step in range(1, 11)]
    parameter, exp_avg, exp_avg_sq = weights.clone(), torch.zeros(16).double(), torch.zeros(16).double()
    for step, gradient in enumerate(gradients, start=1):
        adam_(parameter, gradient, exp_avg, exp_avg_sq, step=step, **case.hyperparameters)
    for index in range(16):
        expected = paper_adam(weights[index].item(), [gradient[index].item() for gradient in gradients], case)
        found = (parameter[index].item(), exp_avg[index].item(), exp_avg_sq[index].item())
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_torch(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    parameter = random_tensor(300, 0, dtype)
    theirs = torch.nn.Parameter(parameter.clone())
    optimizer_class = torch.optim.AdamW if case.decoupled_weight_decay else torch.optim.Adam
    options = {key: value for key, value in case.hyperparameters.items() if key != "decoupled_weight_decay"}
    optimizer = optimizer_class([theirs], foreach=False, fused=False, **options)
    exp_avg, exp_avg_sq = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for step in range(1, 31):
        theirs.grad = random_tensor(300, step, dtype)
        optimizer.step()
        adam_(parameter, random_tensor(300, step, dtype), exp_avg, exp_avg_sq, step=step, **case.hyperparameters)
    assert_close(parameter, theirs.detach(), tolerance, 1.0)
    assert_close(exp_avg, optimizer.state[theirs]["exp_avg"], tolerance, 1.0)
    assert_close(exp_avg_sq, optimizer.state[theirs]["exp_avg_sq"], tolerance, 1.0)


def assert_close(a: Tensor, b: Tensor, tolerance: float, floor: float) -> None:
    assert a.dtype == b.dtype
    assert ((a - b).abs() <= tolerance * b.abs().clamp(min=floor)).all(), f"differ by {(a - b).abs().max()}"


def test_the_worked_example_is_right() -> None:
    parameter, exp_avg, exp_avg_sq = torch.tensor([2.0]), torch.zeros(1), torch.zeros(1)
    for step, expected in ((1, (0.3, 0.009, 1.999)), (2, (0.57, 0.017991, 1.998))):
        adam_(parameter, torch.tensor([3.0]), exp_avg, exp_avg_sq, step=step, lr=1e-3)
        found = (exp_avg.item(), exp_avg_sq.item(), parameter.item())
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_module_prints_the_worked_example() -> None:
    command = [sys.executable, "-m", "shardadam.update.reference"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    numbers = [tuple(map(float, row)) for row in re.findall(r"m = (\S+)\s+v = (\S+)\s+p = (\S+)", printed)]
    assert numbers == [(0.3, 0.009, 1.999), (0.57, 0.017991, 1.998)]


# Rounding


def exactly_half_away(value: float, dtype: torch.dtype) -> float:
    """Round in rational numbers to the nearest multiple of a unit in the last place, ties away from zero."""
    digits, min_exponent, largest = {
        torch.bfloat16: (8, -126, Fraction(255) * Fraction(2) ** 120),
        torch.float16: (11, -14, Fraction(65504)),
    }[dtype]
    if math.isinf(value) or math.isnan(value) or value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, min_exponent)
    unit = Fraction(2) ** (exponent - (digits - 1))
    rounded = (abs(Fraction(value)) / unit + Fraction(1, 2)).__floor__() * unit
    return math.copysign(math.inf if rounded > largest else float(rounded), value)


def from_bits(bits: list[int]) -> Tensor:
    return torch.tensor([struct.unpack("<f", struct.pack("<I", b))[0] for b in bits], dtype=torch.float32)


def sample_of_floats(dtype: torch.dtype) -> Tensor:
    """Return floats of all exponents and signs; half are ties or one bit off a tie."""
    rng = random.Random(0)
    low_bits = 16 if dtype == torch.bfloat16 else 13
    bits = []
    for exponent, sign, _ in itertools.product(range(255), (0, 1), range(8)):
        high = rng.getrandbits(23) >> low_bits << low_bits
        near_tie = (1 << (low_bits - 1)) + rng.choice((-1, 0, 0, 1))
        bits += [(sign << 31) | (exponent << 23) | fraction for fraction in (rng.getrandbits(23), high | near_tie)]
    largest = [0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x477FF001]
    smallest = [0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x33000000, 0x32FFFFFF, 0x33000001]
    edges = [*largest, *smallest, 0x7F800000]
    return from_bits(bits + edges + [edge | 0x80000000 for edge in edges])


ROUNDINGS = pytest.mark.parametrize("rounding", [round_half_away, fused.round_half_away], ids=["reference", "fused"])


@ROUNDINGS
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_rounding_equals_its_definition_in_rational_numbers(rounding: Any, dtype: torch.dtype) -> None:
    values = sample_of_floats(dtype)
    kept = values.clone()
    found = rounding(values, dtype)
    expected = torch.tensor([exactly_half_away(value, dtype) for value in values.tolist()], dtype=torch.float64)
    assert found.dtype == dtype
    assert torch.equal(found.double(), expected)
    assert torch.equal(found.signbit(), values.signbit())
    assert torch.equal(values, kept)


@ROUNDINGS
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_every_tie_rounds_away_from_zero_and_values_beside_it_to_the_nearest(rounding: Any, dtype: torch.dtype) -> None:
    infinity = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    below = torch.arange(infinity, dtype=torch.int16)  # the bits of every finite value >= 0, with subnormals
    above = below + 1
    low = below.view(dtype).double()
    past_the_largest = 2.0 ** {torch.bfloat16: 128, torch.float16: 16}[dtype]
    high = torch.where(above == infinity, past_the_largest, above.view(dtype).double())
    ties = ((low + high) / 2).float()
    assert torch.equal(ties.double(), (low + high) / 2)
    bits = ties.view(torch.int32)
    for value, expected in ((ties, above), (from_int32(bits - 1), below), (from_int32(bits + 1), above)):
        assert torch.equal(rounding(value, dtype).view(torch.int16), expected)
        assert torch.equal(rounding(-value, dtype).view(torch.int16), expected | -0x8000)


def from_int32(bits: Tensor) -> Tensor:
    return bits.contiguous().view(torch.float32)


@ROUNDINGS
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_representable_values_are_unchanged_and_nan_stays_nan(rounding: Any, dtype: torch.dtype) -> None:
    every = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16).view(dtype)
    is_nan = every.isnan()
    found = rounding(every.float(), dtype)
    assert torch.equal(found.isnan(), is_nan)
    assert torch.equal(found[~is_nan].view(torch.int16), every[~is_nan].view(torch.int16))
    odd_nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FFF8000, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert odd_nans.isnan().all()
    assert rounding(odd_nans, dtype).isnan().all()
