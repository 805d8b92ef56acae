# SPDX-License-Identifier: Apache-2.0
"""Shards, gradients and steps for which every kernel of the update must equal the reference bit for bit.

Each ``differences_...`` takes steps with a kernel and with the reference and returns what differs, as text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from shardadam import layout
from shardadam.sums.scattered import Scattered
from shardadam.update import reference
from shardadam.update.reference import BLOCK_NUMEL
from shardadam.update.shard import Counters, Shard, StepInputs
from tests.test_reference import sample_of_floats

FORMATS = [("float32", "own")] + [(name, m) for name in ("bfloat16", "float16") for m in ("split", "fp32", "none")]


@dataclass(frozen=True)
class Variant:
    """A variant of the kernel."""

    moments: str
    dtype: str
    master: str

    def __str__(self) -> str:
        return f"{self.dtype}-{self.master}-{self.moments}"


VARIANTS = [Variant(moments, *weights) for moments in ("fp32", "bf16", "int8") for weights in FORMATS]

SEED = 20_001
ONLY_BUCKET: Any = None  # the kernel does not use it
LR = 3e-3


@dataclass(frozen=True)
class Step:
    hyperparameters: dict[str, Any]
    coefficient: float | None = None
    unused: tuple[int, ...] = ()


def adam_step(
    lr: Any = LR, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, **given: bool
) -> dict[str, Any]:
    flags = {"decoupled_weight_decay": True, "maximize": False, **given}
    return {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **flags}


STEPS = [
    Step(adam_step(weight_decay=0.1), unused=(2,)),
    Step(adam_step(), coefficient=0.37),
    Step(adam_step(weight_decay=0.01, decoupled_weight_decay=False, maximize=True), coefficient=3.0, unused=(0, 5)),
    Step(adam_step(betas=(0.5, 0.8), eps=1e-3, weight_decay=0.2, maximize=True)),
    Step(adam_step(lr=torch.tensor(1e-2), betas=(0.0, 0.99), decoupled_weight_decay=False)),
    Step(adam_step(lr=torch.tensor([2e-4], dtype=torch.float64), betas=(0.99, 0.9)), coefficient=1e-3),
    Step(adam_step(weight_decay=0.1)),
]

NUMELS = (700, 1, 128, 129, 300, 1000, 5)
"""Of the parameters; the shard begins in the middle of the first and ends with two blocks of padding."""
FIRST_BLOCK = 2
STEPS_BEFORE = (0, 1, 7, 1000, 123_456, 2, 40)
AVERAGED_BEFORE = (0, 1, 0, 2000, 123_456, 0, 2**40)
DECAY = 0.99


LITTLE = slice(9 * BLOCK_NUMEL, 10 * BLOCK_NUMEL)
"""A block whose 8-bit moments are so small that they have no scale."""


def build_counters(*, averages: bool = False) -> Counters:
    """Return counters of parameters with different step counts, and bounds of 0 steps, ordinary ones, and none."""
    blocks = torch.tensor([-(-numel // BLOCK_NUMEL) for numel in NUMELS])
    return Counters(
        steps=torch.tensor(STEPS_BEFORE, dtype=torch.float32),
        bounds=torch.tensor([0.0, 10.0, 31.0, 53.0, math.inf, 1e30, 1e-3], dtype=torch.float64),
        param_ids=torch.tensor([0, 3, 4, 5, 9, 11, 1000]),
        first_blocks=blocks.cumsum(0) - blocks,
        numels=torch.tensor(NUMELS),
        n_averaged=torch.tensor(AVERAGED_BEFORE) if averages else None,
    )


def blocks_of_parameters() -> Tensor:
    blocks = torch.cat([torch.full((-(-numel // BLOCK_NUMEL),), i) for i, numel in enumerate(NUMELS)])
    return torch.cat([blocks[FIRST_BLOCK:], blocks[-1:], blocks[-1:]]).to(torch.int16)


def build_shard(
    variant: Variant, random: torch.Generator, blocks: Tensor | None = None, *, averages: bool = False
) -> Shard:
    blocks = blocks_of_parameters() if blocks is None else blocks
    numel = len(blocks) * BLOCK_NUMEL
    dtype = getattr(torch, variant.dtype)
    weight = awkward_values(numel, random)
    is_int8 = variant.moments == "int8"
    if is_int8:
        exp_avg = torch.randint(-127, 128, (numel,), generator=random, dtype=torch.int8)
        exp_avg_sq = torch.randint(0, 256, (numel,), generator=random, dtype=torch.uint8)
        exp_avg[LITTLE] = exp_avg_sq[LITTLE] = 0
    else:
        moments_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[variant.moments]
        exp_avg = awkward_values(numel, random).to(moments_dtype)
        exp_avg_sq = awkward_values(numel, random).square().to(moments_dtype)
    remainder = None
    if variant.master == "split":  # random, as after a write to the parameters
        remainder = torch.randint(-(2**15), 2**15, (numel,), generator=random, dtype=torch.int16)
    return Shard(
        parameter=weight.to(dtype),
        gradient=torch.zeros(numel),
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        exp_avg_scale=random_scales(len(blocks), random) if is_int8 else None,
        exp_avg_sq_scale=random_scales(len(blocks), random) if is_int8 else None,
        master=weight.clone() if variant.master == "fp32" else None,
        remainder=remainder,
        blocks=blocks,
        first_block=FIRST_BLOCK,
        average=awkward_values(numel, random) if averages else None,
    )


def awkward_values(numel: int, random: torch.Generator) -> Tensor:
    """Return normally distributed values, a third of them of any size or zero, subnormal, huge or infinite."""
    ordinary = torch.randn(numel, generator=random)
    of_any_size = ordinary * 10.0 ** (60 * torch.rand(numel, generator=random) - 40)
    special = torch.tensor([0.0, -0.0, 1e-42, -1e-45, 1e-38, 6e-8, -3e-5, 65504.0, -65520.0, 1e25, 3.4e38, math.inf])
    special = special[torch.randint(0, len(special), (numel,), generator=random)]
    kind = torch.randint(0, 9, (numel,), generator=random)
    return torch.where(kind < 6, ordinary, torch.where(kind < 8, of_any_size, special))


def random_scales(numel: int, random: torch.Generator) -> Tensor:
    """Return scales of 8-bit moments, of any possible size, some zero."""
    exponents = torch.randint(-18, 0, (numel,), generator=random)
    return torch.where(exponents == -1, 0.0, torch.rand(numel, generator=random) * 10.0**exponents)


def flats_of(shard: Shard | Counters) -> dict[str, Tensor]:
    flats = {field.name: getattr(shard, field.name) for field in fields(shard)}
    return {name: flat for name, flat in flats.items() if isinstance(flat, Tensor)}


def clone(shard: Shard) -> Shard:
    return replace(shard, **{name: flat.clone() for name, flat in flats_of(shard).items()})


def to_device(state: Any, device: str) -> Any:
    """Return a Shard or Counters with its tensors on ``device``."""
    flats = {f.name: getattr(state, f.name) for f in fields(state)}
    return replace(state, **{name: flat.to(device) for name, flat in flats.items() if isinstance(flat, Tensor)})


def clone_counters(counters: Counters) -> Counters:
    return replace(counters, **{name: flat.clone() for name, flat in flats_of(counters).items()})


def overwrite_some(shard: Shard, random: torch.Generator) -> None:
    """Overwrite some parameters, as a user may, and replace all NaNs."""
    shard.parameter[shard.parameter.isnan()] = 0.5
    for flat in (shard.exp_avg, shard.exp_avg_sq):
        if flat.is_floating_point():
            flat[flat.isnan()] = 0.25
    for scale in (shard.exp_avg_scale, shard.exp_avg_sq_scale):
        if scale is not None:
            scale[~scale.isfinite()] = 1e-9
    written = torch.randint(0, 9, shard.parameter.shape, generator=random)
    shard.parameter[written == 0] = 0.0
    shard.parameter[written == 1] = -0.0
    shard.parameter[written == 2] *= -2.0


def step_reference(shard: Shard, counters: Counters, step: Step, *, decay: float = DECAY) -> None:
    """Take the step with the reference, parameter by parameter, with Python numbers."""
    for index in shard.blocks.unique().tolist():
        rows = (shard.blocks == index).nonzero().flatten()
        part = shard.narrow(slice(int(rows[0]) * BLOCK_NUMEL, (int(rows[-1]) + 1) * BLOCK_NUMEL))
        averaged: dict[str, Any] = {}
        if counters.n_averaged is not None:
            averaged = {"n_averaged": int(counters.n_averaged[index]), "ema_decay": decay}
        if index in step.unused:
            if part.average is not None:
                weight = reference.exact_weight(part.parameter, part.master, part.remainder)
                reference.average_(part.average, weight, **averaged)
            continue
        t = int(counters.steps[index]) + 1
        begin = (part.first_block - int(counters.first_blocks[index])) * BLOCK_NUMEL
        positions = torch.arange(begin, begin + part.parameter.numel())
        hyperparameters = {**step.hyperparameters, "lr": float(step.hyperparameters["lr"])}
        reference.step_(
            part.parameter,
            part.gradient * (1.0 if step.coefficient is None else step.coefficient),
            part.exp_avg,
            part.exp_avg_sq,
            step=t,
            master=part.master,
            remainder=part.remainder,
            exp_avg_scale=part.exp_avg_scale,
            exp_avg_sq_scale=part.exp_avg_sq_scale,
            bound_squared=float(counters.bounds[index]),
            random=reference.random_bits(positions, seed=SEED, step=t, param_id=int(counters.param_ids[index])),
            average=part.average,
            **averaged,
            **hyperparameters,
        )
    count_reference(counters, step)


def count_reference(counters: Counters, step: Step) -> None:
    if counters.n_averaged is not None:
        counters.n_averaged.add_(1)
    for index in range(len(counters.steps)):
        if index not in step.unused:
            counters.steps[index] += 1
            bound = reference.bound_squared_after(float(counters.bounds[index]), step.hyperparameters["betas"])
            counters.bounds[index] = bound


def begin(update: Any, counters: Counters, step: Step, found_inf: float = 0.0, *, decay: float = DECAY) -> None:
    device = counters.steps.device
    used = torch.ones(len(counters.steps), dtype=torch.bool)
    used[list(step.unused)] = False
    update.begin(
        StepInputs(
            found_inf=torch.tensor(found_inf, device=device),
            used=used.to(device),
            host_used=None,
            coefficient=None if step.coefficient is None else torch.tensor(step.coefficient, device=device),
            hyperparameters=step.hyperparameters,
            ema_decay=decay,
        )
    )


def new_update(kernel: str, counters: Counters, rows: int = 16) -> Any:
    """Return the update by a kernel.

    Args:
        kernel: "triton" or "numba".
        rows: blocks of one program of the interpreted Triton kernel: so few that a shard takes two and does not fill
            the last.
    """
    if kernel == "numba":
        from shardadam.update.compiled import CompiledUpdate

        return CompiledUpdate(counters, seed=SEED)
    from shardadam.update import triton

    triton.INTERPRETED_ROWS = rows
    return triton.TritonUpdate(counters, seed=SEED)


def differences_from_reference(
    variant: Variant,
    positions_before: int = 0,
    device: str = "cpu",
    *,
    averages: bool = False,
    decay: float = DECAY,
    kernel: str = "triton",
) -> list[str]:
    random = torch.Generator().manual_seed(VARIANTS.index(variant))
    truth, true_counters = build_shard(variant, random, averages=averages), build_counters(averages=averages)
    true_counters.first_blocks.sub_(positions_before // BLOCK_NUMEL)
    ours, counters = to_device(clone(truth), device), to_device(clone_counters(true_counters), device)
    update = new_update(kernel, counters)
    found = []
    for number, step in enumerate(STEPS):
        gradient = awkward_values(truth.gradient.numel(), random)
        gradient[LITTLE] = 1e-35 * gradient[LITTLE].clamp(-3, 3)
        for shard in (ours, truth):
            shard.gradient.copy_(gradient)
        begin(update, counters, step, decay=decay)
        update.step_(ours, ONLY_BUCKET)
        step_reference(truth, true_counters, step, decay=decay)
        there = to_device(ours, "cpu"), to_device(counters, "cpu")
        found += [f"step {number}: {text}" for text in differences(there[0], truth, there[1], true_counters)]
        truth = to_device(clone(ours), "cpu")
        overwrite_some(truth, random)
        ours = to_device(clone(truth), device)
    return found


def differences_after_no_step(variant: Variant, *, of_shard: bool, averages: bool, kernel: str = "triton") -> list[str]:
    """Skip the step, or only the update of the shard: then the counters advance."""
    random = torch.Generator().manual_seed(7)
    shard, counters = build_shard(variant, random, averages=averages), build_counters(averages=averages)
    shard.gradient.fill_(math.nan)
    before, counters_before = clone(shard), clone_counters(counters)
    update = new_update(kernel, counters)
    begin(update, counters, STEPS[0], found_inf=0.0 if of_shard else 1.0)
    update.step_(shard, ONLY_BUCKET, None, torch.tensor(1.0) if of_shard else None)
    if of_shard:
        count_reference(counters_before, STEPS[0])
    return differences(shard, before, counters, counters_before)


def differences_at_ties(variant: Variant, kernel: str = "triton") -> list[str]:
    """Round ties as masters that a step with lr 0 keeps, and as the result of a step from zero."""
    dtype = getattr(torch, variant.dtype)
    value = sample_of_floats(dtype)
    value = torch.cat([value, value.new_zeros(-len(value) % BLOCK_NUMEL)])
    zeros, found = torch.zeros_like(value), []
    stay, move = adam_step(lr=0.0), adam_step(lr=1.0, betas=(0.0, 0.999), eps=1.0)
    for weight, gradient, hyperparameters in ((value, zeros, stay), (zeros, -value, move)):
        parameter, remainder = reference.split(weight, dtype)
        shard = Shard(
            parameter=parameter,
            gradient=gradient,
            exp_avg=zeros.clone(),
            exp_avg_sq=zeros.clone(),
            exp_avg_scale=None,
            exp_avg_sq_scale=None,
            master=weight.clone() if variant.master == "fp32" else None,
            remainder=remainder if variant.master == "split" else None,
            blocks=torch.zeros(len(value) // BLOCK_NUMEL, dtype=torch.int16),
            first_block=0,
        )
        zero = torch.zeros(1, dtype=torch.int64)
        counters = Counters(torch.zeros(1), torch.zeros(1, dtype=torch.float64), zero, zero, zero)
        found += differences_after(Step(hyperparameters), shard, counters, kernel)
    return found


def differences_at_largest_codes(kernel: str = "triton") -> list[str]:
    """The largest value of each block has random number 0, and may exceed the largest code's square by a last place."""
    positions = torch.arange(2**22)
    random = reference.random_bits(positions, seed=SEED, step=1, param_id=0)
    positions = positions[(random & 0xFFFF == 0) | (random >> 16 == 0)]
    count = len(positions)
    numbers = torch.Generator().manual_seed(0)
    gradient = torch.rand(count, BLOCK_NUMEL, generator=numbers)
    gradient[torch.arange(count), positions % BLOCK_NUMEL] = 1 + torch.rand(count, generator=numbers)
    shard = Shard(
        parameter=torch.zeros(count * BLOCK_NUMEL),
        gradient=gradient.flatten(),
        exp_avg=torch.zeros(count * BLOCK_NUMEL, dtype=torch.int8),
        exp_avg_sq=torch.zeros(count * BLOCK_NUMEL, dtype=torch.uint8),
        exp_avg_scale=torch.zeros(count),
        exp_avg_sq_scale=torch.zeros(count),
        master=None,
        remainder=None,
        blocks=torch.arange(count, dtype=torch.int16),
        first_block=0,
    )
    counters = Counters(
        steps=torch.zeros(count),
        bounds=torch.zeros(count, dtype=torch.float64),
        param_ids=torch.zeros(count, dtype=torch.int64),
        first_blocks=torch.arange(count) - positions // BLOCK_NUMEL,
        numels=torch.full((count,), BLOCK_NUMEL),
    )
    return differences_after(Step(adam_step()), shard, counters, kernel)


def differences_after(step: Step, shard: Shard, counters: Counters, kernel: str) -> list[str]:
    truth, true_counters = clone(shard), clone_counters(counters)
    update = new_update(kernel, counters)
    begin(update, counters, step)
    update.step_(shard, ONLY_BUCKET)
    step_reference(truth, true_counters, step)
    return differences(shard, truth, counters, true_counters)


def differences_of_counters(kernel: str = "triton") -> list[str]:
    """Change betas many times, with more parameters than one program of the prologue takes."""
    count = 300
    zeros = torch.zeros(count, dtype=torch.int64)
    ours = Counters(torch.zeros(count), torch.zeros(count, dtype=torch.float64), zeros, zeros, zeros)
    true = Counters(torch.zeros(count), torch.zeros(count, dtype=torch.float64), zeros, zeros, zeros)
    update = new_update(kernel, ours)
    random = torch.Generator().manual_seed(0)
    for number in range(16):
        beta1, beta2 = torch.rand(2, generator=random, dtype=torch.float64).tolist()
        unused = torch.randint(0, 3, (count,), generator=random).eq(0).nonzero().flatten().tolist()
        betas = (0.0 if number % 5 == 3 else beta1, 0.0 if number == 10 else beta2)
        step = Step(adam_step(betas=betas), unused=tuple(unused))
        begin(update, ours, step)
        count_reference(true, step)
    pairs = ((ours.steps, true.steps), (ours.bounds, true.bounds))
    return [f"{a} is not {b}" for a, b in pairs if not torch.equal(a, b)]


ARENA_NUMELS = (300, 1, 128, 700, 0, 1000, 5)
"""Of the parameters of the arena, which is cut into buckets of 6 blocks for 2 ranks; some lie in several."""


@dataclass(frozen=True)
class ArenaShard:
    """The shard of rank 1 in an arena of several buckets.

    Args:
        shard: of all buckets, with positions.
        buckets: the shard of each bucket.
        plans: their layout; a segment's parameter is an index in ``counters``.
    """

    shard: Shard
    buckets: list[Shard]
    plans: list[layout.Bucket]
    counters: Counters

    def flats(self) -> dict[str, Tensor]:
        return {**flats_of(self.shard), **flats_of(self.counters)}


def build_arena_shard(variant: Variant, device: str = "cpu") -> ArenaShard:
    specs = [layout.ParameterSpec(numel, 4, "arena") for numel in reversed(ARENA_NUMELS)]
    plan = layout.build_layout(specs, world_size=2, bucket_bytes=6 * BLOCK_NUMEL * 4)
    last = len(ARENA_NUMELS) - 1  # layouts take parameters in reverse order
    plans = [
        replace(each, segments=tuple(s._replace(parameter=last - s.parameter) for s in each.segments))
        for each in plan.buckets
    ]
    offsets = torch.tensor(plan.arenas[0].offsets)
    position, block = [], []
    for bucket in plans:
        first = (bucket.offset + bucket.shard_numel) // BLOCK_NUMEL
        position.append(torch.arange(first, first + bucket.shard_numel // BLOCK_NUMEL))
        owners = torch.full((len(position[-1]),), 0)
        for segment in bucket.shard_segments(1):  # padding belongs to the parameter before it
            owners[segment.offset // BLOCK_NUMEL :] = segment.parameter
        block.append(owners)
    positions, blocks = torch.cat(position), torch.cat(block)
    random = torch.Generator().manual_seed(VARIANTS.index(variant))
    numel = plan.arenas[0].numel
    whole = build_shard(variant, random, torch.zeros(numel // BLOCK_NUMEL, dtype=torch.int16), averages=True)
    elements = (positions[:, None] * BLOCK_NUMEL + torch.arange(BLOCK_NUMEL)).flatten()
    state = {name: flat[positions if len(flat) < numel else elements] for name, flat in flats_of(whole).items()}
    state |= {"parameter": whole.parameter, "blocks": blocks.to(torch.int16), "positions": positions.int()}
    shard = to_device(replace(whole, **state), device)
    buckets, start = [], 0
    for bucket in plans:
        part = shard.narrow(slice(start, start + bucket.shard_numel))
        begin = bucket.offset + bucket.shard_numel
        parameter = shard.parameter[begin : begin + bucket.shard_numel]
        buckets.append(replace(part, parameter=parameter, first_block=begin // BLOCK_NUMEL, positions=None))
        start += bucket.shard_numel
    counters = replace(
        build_counters(averages=True), first_blocks=offsets // BLOCK_NUMEL, numels=torch.tensor(ARENA_NUMELS)
    )
    return ArenaShard(shard, buckets, plans, to_device(counters, device))


def gradients_of_arena(dtype: torch.dtype, random: torch.Generator, *, aligned: bool, device: str = "cpu") -> Scattered:
    """Return the gradients of the parameters, with none for one of them. Beyond each lie NaNs."""
    tensors: list[Tensor | None] = []
    for index, numel in enumerate(ARENA_NUMELS):
        storage = torch.full((numel + 64,), math.nan, dtype=dtype, device=device)
        tensor = storage[0 if aligned else 1 :][:numel]
        tensor.copy_(awkward_values(numel, random))
        tensors.append(None if index == 2 else tensor)
    return Scattered.with_addresses(tensors, dtype, torch.device(device))


def differences_between_forms(
    variant: Variant, dtype: str, device: str = "cpu", *, kernel: str = "triton"
) -> list[str]:
    """Take a step with float32 gradients, bucket by bucket, and in every other form."""
    number, kind = VARIANTS.index(variant), getattr(torch, dtype)
    step = STEPS[number % len(STEPS)]

    def take(gradients: Scattered, dtype: torch.dtype, *, scattered: bool, merged: bool) -> dict[str, Tensor]:
        arena = build_arena_shard(variant, device)
        update = new_update(kernel, arena.counters, rows=8)
        begin(update, arena.counters, step)
        flats = [torch.full((plan.shard_numel,), math.nan, dtype=dtype, device=device) for plan in arena.plans]
        if not scattered:
            for flat, plan in zip(flats, arena.plans, strict=True):
                gradients.write_(flat, plan.shard_segments(1), 0, plan.shard_numel)
        shards, flats = ([arena.shard], [torch.cat(flats)]) if merged else (arena.buckets, flats)
        for shard, flat in zip(shards, flats, strict=True):
            update.step_(replace(shard, gradient=flat), ONLY_BUCKET, gradients if scattered else None)
        return arena.flats()

    aligned, moved = (
        gradients_of_arena(kind, torch.Generator().manual_seed(number), aligned=aligned, device=device)
        for aligned in (True, False)
    )
    assert aligned.addresses and aligned.addresses.is_aligned and moved.addresses and not moved.addresses.is_aligned
    truth = take(aligned, torch.float32, scattered=False, merged=False)
    untouched = build_arena_shard(variant, device).flats()
    written = ("parameter", "exp_avg", "average")
    assert all((bits_of(truth[name]) != bits_of(untouched[name])).any() for name in written)
    forms = {
        "flat": take(aligned, kind, scattered=False, merged=False),
        "scattered": take(aligned, kind, scattered=True, merged=False),
        "scattered, unaligned": take(moved, kind, scattered=True, merged=False),
    }
    if new_update(kernel, build_counters()).takes_several:
        forms |= {
            "flat, merged": take(aligned, kind, scattered=False, merged=True),
            "scattered, merged": take(aligned, kind, scattered=True, merged=True),
            "scattered, merged, unaligned": take(moved, kind, scattered=True, merged=True),
        }
    found = []
    for form, flats in forms.items():
        for name, flat in flats.items():
            are_nan = flat.isnan() & truth[name].isnan()
            wrong = int(((bits_of(flat) != bits_of(truth[name])) & ~are_nan).sum())
            if name != "gradient" and wrong:
                found.append(f"{form}, {name}: {wrong} of {flat.numel()}")
    return found


def differences(ours: Shard, truth: Shard, counters: Counters, true_counters: Counters) -> list[str]:
    """Return the differing fields; the bits of NaNs and the remainder of a NaN do not count."""
    found = []
    pairs = {name: (flat, flats_of(truth)[name]) for name, flat in flats_of(ours).items() if name != "gradient"}
    pairs |= {name: (flat, flats_of(true_counters)[name]) for name, flat in flats_of(counters).items()}
    for name, (a, b) in pairs.items():
        wrong = bits_of(a) != bits_of(b)
        if a.is_floating_point():
            wrong &= ~(a.isnan() & b.isnan())
        if name == "remainder":
            wrong &= ~truth.parameter.isnan()
        if wrong.any():
            first = int(wrong.nonzero()[0])
            found.append(f"{name}: {int(wrong.sum())} of {wrong.numel()}; at {first} {a[first]}, truth {b[first]}")
    return found


def bits_of(flat: Tensor) -> Tensor:
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
