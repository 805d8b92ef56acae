# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="untyped-decorator,import-untyped"
"""The update by Triton: one kernel for each shard, equal bit for bit to ``update/reference.py`` in every format.

Device functions have the names of the reference's functions and do the same operations in the same order. Before them a
prologue kernel advances the counters and writes the step's scalars to device memory, so the host never waits. Imports
Triton, so it must be imported only where ``has_kernel`` says so.
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardadam.layout import Bucket
from shardadam.sums.kernel import ELEMENTS, bits_of, from_bfloat16, load_scattered, sum_, to_float32
from shardadam.sums.scattered import Addresses, Scattered
from shardadam.update.prologue import (
    BETA1,
    BETA2,
    BOUND,
    COEFFICIENT,
    COLUMNS,
    CORRECTION,
    DECAY,
    EPS,
    FIRST_BLOCK,
    KEY,
    L2,
    RATE,
    REST1,
    REST2,
    STEP_SIZE,
    TAKEN,
    mixed,
    prologue,
)
from shardadam.update.reference import BLOCK_NUMEL, GOLDEN_WORD, LARGEST_M, LARGEST_ROOT, LARGEST_V, mix
from shardadam.update.shard import Counters, Shard, Sources, StepInputs

EXACT = True
"""Whether roots and quotients are correctly rounded and no multiplication is fused with an addition."""
ROWS, WARPS = 8, 4
"""Blocks of elements that one program of the update works on, and its warps."""
INTERPRETED_ROWS = 1024
"""The same in Triton's interpreter, whose time depends on the number of programs, not of blocks."""
PROLOGUE_LANES = 128
"""Parameters that one program of the prologue works on."""

BLOCK = tl.constexpr(BLOCK_NUMEL)
MAX_M, MAX_V, MAX_ROOT = tl.constexpr(LARGEST_M), tl.constexpr(LARGEST_V), tl.constexpr(LARGEST_ROOT)
SECOND_WORD = tl.constexpr(GOLDEN_WORD)
"""Added to random bits to make 32 more of them."""
MAGNITUDE, INFINITY = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)
"""All bits of a float32 but its sign; the bits of infinity."""
LARGEST_BFLOAT16 = tl.constexpr(0x7F7F0000)
"""The bits of the largest bfloat16, as a float32."""
FLOAT16_LOWEST_EXPONENT, FLOAT16_FRACTION_BITS = tl.constexpr(127 - 14), tl.constexpr(10)
"""The biased float32 exponent of float16's smallest normal number, and of its subnormal ones; bits of its fraction."""
TINY, INFINITE = tl.constexpr(2.0**-126), tl.constexpr(math.inf)
"""The smallest normal float32; infinity."""
UNIT_OF_RANDOM = tl.constexpr(2.0**-16)
"""What one unit of 16 random bits is worth."""


class TritonUpdate:
    """An ``Update`` (see there) that launches one kernel for each shard and, in ``begin``, one for the arena.

    If ``lr`` is a tensor on the counters' device, the kernel reads it when it runs, as a captured graph needs it.
    """

    needs_host_used = False
    takes_several = True

    def __init__(self, counters: Counters, *, seed: int) -> None:
        self._counters = counters
        self._table = counters.steps.new_zeros((1 + counters.steps.numel(), COLUMNS.value), dtype=torch.float32)
        self._key = mix((seed + GOLDEN_WORD) & 0xFFFFFFFF)

    @property
    def nbytes(self) -> int:
        return self._table.nbytes

    def reload(self) -> None:
        return None

    def begin(self, inputs: StepInputs) -> None:
        counters, hyperparameters = self._counters, inputs.hyperparameters
        lr = hyperparameters["lr"]
        beta1, beta2 = map(float, hyperparameters["betas"])
        reads_lr = isinstance(lr, Tensor) and lr.device == counters.steps.device
        kept_bound = 0.0 if beta1 == 0 else beta1**2 / beta2 if beta2 > 0 else math.inf
        decoupled = bool(hyperparameters["decoupled_weight_decay"])
        with torch.cuda.device_of(counters.steps):
            prologue[(triton.cdiv(counters.steps.numel(), PROLOGUE_LANES),)](
                counters.steps,
                counters.bounds,
                counters.param_ids,
                counters.first_blocks,
                counters.n_averaged,
                counters.steps.numel(),
                inputs.used,
                inputs.found_inf,
                inputs.coefficient,
                lr if reads_lr else None,
                _bits(0.0 if reads_lr else float(lr)),
                _bits(beta1),
                _bits(beta2),
                _bits(kept_bound),
                _bits((1 - beta1) ** 2 / (1 - beta2)),
                _bits(float(hyperparameters["eps"])),
                _bits(float(hyperparameters["weight_decay"])),
                _bits(1.0 - (inputs.ema_decay or 0.0)),
                self._key,
                self._table,
                DECOUPLED=decoupled,
                MAXIMIZE=bool(hyperparameters["maximize"]),
                LANES=PROLOGUE_LANES,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )

    def step_(
        self,
        shard: Shard,
        bucket: Bucket,
        gradients: Sources | Scattered | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        block_count = shard.blocks.numel()
        if block_count == 0:
            return
        addresses = gradients.addresses if isinstance(gradients, Scattered) else None
        if isinstance(gradients, Sources):  # the kernel itself reads one gradient only
            gradient = torch.empty_like(shard.exp_avg, dtype=torch.float32)
            sum_(gradient, gradients.slices, None, scale=gradients.scale, accumulate=False)
            shard = replace(shard, gradient=gradient)
        rows = INTERPRETED_ROWS if triton.knobs.runtime.interpret else ROWS
        with torch.cuda.device_of(shard.parameter):
            update[(triton.cdiv(block_count, rows),)](
                *arguments(shard, addresses, self._counters.numels),
                block_count,
                self._table,
                found_inf,
                **variant(shard, addresses),
                ROWS=rows,
                EXACT=EXACT,
                num_warps=WARPS,
                enable_fp_fusion=not EXACT,
            )


def variant(shard: Shard, addresses: Addresses | None) -> dict[str, Any]:
    """Return the formats of a shard and its gradients, as the arguments MOMENTS to ALIGNED of ``update``."""
    if shard.parameter.dtype == torch.float32:
        master = "own"
    elif shard.master is not None:
        master = "fp32"
    else:
        master = "split" if shard.remainder is not None else "none"
    moments = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}[shard.exp_avg.dtype]
    held = shard.gradient if addresses is None else addresses
    assert held is not None, "the shard has no gradient, and step_ was given none"
    element = ELEMENTS[held.dtype]
    is_aligned = addresses is None or addresses.is_aligned
    return {"MOMENTS": moments, "MASTER": master, "ELEMENT": element, "ALIGNED": is_aligned}


def arguments(shard: Shard, addresses: Addresses | None, numels: Tensor) -> tuple[Any, ...]:
    """Return a shard and its gradients as the first arguments of ``update``; bfloat16 as int16, its bits."""
    flats = (
        shard.parameter,
        None if addresses is not None else shard.gradient,
        None if addresses is None else addresses.table,
        None if addresses is None else numels,
        shard.exp_avg,
        shard.exp_avg_sq,
        shard.exp_avg_scale,
        shard.exp_avg_sq_scale,
        shard.remainder if shard.master is None else shard.master,
        shard.average,
        shard.blocks,
        shard.positions,
    )
    return (*(None if flat is None else bits_of(flat) for flat in flats), shard.first_block)


def _bits(value: float) -> int:
    """Return the bits of a float64, as an int64: Triton would pass a float argument as float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


# The update


@triton.jit(
    do_not_specialize=["first_block", "block_count"],
    do_not_specialize_on_alignment=["exp_avg_scale", "exp_avg_sq_scale", "blocks", "positions"],
)
def update(
    parameter,  # float32, float16, or int16: the bits of bfloat16; in and out, like all state
    gradient,  # float32, float16 or int16; None with addresses
    addresses,  # int64: of each parameter's gradient, 0 for none; None: gradients are in gradient
    numels,  # int64: elements of each parameter; None without addresses
    exp_avg,  # float32, int16 (the bits of bfloat16), or int8 codes
    exp_avg_sq,  # float32, int16 (the bits of bfloat16), or uint8 codes
    exp_avg_scale,  # float32, one for each block; None without codes
    exp_avg_sq_scale,  # float32, one for each block; None without codes
    kept,  # float32 master, int16 remainder, or None
    average,  # float32: of the exact weights; None: there is none
    blocks,  # int16 or int32: the parameter of each block
    positions,  # int32: where each block is in the arena, and then parameter is all of it; None: one after the other
    first_block,  # the shard's first block in the arena, without positions
    block_count,  # blocks of the shard
    table,  # float32: what the prologue has written
    found_inf,  # float32, 0-dim: not 0 if the shard stays as it is; None for 0
    MOMENTS: tl.constexpr,  # format of the moments: fp32, bf16, int8
    MASTER: tl.constexpr,  # format of the master: own (float32 parameters), fp32, split, none
    ELEMENT: tl.constexpr,  # of gradients: float32, float16, or int16, the bits of bfloat16
    ALIGNED: tl.constexpr,  # bool: all addresses are multiples of 16 bytes
    ROWS: tl.constexpr,  # blocks of one program
    EXACT: tl.constexpr,  # bool: correctly rounded roots and quotients
):
    """Do ``reference.step_`` on a tile of ROWS blocks: one row for each block, BLOCK columns."""
    start_row = tl.program_id(0).to(tl.int64) * ROWS
    start = start_row * BLOCK
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    element = row * BLOCK + lane

    inside = row < (block_count - start_row).to(tl.int32)
    owner = tl.load(blocks + start_row + row, mask=inside, other=0).to(tl.int32)
    scalars = table + COLUMNS * (1 + owner)
    taken = inside & (tl.load(scalars + TAKEN) != 0.0)
    if found_inf is not None:
        goes_on = tl.load(found_inf + 0 * row) == 0.0  # loaded as a vector: the interpreter mistypes a scalar
        taken &= goes_on
    read = taken
    if average is not None:  # also of parameters that take no part in the step
        read = inside & (tl.load(scalars + RATE) != 0.0)
        if found_inf is not None:
            read &= goes_on
    step_size = tl.load(scalars + STEP_SIZE, mask=taken, other=0.0)
    correction = tl.load(scalars + CORRECTION, mask=taken, other=0.0)
    if positions is not None:
        position = tl.load(positions + start_row + row, mask=inside, other=0)
        parameter += position.to(tl.int64) * BLOCK + lane
    else:
        position = (first_block + start_row).to(tl.int32) + row
        parameter += start + element
    kept_at = kept
    if MASTER == "fp32" or MASTER == "split":
        kept_at = kept + start + element
    exp_avg, exp_avg_sq = exp_avg + start + element, exp_avg_sq + start + element

    stored = tl.load(parameter, mask=read, other=0)
    weight = decode_weight(stored, kept_at, read, MASTER)
    m, v = tl.load(exp_avg, mask=taken, other=0), tl.load(exp_avg_sq, mask=taken, other=0)
    if MOMENTS == "int8":
        m_scale_at, v_scale_at = exp_avg_scale + start_row + row, exp_avg_sq_scale + start_row + row
        m_scale = tl.load(m_scale_at, mask=taken, other=0.0)
        v_scale = tl.load(v_scale_at, mask=taken, other=0.0)
        m, v = decode_moments(m, v, m_scale, v_scale, tl.load(scalars + BOUND, mask=taken, other=0.0))
    elif MOMENTS == "bf16":
        m, v = from_bfloat16(m), from_bfloat16(v)

    if addresses is not None or MOMENTS != "fp32" or MASTER == "none":
        first = tl.load(scalars + FIRST_BLOCK, mask=taken, other=0.0).to(tl.int32, bitcast=True)
        block = position - first  # in the parameter
    if addresses is not None:
        g = load_scattered(addresses, numels, owner, block, taken, ELEMENT, ALIGNED)
    else:
        g = to_float32(tl.load(gradient + start + element, mask=taken, other=0))
    before = weight
    weight, m, v, root = adam(weight, g, m, v, step_size, correction, table, EXACT)

    if MOMENTS != "fp32" or MASTER == "none":
        key = tl.load(scalars + KEY, mask=taken, other=0.0).to(tl.uint32, bitcast=True)
        random = mixed((block * BLOCK + lane).to(tl.uint32) ^ key)
    if MASTER == "own":
        tl.store(parameter, weight, mask=taken)
    elif MASTER == "fp32":
        tl.store(kept_at, weight, mask=taken)
        tl.store(parameter, round_half_away(weight, stored.dtype), mask=taken)
    elif MASTER == "split":
        high, low = split(weight, stored.dtype)
        tl.store(parameter, high, mask=taken)
        tl.store(kept_at, low, mask=taken)
    else:
        low_half = mixed(random + SECOND_WORD) & 0xFFFF
        rounded = round_stochastically(weight, stored.dtype, low_half)
        tl.store(parameter, rounded, mask=taken)
        weight = to_float32(rounded)  # nothing more exact is kept
    if average is not None:
        average += start + element
        # Here, not with the other loads, to save registers.
        rate, value = tl.load(scalars + RATE, mask=read, other=0.0), tl.load(average, mask=read, other=0.0)
        weight = tl.where(taken, weight, before)
        value = tl.where(rate == 1.0, weight, value + (weight - value) * rate)
        tl.store(average, value, mask=read)
    if MOMENTS == "int8":
        m_code, v_code, m_scale, v_scale = encode_moments(m, root, random, EXACT)
        tl.store(exp_avg, m_code, mask=taken)
        tl.store(exp_avg_sq, v_code, mask=taken)
        tl.store(m_scale_at, m_scale, mask=taken)
        tl.store(v_scale_at, v_scale, mask=taken)
    elif MOMENTS == "bf16":
        tl.store(exp_avg, round_stochastically(m, tl.int16, random & 0xFFFF), mask=taken)
        tl.store(exp_avg_sq, round_stochastically(v, tl.int16, random >> 16), mask=taken)
    else:
        tl.store(exp_avg, m, mask=taken)
        tl.store(exp_avg_sq, v, mask=taken)


@triton.jit
def adam(weight, gradient, m, v, step_size, correction, table, EXACT: tl.constexpr):
    """Return the new weight, m, v and the square root of v; ``reference.adam_``."""
    g = gradient * tl.load(table + COEFFICIENT)
    l2 = tl.load(table + L2)
    if l2 != 0.0:
        g += l2 * weight
    m = tl.load(table + BETA1) * m + tl.load(table + REST1) * g
    v = tl.load(table + BETA2) * v + tl.load(table + REST2) * g * g
    root = square_root(v, EXACT)
    denominator = root * correction + tl.load(table + EPS)
    weight = weight * tl.load(table + DECAY) - quotient(step_size * m, denominator, EXACT)
    return weight, m, v, root


@triton.jit
def square_root(value, EXACT: tl.constexpr):
    return tl.sqrt_rn(value) if EXACT else tl.sqrt(value)


@triton.jit
def quotient(a, b, EXACT: tl.constexpr):
    return tl.div_rn(a, b) if EXACT else a / b


# Master weights. bfloat16 is passed as int16, its bits.


@triton.jit
def decode_weight(stored, kept_at, taken, MASTER: tl.constexpr):
    """Return the float32 master behind a parameter."""
    value = to_float32(stored)
    if MASTER == "fp32":
        master = tl.load(kept_at, mask=taken, other=0.0)
        value = tl.where(to_float32(round_half_away(master, stored.dtype)) != value, value, master)
    elif MASTER == "split":
        value = join(stored, tl.load(kept_at, mask=taken, other=0))
    return value


@triton.jit
def round_half_away(value, dtype: tl.constexpr):
    bits = value.to(tl.int32, bitcast=True)
    is_finite = bits & MAGNITUDE < INFINITY
    if dtype == tl.int16:
        # Infinity has no low bits, and the NaNs that arithmetic makes are NaNs by their high bits alone.
        return (tl.where(is_finite, bits + 0x8000, bits) >> 16).to(tl.int16)
    else:
        # Setting the lowest bit moves an exact tie of float16 away from zero; all other values round as before.
        return tl.where(is_finite, bits | 1, bits).to(tl.float32, bitcast=True).to(tl.float16)


@triton.jit
def split(master, dtype: tl.constexpr):
    parameter = round_half_away(master, dtype)
    if dtype == tl.int16:
        return parameter, master.to(tl.int32, bitcast=True).to(tl.int16)
    else:
        value = parameter.to(tl.float32)
        units = (tl.abs(master) - tl.abs(value)) * float16_units(value, 16)
        # Half a last place is 32768 units, which int16 lacks. Where the parameter is not finite, neither are the units.
        units = tl.floor(units + 0.5)
        units = tl.where(units > 32767.0, 32767.0, units)
        return parameter, tl.where(tl.abs(units) <= 32768.0, units, 0.0).to(tl.int16)


@triton.jit
def join(parameter, remainder):
    if parameter.dtype == tl.int16:
        high, low = parameter.to(tl.int32) << 16, remainder.to(tl.int32)
        master, value = (high + low).to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
        of_nan = (high | (low & 0xFFFF)).to(tl.float32, bitcast=True)
        return tl.where(master != master, tl.where(value != value, of_nan, value), master)
    else:
        value = parameter.to(tl.float32)
        magnitude = tl.abs(value) + remainder.to(tl.float32) * (float16_ulp(value) * UNIT_OF_RANDOM)
        master = tl.where(value.to(tl.int32, bitcast=True) < 0, -magnitude, magnitude)
        rounded = round_half_away(master, tl.float16).to(tl.int16, bitcast=True)
        return tl.where(rounded == parameter.to(tl.int16, bitcast=True), master, value)


@triton.jit
def float16_exponent(value):
    """Return the biased float32 exponent of the unit in ``value``'s last place in float16."""
    exponent = (value.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return tl.maximum(exponent, FLOAT16_LOWEST_EXPONENT) - FLOAT16_FRACTION_BITS


@triton.jit
def float16_ulp(value):
    return (float16_exponent(value) << 23).to(tl.float32, bitcast=True)


@triton.jit
def float16_units(value, BITS: tl.constexpr):
    """Return 2^BITS / ``float16_ulp(value)``. Multiplying by it is exact, as dividing by the power of two would be."""
    return (254 + BITS - float16_exponent(value) << 23).to(tl.float32, bitcast=True)


# Stochastic rounding


@triton.jit
def round_stochastically(value, dtype: tl.constexpr, random):
    bits = value.to(tl.int32, bitcast=True)
    if dtype == tl.int16:
        rounds = bits & MAGNITUDE < LARGEST_BFLOAT16
        return (tl.where(rounds, bits + random.to(tl.int32), bits) >> 16).to(tl.int16)
    else:
        units = tl.abs(value) * float16_units(value, 0)
        whole = tl.floor(units)
        up = random.to(tl.int32).to(tl.float32) * UNIT_OF_RANDOM < units - whole
        magnitude = tl.where(up, whole + 1.0, whole) * float16_ulp(value)
        rounded = magnitude.to(tl.int32, bitcast=True) | (bits & ~MAGNITUDE)
        return tl.where(bits & MAGNITUDE < INFINITY, rounded, bits).to(tl.float32, bitcast=True).to(tl.float16)


# 8-bit moments


@triton.jit
def encode_moments(m, root, random, EXACT: tl.constexpr):
    root = tl.minimum(root, MAX_ROOT, tl.PropagateNan.ALL)
    m_code, m_scale = encode_root(tl.abs(m), MAX_M, random & 0xFFFF, EXACT)
    v_code, v_scale = encode_root(root, MAX_V, random >> 16, EXACT)
    m_code = tl.where(m < 0.0, -m_code, m_code)
    v_code = tl.where((root > 0.0) & (v_code < 1.0), 1.0, v_code)
    return m_code.to(tl.int8), v_code.to(tl.uint8), m_scale, v_scale


@triton.jit
def encode_root(value, LARGEST: tl.constexpr, random, EXACT: tl.constexpr):
    # Compared by their bits, so that a NaN is the largest of all and spreads to its block.
    largest = tl.max(value.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1, keep_dims=True).to(tl.float32, bitcast=True)
    scale = largest * (1 / (LARGEST * LARGEST))
    scale = tl.where(scale >= TINY, scale, 0.0)
    inverse = tl.where(scale > 0.0, quotient(1.0, scale, EXACT), 0.0)
    units = value * inverse
    code = tl.floor(square_root(units, EXACT))
    # Both are exact, with fused multiplications or without.
    width, rest = tl.fma(code, 2 * UNIT_OF_RANDOM, UNIT_OF_RANDOM), tl.fma(-code, code, units)
    up = random.to(tl.int32).to(tl.float32) * width < rest
    return tl.where(up & (code < LARGEST), code + 1.0, code), scale


@triton.jit
def decode_moments(m_code, v_code, m_scale, v_scale, bound):
    m, c = m_code.to(tl.float32), v_code.to(tl.float32)
    m = m * tl.abs(m) * m_scale
    root = c * c * v_scale
    is_bounded = bound < INFINITE
    limit = tl.fma(root, tl.where(is_bounded, bound, 0.0), tl.where(is_bounded, 0.0, INFINITE))
    m = tl.minimum(tl.maximum(m, -limit, tl.PropagateNan.ALL), limit, tl.PropagateNan.ALL)
    return m, root * root
