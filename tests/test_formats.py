# SPDX-License-Identifier: Apache-2.0
"""The storage formats of the reference: split masters are exact, stochastic rounding is unbiased, 8-bit moments are
bounded."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from shardadam.update import reference
from shardadam.update.reference import join, mix, random_bits, round_half_away, round_stochastically, split

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
LOW_PRECISION = pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
EDGES = (0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF)
EVERY_HIGH = torch.arange(-0x8000, 0x8000, dtype=torch.int32)
EVERY_16_BITS = torch.arange(1 << 16)


def low_words() -> list[int]:
    return [*EDGES, *random.Random(0).sample(range(1 << 16), 292)]


def bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)


def test_every_float32_is_restored_from_a_bfloat16_and_its_remainder() -> None:
    """All high words with 300 low words each. A NaN whose payload is in the low bits alone becomes a quiet NaN."""
    for low in low_words():
        master = (EVERY_HIGH * 65536 + low).view(torch.float32)
        parameter, remainder = split(master, BFLOAT16)
        back = join(parameter, remainder)
        signalling = master.isnan() & (bits(master) & 0x7F0000 == 0)
        assert torch.equal(bits(back)[~signalling], bits(master)[~signalling])
        assert back[signalling].isnan().all()
        assert torch.equal(parameter.isnan(), master.isnan())
        finite = ~master.isnan()
        rounded = round_half_away(master, BFLOAT16)
        assert torch.equal(parameter[finite].view(torch.int16), rounded[finite].view(torch.int16))


def test_the_nan_that_gpus_produce_stays_a_nan() -> None:
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    parameter, remainder = split(nan, BFLOAT16)
    assert parameter.isnan().all()
    assert torch.equal(bits(join(parameter, remainder)), bits(nan))


def test_float16_and_its_remainder_are_exact_down_to_two_to_the_minus_17() -> None:
    rng = random.Random(1)
    exponents = range(127 - 30, 127 + 16)
    fractions = [
        0,
        1,
        0xFFF,
        0x1000,
        0x1001,
        0x1FFF,
        0x2000,
        0x7FFFFF,
        0x7FF000,
        *(rng.getrandbits(23) for _ in range(500)),
    ]
    words = [(e << 23) | f for e in exponents for f in fractions]
    master = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    master = torch.cat([master, -master, torch.tensor([0.0, -0.0, 65504.0, 65519.0])])
    parameter, remainder = split(master, FLOAT16)
    back = join(parameter, remainder)
    assert torch.equal(parameter.view(torch.int16), round_half_away(master, FLOAT16).view(torch.int16))
    exact = (master.abs() >= 2.0**-17) & parameter.isfinite()
    assert torch.equal(bits(back)[exact], bits(master)[exact])
    assert ((back - master).abs()[master.abs() < 2.0**-17] <= 2.0**-40).all()
    assert torch.equal(back[parameter.isinf()], parameter.float()[parameter.isinf()])


@LOW_PRECISION
def test_a_stale_remainder_changes_a_written_value_by_at_most_half_a_unit(dtype: torch.dtype) -> None:
    parameter = EVERY_HIGH.to(torch.int16).view(dtype)
    finite = parameter.isfinite()
    unit = ((parameter.view(torch.int16) + 1).view(dtype).float() - parameter.float()).abs()
    for low in low_words():
        remainder = torch.full_like(EVERY_HIGH, low).to(torch.int16)
        master = join(parameter, remainder)
        assert torch.equal(master.isnan(), parameter.isnan())
        assert torch.equal(
            round_half_away(master[finite], dtype).view(torch.int16), parameter[finite].view(torch.int16)
        )
        assert ((master - parameter.float()).abs() <= unit / 2)[finite & unit.isfinite()].all()


# Stochastic rounding


@LOW_PRECISION
def test_stochastic_rounding_is_exact_in_the_mean(dtype: torch.dtype) -> None:
    smallest = 2.0**-24 if dtype == FLOAT16 else 1e-38
    rng = random.Random(2)
    for value in [
        1.0 + 2.0**-13,
        -math.pi,
        1000.1,
        -3.3 * smallest,
        0.4 * smallest,
        *(rng.gauss(0, 1) for _ in range(20)),
    ]:
        given = torch.full((1 << 16,), value)
        rounded = round_stochastically(given, dtype, EVERY_16_BITS).double()
        low, high = rounded.min(), rounded.max()
        exact = given[0].double()
        assert low <= exact <= high and rounded.unique().numel() <= 2
        assert (rounded.mean() - exact).abs() <= (high - low) * 2.0**-15


@LOW_PRECISION
def test_representable_values_are_not_rounded(dtype: torch.dtype) -> None:
    every = EVERY_HIGH.to(torch.int16).view(dtype)
    for given in (0, 1, 0x7FFF, 0xFFFF):
        found = round_stochastically(every.float(), dtype, torch.full_like(EVERY_HIGH, given))
        assert torch.equal(found.isnan(), every.isnan())
        same = found.view(torch.int16) == every.view(torch.int16)
        assert (same | every.isnan()).all()


def test_finite_values_beyond_the_largest_bfloat16_stay_finite() -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max, math.inf])
    found = round_stochastically(largest, BFLOAT16, torch.tensor([0xFFFF, 0xFFFF]))
    assert found.isinf().tolist() == [False, True]


def hash_in_plain_integers(seed: int, step: int, param_id: int, position: int) -> int:
    def finalise(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    key = finalise((seed + 0x9E3779B9) % 2**32)
    key = finalise((key + step) % 2**32)
    key = finalise((key + param_id) % 2**32)
    return finalise(position % 2**32 ^ key)


def test_random_numbers_are_the_documented_ones() -> None:
    """If the hash changed, saved runs could not be reproduced."""
    for seed, step, param_id, position in (
        (0, 1, 0, 0),
        (0, 1, 0, 1),
        (7, 100_000, 3, 2**33 + 5),
        (2**32 - 1, 5, 9, 127),
    ):
        found = random_bits(torch.tensor([position]), seed=seed, step=step, param_id=param_id)
        assert int(found) == hash_in_plain_integers(seed, step, param_id, position)
    assert int(random_bits(torch.tensor([0]), seed=0, step=1, param_id=0)) == 335112171
    inputs = torch.arange(1 << 20)
    assert mix(inputs).unique().numel() == len(inputs)  # type: ignore[union-attr]


def test_random_numbers_are_uniform_and_independent() -> None:
    positions = torch.arange(1 << 18)
    base = random_bits(positions, seed=0, step=1, param_id=0)
    others = [
        random_bits(positions, seed=1, step=1, param_id=0),
        random_bits(positions, seed=0, step=2, param_id=0),
        random_bits(positions, seed=0, step=1, param_id=1),
        base.roll(1),
        base.roll(128),
        reference.second_word(base),
        base >> 16,
    ]
    uniform = (base & 0xFFFF).double() / 65536 - 0.5
    assert uniform.mean().abs() < 0.003
    for shift in (0, 8, 16, 24):
        counts = torch.bincount(base >> shift & 0xFF, minlength=256).double()
        assert ((counts - 1024).square() / 1024).sum() < 400  # chi-square of 255 degrees of freedom
    for other in others:
        correlation = (uniform * ((other & 0xFFFF).double() / 65536 - 0.5)).mean() * 12
        assert correlation.abs() < 0.01


# 8-bit moments


def block(values: list[float]) -> Tensor:
    return torch.cat([torch.tensor(values), torch.zeros(128 - len(values))])


@pytest.mark.parametrize("largest", [reference.LARGEST_M, reference.LARGEST_V])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_codes_are_exact_in_the_mean(largest: int, size: float) -> None:
    """Also for small values in the block of a large one: rounded to the nearest, they would never decay."""
    row = (block([1.0, 0.5, 0.1, 1e-2, 1e-4, 3e-5, 1e-6, 0.0]) * size).expand(1 << 16, 128)
    codes, scale = reference.encode_root(row, largest, EVERY_16_BITS[:, None].expand(-1, 128))
    decoded = codes.double().square() * scale.double()[:, None]
    assert codes.min() >= 0 and codes.max() == largest
    error = (decoded.mean(dim=0) - row[0].double()).abs()
    unit = scale[0].double() * (2 * codes[0].double() + 1)  # between adjacent codes
    assert (error <= unit * 2.0**-15 + 1e-6 * row[0].double()).all()
    assert (codes[:, 7:] == 0).all()


def test_in_v_zero_and_only_zero_becomes_zero() -> None:
    v = block([1.0, 1e-30, 1e-12, 0.0])
    for word in (0, 0xFFFFFFFF):
        _, codes, _, scale = reference.encode_moments(block([0.5, 0.0]), v, torch.full((128,), word))
        assert (codes[:3] > 0).all() and (codes[3:] == 0).all()
        m, decoded = reference.decode_moments(torch.zeros(128, dtype=torch.int8), codes, scale, scale, math.inf)
        assert (decoded[3:] == 0).all() and (m == 0).all()


def test_an_infinite_v_saturates_and_leaves_its_block_finite() -> None:
    encoded = reference.encode_moments(block([1.0, 2.0]), block([math.inf, 1.0, 1e30]), torch.full((128,), 5))
    m, v = reference.decode_moments(*encoded, bound_squared=50.0)
    assert m.isfinite().all() and v.isfinite().all() and v[0] > 1e37


def test_a_bound_beyond_float32_does_not_apply() -> None:
    """A finite bound that overflows float32 once made m NaN wherever v was zero (betas 0.99, 0.9, at step 2135)."""
    bound = reference.bound_squared_at(2200.0, (0.99, 0.9))
    assert 3.5e38**2 < bound < math.inf
    codes = torch.full((128,), 5, dtype=torch.int8)
    zeros, one = torch.zeros(128, dtype=torch.uint8), torch.ones(1)
    m, v = reference.decode_moments(codes, zeros, one, one, bound)
    assert (m == 25.0).all() and (v == 0).all()


BETAS = [(0.9, 0.95), (0.9, 0.999), (0.99, 0.5), (0.0, 0.9), (0.5, 0.25)]


@pytest.mark.parametrize("betas", BETAS)
def test_the_bound_holds_and_is_tight_and_equals_its_closed_form(betas: tuple[float, float]) -> None:
    beta1, beta2 = betas
    generator = torch.Generator().manual_seed(0)
    bound = 0.0
    m, v = torch.zeros(2, 1000, dtype=torch.float64)
    sizes = torch.randn(1000, generator=generator, dtype=torch.float64).exp()
    for step in range(1, 31):
        # The first coordinate gets the gradients for which the Cauchy-Schwarz inequality is an equality.
        g = sizes * torch.randn(1000, generator=generator, dtype=torch.float64) ** 3
        g[0] = (beta1 / beta2) ** (30 - step)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        bound = reference.bound_squared_after(bound, betas)
        assert (m.abs() <= math.sqrt(bound) * v.sqrt() * (1 + 1e-12)).all()
        assert reference.bound_squared_at(float(step), betas) == pytest.approx(bound, rel=1e-9)
    assert float(m[0]) == pytest.approx(math.sqrt(bound) * math.sqrt(float(v[0])), rel=1e-9)


def test_the_bound_holds_for_changing_betas_and_ends_where_v_is_forgotten() -> None:
    rng, bound = random.Random(0), 0.0
    m = v = 0.0
    for _ in range(500):
        betas = (rng.random(), 0.05 + 0.94 * rng.random())
        g = rng.gauss(0, 1) * math.exp(rng.gauss(0, 3))
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        bound = reference.bound_squared_after(bound, betas)
        assert abs(m) <= math.sqrt(bound * v) * (1 + 1e-12)
    assert reference.bound_squared_after(bound, (0.9, 0.0)) == math.inf
    assert reference.bound_squared_after(math.inf, (0.9, 0.5)) == math.inf
    assert reference.bound_squared_after(math.inf, (0.0, 0.5)) == 2.0
    assert reference.bound_squared_after(0.0, (0.9, 0.0)) == pytest.approx(0.01)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_sparse_rows_beside_a_large_coordinate_are_updated_as_in_fp32(beta2: float) -> None:
    """One gradient of each block is steady and 20 times as large; the others are nonzero in 2% of the steps."""
    numel, lr, betas = 32 * 128, 1e-3, (0.9, beta2)
    generator = torch.Generator().manual_seed(0)
    exact = [torch.zeros(numel) for _ in range(3)]
    weight = torch.zeros(numel)
    codes = [torch.zeros(numel, dtype=torch.int8), torch.zeros(numel, dtype=torch.uint8)]
    scales = [torch.zeros(numel // 128), torch.zeros(numel // 128)]
    large = torch.arange(numel) % 128 == 0
    bound = largest_excess = 0.0
    for step in range(1, 1001):
        gradient = torch.randn(numel, generator=generator) * (torch.rand(numel, generator=generator) < 0.02)
        gradient[large] = 20 * (1 + 0.1 * torch.randn(numel // 128, generator=generator))
        group = dict(step=step, lr=lr, betas=betas, weight_decay=0.0)
        reference.step_(*exact[:1], gradient, *exact[1:], **group)  # type: ignore[arg-type]
        before = weight.clone()
        reference.step_(
            weight,
            gradient,
            *codes,
            exp_avg_scale=scales[0],
            exp_avg_sq_scale=scales[1],
            bound_squared=bound,
            random=random_bits(torch.arange(numel), seed=0, step=step, param_id=0),
            **group,  # type: ignore[arg-type]
        )
        bound = reference.bound_squared_after(bound, betas)
        most = math.sqrt(bound) * lr / (1 - betas[0] ** step) * math.sqrt(1 - beta2**step)
        largest_excess = max(largest_excess, float((weight - before).abs().max()) / most)
    assert largest_excess <= 1 + 1e-4  # the weight itself is rounded
    rms, rms_exact = (w[~large].square().mean().sqrt() for w in (weight, exact[0]))
    print(
        f"b2 {beta2}: largest update {largest_excess:.4f} of the bound, rms displacement {rms / rms_exact:.3f} x fp32's"
    )
    assert rms <= 2 * rms_exact
