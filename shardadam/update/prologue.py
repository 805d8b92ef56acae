# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="untyped-decorator,import-untyped"
"""The prologue of the update by Triton: advances the counters, and writes the step's scalars to device memory.

So the host never waits, and the update itself computes in float32 alone. Imports Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shardadam.update.shard import SCALARS

# The table that the prologue writes for the update: float32, COLUMNS wide.
COLUMNS = tl.constexpr(SCALARS)
# Row 0, for all parameters: the coefficient, with the sign of ``maximize``; b1, 1 - b1, b2, 1 - b2, eps; the factor of
# decoupled weight decay, 1 - lr decay; and the factor of L2 decay. Without the one kind of decay its factor is 1, or 0.
COEFFICIENT, BETA1, REST1, BETA2, REST2, EPS, DECAY, L2 = (tl.constexpr(column) for column in range(8))
# Row 1 + i, for parameter i: 1 if it takes this step, else 0; lr / (1 - b1^t); 1 / sqrt(1 - b2^t); C before this step;
# the key of its random bits and its first block in the arena, these two as the bits of an int32; how far the average
# moves towards the weight: 1 at the first average, then 1 - decay, 0 if the step is skipped.
TAKEN, STEP_SIZE, CORRECTION, BOUND, KEY, FIRST_BLOCK, RATE = (tl.constexpr(column) for column in range(7))


@triton.jit(
    do_not_specialize=[
        "count",
        "lr_bits",
        "beta1",
        "beta2",
        "kept_bound",
        "new_bound",
        "eps",
        "weight_decay",
        "rate_of_average",
        "key",
    ]
)
def prologue(
    steps,  # float32, in and out: t of each parameter
    bounds,  # float64, in and out: C^2 of each parameter
    param_ids,  # int64: position of each parameter in param_groups
    first_blocks,  # int64: first block of each parameter in the arena
    n_averaged,  # int64, in and out: number of averages of each parameter; None without averages
    count,  # number of parameters
    used,  # bool: whether each parameter takes part
    found_inf,  # float32, 0-dim: not 0 if the step is skipped
    coefficient,  # float32, 0-dim: multiplies gradients; None for 1
    lr,  # the learning rate as a tensor of one element; None if lr_bits has it
    lr_bits,  # the learning rate; here and down to rate_of_average: float64 as the bits of an int64
    beta1,
    beta2,
    kept_bound,  # C^2 after the step is kept_bound times C^2 before it,
    new_bound,  # plus new_bound (reference.bound_squared_after)
    eps,
    weight_decay,
    rate_of_average,  # 1 - decay of averages
    key,  # hash of the seed
    table,  # float32, out: (1 + count) rows of COLUMNS
    DECOUPLED: tl.constexpr,  # bool: AdamW's weight decay instead of Adam's
    MAXIMIZE: tl.constexpr,  # bool: negate gradients
    LANES: tl.constexpr,  # parameters of one program
):
    """Advance the counters of the parameters that take this step, and write its table. Computes in float64.

    Every program writes row 0, all of them the same values.
    """
    rate = as_float64(lr_bits)
    if lr is not None:
        rate = tl.load(lr).to(tl.float64)
    b1, b2, decay = as_float64(beta1), as_float64(beta2), as_float64(weight_decay)
    scale = 1.0
    if coefficient is not None:
        scale = tl.load(coefficient)
    tl.store(table + COEFFICIENT, -scale if MAXIMIZE else scale)
    tl.store(table + BETA1, b1.to(tl.float32))
    tl.store(table + REST1, (1.0 - b1).to(tl.float32))
    tl.store(table + BETA2, b2.to(tl.float32))
    tl.store(table + REST2, (1.0 - b2).to(tl.float32))
    tl.store(table + EPS, as_float64(eps).to(tl.float32))
    tl.store(table + DECAY, (1.0 - rate * decay).to(tl.float32) if DECOUPLED else 1.0)
    tl.store(table + L2, 0.0 if DECOUPLED else decay.to(tl.float32))
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = index < count
    goes_on = tl.load(found_inf + 0 * index) == 0.0  # loaded as a vector: the interpreter mistypes a scalar
    taken = goes_on & inside & (tl.load(used + index, mask=inside, other=0) != 0)
    step = tl.load(steps + index, mask=taken, other=0.0) + 1.0
    bound = tl.load(bounds + index, mask=taken, other=0.0)
    kept = as_float64(kept_bound) * bound
    kept = tl.where(kept == kept, kept, 0.0)  # 0 times infinity is NaN: no old m, or none of it, is kept
    tl.store(steps + index, step, mask=taken)
    tl.store(bounds + index, kept + as_float64(new_bound), mask=taken)

    t = step.to(tl.int32)
    param_id = tl.load(param_ids + index, mask=inside, other=0).to(tl.uint32)
    first_block = tl.load(first_blocks + index, mask=inside, other=0).to(tl.int32)
    step_key = mixed(key.to(tl.int64).to(tl.uint32) + t.to(tl.uint32))
    row = table + (1 + index) * COLUMNS
    tl.store(row + TAKEN, taken.to(tl.float32), mask=inside)
    tl.store(row + STEP_SIZE, (rate / (1.0 - power(b1, t))).to(tl.float32), mask=taken)
    tl.store(row + CORRECTION, (1.0 / tl.sqrt(1.0 - power(b2, t))).to(tl.float32), mask=taken)
    tl.store(row + BOUND, tl.sqrt(bound).to(tl.float32), mask=taken)
    tl.store(row + KEY, mixed(step_key + param_id).to(tl.float32, bitcast=True), mask=taken)
    tl.store(row + FIRST_BLOCK, first_block.to(tl.float32, bitcast=True), mask=taken)
    if n_averaged is not None:
        count_before = tl.load(n_averaged + index, mask=inside, other=0)
        moved = tl.where(count_before == 0, 1.0, as_float64(rate_of_average).to(tl.float32))
        tl.store(row + RATE, tl.where(goes_on, moved, 0.0), mask=inside)
        tl.store(n_averaged + index, count_before + 1, mask=inside & goes_on)


@triton.jit
def as_float64(bits):
    """Return the inverse of ``_bits``."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def power(base, exponent):
    """Return float64 ``base`` to the power of int32 ``exponent``, 0 to 2^24: a float32 step counter stops there."""
    result = tl.full(exponent.shape, 1.0, tl.float64)
    for bit in range(25):
        result = tl.where((exponent >> bit) & 1 != 0, result * base, result)
        base = base * base
    return result


@triton.jit
def mixed(word):
    """Return ``reference.mix`` of uint32, whose products wrap."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)
