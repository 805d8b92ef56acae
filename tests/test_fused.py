# SPDX-License-Identifier: Apache-2.0
"""The fused update, torch's kernel with every storage format, equals the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shardadam.layout import ParameterSpec, build_layout
from shardadam.precision import Format
from shardadam.update import Counters, Shard, StepInputs, formats, reference
from shardadam.update.fused import FusedUpdate, adopt_written_

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FORMATS = [
    Format(FLOAT64, "fp32", "own"),
    *(Format(FLOAT32, moments, "own") for moments in ("fp32", "bf16", "int8")),
    *(
        Format(dtype, moments, master)
        for dtype in (BFLOAT16, FLOAT16)
        for moments in ("fp32", "bf16", "int8")
        for master in ("split", "fp32", "none")
    ),
]
AVERAGED = [replace(format, has_average=True) for format in FORMATS]


def name_of(format: Format) -> str:
    return f"{format.dtype}-{format.moments}-{format.master}{'-averages' * format.has_average}"


EVERY_FORMAT = pytest.mark.parametrize("format", [*FORMATS, *AVERAGED[::4]], ids=name_of)
CODED = [format for format in FORMATS if format.moments != "fp32" or format.master != "own"]

NUMELS = (300, 128, 140_032, 1, 130)  # the third is longer than one chunk (shardadam/chunks.py)
UNUSED = 3  # its index in the arena, which is in reverse order
STEPS = (1.0, 7.0, 40.0, 3.0, 1.0)
AVERAGED_BEFORE = (3, 0, 2, 0, 1)
DECAY = 0.9
SEED = 11


@dataclass
class Arena:
    """An arena with one bucket on one rank: the shard, and the offset of each parameter."""

    format: Format
    shard: Shard
    counters: Counters
    update: FusedUpdate
    bucket: Any

    def parts(self) -> list[tuple[int, slice]]:
        """Yield the index of every parameter and the elements of its blocks, with padding."""
        starts = [segment.offset for segment in self.bucket.shard_segments(0)]
        stops = [*starts[1:], self.bucket.numel]
        owners = [segment.parameter for segment in self.bucket.shard_segments(0)]
        return [(owner, slice(start, stop)) for owner, start, stop in zip(owners, starts, stops, strict=True)]

    def stored(self) -> dict[str, Tensor]:
        names = ("parameter", *formats.STATE)
        flats = {name: getattr(self.shard, name) for name in names}
        return {name: flat for name, flat in flats.items() if flat is not None}

    def step(
        self,
        hyperparameters: dict[str, Any],
        *,
        coefficient: float | None = None,
        inf: bool = False,
        shard_inf: bool | None = None,
        unused: int | None = UNUSED,
    ) -> None:
        used = [index != unused for index in range(len(NUMELS))]
        self.update.begin(
            StepInputs(
                found_inf=torch.tensor(float(inf)),
                used=torch.tensor(used),
                host_used=used,
                coefficient=None if coefficient is None else torch.tensor(coefficient),
                hyperparameters=hyperparameters,
                ema_decay=DECAY,
            )
        )
        self.update.step_(self.shard, self.bucket, None, None if shard_inf is None else torch.tensor(float(shard_inf)))


def hyperparameters(**changed: Any) -> dict[str, Any]:
    group = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, maximize=False, decoupled_weight_decay=True)
    return {**group, **changed}


def normal(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(format: Format) -> Arena:
    """Return an arena with values as after training: moments of gradients, and masters that the parameters round."""
    plan = build_layout([ParameterSpec(n, 4, 0) for n in NUMELS], world_size=1, bucket_bytes=1 << 30)
    (bucket,), (arena,) = plan.buckets, plan.arenas
    indices = {parameter: position for position, parameter in enumerate(arena.parameters)}
    bucket = replace(bucket, segments=tuple(p._replace(parameter=indices[p.parameter]) for p in bucket.segments))
    numel, exact = bucket.numel, format.exact_dtype
    lengths = [stop - start for start, stop in zip(arena.offsets, (*arena.offsets[1:], numel), strict=True)]
    state = formats.allocate(format, numel, torch.device("cpu"))
    weight = normal(numel, 1).to(exact)
    if format.dtype.itemsize == 2:
        parameter = reference.round_half_away(weight, format.dtype)
    else:
        parameter = weight.clone()
    past = normal(numel, 3).to(exact)
    formats.write_moments_(state, past / 2, past.square() / 2)
    formats.write_master_(state, parameter, weight)
    steps = torch.tensor([STEPS[i] for i in arena.parameters])
    bounds = [reference.bound_squared_at(float(step), (0.9, 0.999)) for step in steps]
    counters = Counters(
        steps=steps,
        bounds=torch.tensor(bounds, dtype=torch.float64),
        param_ids=torch.tensor([17 + i for i in arena.parameters]),
        first_blocks=torch.tensor(arena.offsets) // 128,
        numels=torch.tensor(lengths),
        n_averaged=torch.tensor([AVERAGED_BEFORE[i] for i in arena.parameters]) if format.has_average else None,
    )
    owners = torch.arange(len(lengths), dtype=torch.int16).repeat_interleave(torch.tensor(lengths) // 128)
    if format.has_average:
        state[formats.AVERAGE].copy_(normal(numel, 4))
    flats: dict[str, Any] = dict.fromkeys(formats.STATE) | state
    shard = Shard(parameter=parameter, gradient=normal(numel, 2).to(exact), blocks=owners, first_block=0, **flats)
    update = FusedUpdate(counters, seed=SEED, rank=0)
    update.reload()
    return Arena(format, shard, counters, update, bucket)


def step_reference(arena: Arena, group: dict[str, Any], *, coefficient: float | None = None) -> None:
    """Take the same step as ``Arena.step``, parameter by parameter, with the reference."""
    for index, part in arena.parts():
        blocks = slice(part.start // 128, part.stop // 128)
        stored = {name: flat[blocks if name in formats.SCALES else part] for name, flat in arena.stored().items()}
        averaged: dict[str, Any] = {}
        if arena.counters.n_averaged is not None:
            averaged = {"n_averaged": int(arena.counters.n_averaged[index]), "ema_decay": DECAY}
            arena.counters.n_averaged[index] += 1
        if index == UNUSED:
            if formats.AVERAGE in stored:
                weight = reference.exact_weight(stored["parameter"], stored.get("master"), stored.get("remainder"))
                reference.average_(stored[formats.AVERAGE], weight, **averaged)
            continue
        arena.counters.steps[index] += 1
        step = int(arena.counters.steps[index])
        positions = torch.arange(part.stop - part.start)
        gradient = arena.shard.gradient[part]
        reference.step_(
            stored.pop("parameter"),
            gradient if coefficient is None else gradient * coefficient,
            stored.pop("exp_avg"),
            stored.pop("exp_avg_sq"),
            step=step,
            bound_squared=float(arena.counters.bounds[index]),
            random=reference.random_bits(
                positions, seed=SEED, step=step, param_id=int(arena.counters.param_ids[index])
            ),
            **stored,
            **averaged,
            **group,
        )
        after = reference.bound_squared_after(float(arena.counters.bounds[index]), group["betas"])
        arena.counters.bounds[index] = after


def exact_state(arena: Arena) -> list[Tensor]:
    stored = arena.stored()
    master = formats.read_master(stored, arena.shard.parameter)
    averages = [stored[formats.AVERAGE]] if formats.AVERAGE in stored else []
    return [*formats.read_moments(stored), arena.shard.parameter if master is None else master, *averages]


def clone(arena: Arena) -> Arena:
    copied = build(arena.format)
    for name, flat in arena.stored().items():
        copied.stored()[name].copy_(flat)
    return copied


@pytest.mark.sweep(16)
@EVERY_FORMAT
@pytest.mark.parametrize(
    ("changed", "coefficient"),
    [
        ({}, None),
        ({"weight_decay": 0.0, "maximize": True}, 0.37),
        ({"decoupled_weight_decay": False, "betas": (0.5, 0.8), "eps": 1e-3}, None),
        ({"betas": (0.0, 0.99)}, 2.0),
        ({"betas": (0.9, 0.7)}, None),
    ],
    ids=str,
)
def test_fused_equals_reference(format: Format, changed: dict[str, Any], coefficient: float | None) -> None:
    """Moments and weights agree to 1e-6, except that codes and stochastic roundings may differ by one unit."""
    ours, truth = build(format), build(format)
    group = hyperparameters(**changed)
    for step in range(3):
        ours.step(group, coefficient=coefficient)
        step_reference(truth, group, coefficient=coefficient)
        for arena in (ours, truth):
            arena.shard.gradient.copy_(normal(arena.bucket.numel, 9 + step))
    assert torch.equal(ours.counters.steps, truth.counters.steps)
    assert torch.equal(ours.counters.bounds, truth.counters.bounds)
    floors = (1.0, 1.0, 10 * group["lr"], 10 * group["lr"])  # a step may move a weight by several lr
    for found, expected, floor in zip(exact_state(ours), exact_state(truth), floors, strict=False):
        excess = (found.double() - expected.double()).abs() - 1e-6 * expected.double().abs().clamp(min=floor)
        assert (excess > 0).float().mean() <= (2e-4 if format.is_random else 0.0)
        torch.testing.assert_close(found, expected, rtol=0.6 if format.is_random else 1e-5, atol=0.05)


@pytest.mark.parametrize("format", AVERAGED, ids=name_of)
def test_averages_of_exact_weights_equal_the_reference(format: Format) -> None:
    """Of the weights that torch's kernel has made; at first some parameters have no average yet. One takes no part."""
    arena = build(format)
    assert arena.counters.n_averaged is not None
    arena.shard.parameter[5:9] = 2.0  # written by the user
    for step in range(3):
        before, counts = arena.stored()[formats.AVERAGE].clone(), arena.counters.n_averaged.tolist()
        arena.step(hyperparameters(), coefficient=0.5 if step else None)
        weight = reference.exact_weight(arena.shard.parameter, arena.shard.master, arena.shard.remainder)
        for index, part in arena.parts():
            reference.average_(before[part], weight[part], n_averaged=counts[index], ema_decay=DECAY)
        average = arena.stored()[formats.AVERAGE]
        size = torch.maximum(weight.abs(), average.abs())
        assert bool(((average - before).abs() <= 2 * torch.finfo(average.dtype).eps * size).all())
        assert arena.counters.n_averaged.tolist() == [count + 1 for count in counts]
        arena.shard.gradient.copy_(normal(arena.bucket.numel, 9 + step))


def test_without_a_host_that_reads_averages_are_the_same() -> None:
    """As on devices without a kernel, where counters and skips stay on the device."""
    arenas = [build(format) for format in AVERAGED[:2] for _ in range(2)]
    for index, arena in enumerate(arenas):
        arena.update._on_cpu = index % 2 == 0
    for one, other in (arenas[:2], arenas[2:]):
        for step in range(3):
            for arena in (one, other):
                arena.step(hyperparameters(), inf=step == 1)
        assert torch.equal(one.stored()[formats.AVERAGE], other.stored()[formats.AVERAGE])
        assert torch.equal(one.counters.n_averaged, other.counters.n_averaged)
        assert not torch.equal(one.stored()[formats.AVERAGE], build(one.format).stored()[formats.AVERAGE])


@EVERY_FORMAT
def test_unused_parameters_are_left_unchanged(format: Format) -> None:
    arena, before = build(format), build(format)
    arena.step(hyperparameters(), coefficient=0.5)
    for name, flat in arena.stored().items():
        per_block = flat.view(len(arena.shard.blocks), -1)
        owners = arena.shard.blocks
        same = (per_block == before.stored()[name].view_as(per_block)).all(dim=1)
        assert same[owners == UNUSED].all() or name == formats.AVERAGE
        if name in ("parameter", "exp_avg"):
            assert not same[owners != UNUSED].any()


@EVERY_FORMAT
@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_nothing_is_written_where_a_gradient_is_not_finite(format: Format, coefficient: float | None) -> None:
    arena, before = build(format), build(format)
    arena.shard.gradient[5] = math.inf
    arena.shard.gradient[300] = math.nan
    arena.step(hyperparameters(), coefficient=coefficient, inf=True)
    for name, flat in arena.stored().items():
        assert torch.equal(flat, before.stored()[name])
    assert torch.equal(arena.counters.steps, before.counters.steps)
    assert torch.equal(arena.counters.bounds, before.counters.bounds)
    if arena.counters.n_averaged is not None:
        assert torch.equal(arena.counters.n_averaged, before.counters.n_averaged)


@EVERY_FORMAT
def test_a_shard_that_is_left_out_stays_as_it_is_and_its_steps_count(format: Format) -> None:
    arena, before = build(format), build(format)
    arena.shard.gradient[5] = math.inf
    arena.step(hyperparameters(), shard_inf=True)
    for name, flat in arena.stored().items():
        assert torch.equal(flat, before.stored()[name])
    assert torch.equal(
        arena.counters.steps, before.counters.steps + torch.tensor([i != UNUSED for i in range(len(NUMELS))])
    )
    taken = build(format)
    taken.step(hyperparameters(), shard_inf=False)
    assert not torch.equal(taken.shard.parameter, before.shard.parameter)


@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
def test_split_and_fp32_masters_are_the_same_bit_for_bit(moments: Any) -> None:
    split, whole = (build(Format(BFLOAT16, moments, master)) for master in ("split", "fp32"))
    for step in range(5):
        for arena in (split, whole):
            arena.shard.gradient.copy_(normal(arena.bucket.numel, step) * 10.0 ** (-step))
            arena.step(hyperparameters(lr=1e-3))
        for found, expected in zip(exact_state(split), exact_state(whole), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(split.shard.parameter, whole.shard.parameter)


WRITES = {
    "zeroed": lambda p: p.zero_(),
    "filled": lambda p: p.fill_(0.37),
    "filled with infinity": lambda p: p.fill_(math.inf),
    "negated": lambda p: p.neg_(),
    "pruned": lambda p: p[::2].zero_(),
    "negative zeros": lambda p: p.fill_(-0.0),
    "scaled by a power of two": lambda p: p.mul_(8),
    "set to the smallest": lambda p: p.fill_(torch.finfo(p.dtype).smallest_normal),
}


@pytest.mark.sweep(18)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("format", [f for f in FORMATS if f.dtype.itemsize == 2], ids=str)
def test_a_step_starts_from_the_value_written_to_the_parameter(format: Format, write: str) -> None:
    """Exact to half a unit of the parameter. Zeroed parameters once made half of the split masters NaN."""
    arena = build(format)
    before = formats.read_master(arena.stored(), arena.shard.parameter)
    old = reference.round_half_away(normal(arena.bucket.numel, 1).float(), format.dtype)
    WRITES[write](arena.shard.parameter)
    arena.shard.gradient.zero_()
    for name in set(arena.stored()) & {*formats.MOMENTS, *formats.SCALES}:
        arena.stored()[name].zero_()
    written = arena.shard.parameter.clone()
    arena.step(hyperparameters(weight_decay=0.0, lr=0.0), unused=None)
    assert torch.equal(arena.shard.parameter, written)
    master = formats.read_master(arena.stored(), arena.shard.parameter)
    if master is None:
        return
    assert not master.isnan().any()
    finite = written.isfinite()
    unit = ((written.view(torch.int16) + 1).view(format.dtype).float() - written.float()).abs()
    assert ((master - written.float()).abs() <= unit / 2)[finite].all()
    if format.master == "fp32":
        assert before is not None
        assert torch.equal(master, torch.where(written == old, before, written.float()))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_a_written_parameter_replaces_its_master_and_an_unwritten_one_keeps_it(dtype: torch.dtype) -> None:
    master = normal(1000, 5).float()
    parameter = reference.round_half_away(master, dtype)
    before = master.clone()
    adopt_written_(master, parameter)
    assert torch.equal(master, before)
    written = torch.arange(0, 1000, 3)
    parameter[written] = -2 * parameter[written] - 1
    parameter[6] = 0.0
    adopt_written_(master, parameter)
    expected = before.clone()
    expected[written] = parameter[written].float()
    assert torch.equal(master, expected)
    assert not torch.equal(expected, before)


@pytest.mark.parametrize("format", CODED, ids=str)
def test_extreme_values_equal_the_reference(format: Format) -> None:
    """Cases outside the fast path: infinite and NaN weights, moments that overflow, gradients that underflow."""
    ours, truth = build(format), build(format)
    for arena in (ours, truth):
        numel = arena.bucket.numel
        extremes = torch.tensor([0.0, -0.0, 1e-45, 1e-30, -1e-20, 1e10, -1e18, 3e19, -1e30, 3e38])
        arena.shard.gradient.copy_(extremes.repeat(numel // 10 + 1)[:numel])
        arena.shard.parameter[7::130] = math.inf
        arena.shard.parameter[8::130] = math.nan
    group = hyperparameters(lr=1e-3)
    for _ in range(2):
        ours.step(group)
        step_reference(truth, group)
    for found, expected in zip(exact_state(ours), exact_state(truth), strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())
        finite = expected.isfinite()
        wrong = (found[finite] - expected[finite]).abs() > 1e-5 * expected[finite].abs().clamp(min=1e-3)
        assert wrong.float().mean() <= (1e-3 if format.is_random else 0.0)


@pytest.mark.parametrize("master", ["split", "fp32", "none"])
def test_impossible_moments_are_bounded_as_in_the_reference(master: Any) -> None:
    """With random codes, most of m is far beyond the bound that v implies."""
    ours, truth = (build(Format(BFLOAT16, "int8", master)) for _ in range(2))
    for arena in (ours, truth):
        generator = torch.Generator().manual_seed(4)
        stored, numel = arena.stored(), arena.bucket.numel
        stored["exp_avg"].copy_(torch.randint(-127, 128, (numel,), generator=generator))
        stored["exp_avg_sq"].copy_(torch.randint(0, 256, (numel,), generator=generator))
        stored["exp_avg_scale"].fill_(1.0)
        stored["exp_avg_sq_scale"].fill_(1e-6)
        arena.shard.gradient.mul_(1e-3)
    before = formats.read_moments(ours.stored())[0].clone()
    ours.step(hyperparameters())
    step_reference(truth, hyperparameters())
    for found, expected in zip(exact_state(ours), exact_state(truth), strict=True):
        close = (found - expected).abs() <= 1e-5 * expected.abs().clamp(min=1e-3)
        assert close.float().mean() > 0.999
    after = formats.read_moments(ours.stored())[0]
    taken = ours.shard.blocks.repeat_interleave(128) != UNUSED
    assert after[taken].abs().max() < 0.01 * before.abs().max()
