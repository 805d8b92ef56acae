# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="untyped-decorator,import-untyped,var-annotated"
"""The update of CPU shards in one pass, compiled by Numba: equal bit for bit to ``reference``, in every format.

A thread takes tiles of a few blocks that belong to one parameter. It decodes a tile into float32 arrays in the cache,
updates these, and encodes them again. All formats are one compiled function, so Numba compiles once, in some seconds,
and keeps the result on disk. Imports Numba, so it must be imported only where ``has_numba`` says so.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from shardadam.layout import ALIGNMENT_NUMEL, Bucket
from shardadam.sums.compiled import prepare_sums
from shardadam.sums.native import (
    BFLOAT16,
    ELEMENTS,
    FLOAT32,
    addresses_of,
    carray,
    compiled,
    f32,
    float32_at,
    float64_at,
    i32,
    in_threads,
    int32_at,
    int64_at,
    load,
    load_scattered,
    load_sum,
    owner_of,
    prepare,
    u32,
    uint8_at,
)
from shardadam.sums.scattered import Scattered
from shardadam.update.compiled_formats import (
    IN_BFLOAT16,
    IN_FLOAT32,
    IN_INT8,
    MASTER,
    MOST_ROOT,
    NONE,
    OWN,
    SPLIT,
    decode_moments,
    decode_weight,
    encode_moments,
    encode_weight,
    hash_positions,
    mixed,
    store_bfloat16,
)
from shardadam.update.reference import GOLDEN_WORD, mix
from shardadam.update.shard import SCALARS, Counters, Shard, Sources, StepInputs

BLOCK = ALIGNMENT_NUMEL
TILE_BLOCKS = 8
"""Blocks of a tile: its arrays fit a core's smallest cache."""
TILE = TILE_BLOCKS * BLOCK
COLUMNS = SCALARS
FLAT, SCATTERED = range(2)
"""Where gradients are: in flat sources, or at an address for each parameter."""


class CompiledUpdate:
    """An ``Update`` (see there) on CPUs; a shard of any format is one call, in as many threads as torch uses."""

    needs_host_used = False
    takes_several = False

    def __init__(self, counters: Counters, *, seed: int) -> None:
        self._counters = counters
        _prepare()
        self._table = torch.zeros((1 + counters.steps.numel(), COLUMNS), device="cpu")
        self._key = mix((seed + GOLDEN_WORD) & 0xFFFFFFFF)

    @property
    def nbytes(self) -> int:
        return self._table.nbytes

    def reload(self) -> None:
        return None

    def begin(self, inputs: StepInputs) -> None:
        counters, group = self._counters, inputs.hyperparameters
        beta1, beta2 = map(float, group["betas"])
        coefficient = 1.0 if inputs.coefficient is None else float(inputs.coefficient)
        n_averaged = counters.n_averaged
        begin_step(
            counters.steps.data_ptr(),
            counters.bounds.data_ptr(),
            counters.param_ids.data_ptr(),
            0 if n_averaged is None else n_averaged.data_ptr(),
            counters.steps.numel(),
            inputs.used.data_ptr(),
            bool(inputs.found_inf),
            -coefficient if group["maximize"] else coefficient,
            float(group["lr"]),
            beta1,
            beta2,
            0.0 if beta1 == 0 else beta1**2 / beta2 if beta2 > 0 else math.inf,
            (1 - beta1) ** 2 / (1 - beta2),
            float(group["eps"]),
            float(group["weight_decay"]),
            bool(group["decoupled_weight_decay"]),
            1.0 - (inputs.ema_decay or 0.0),
            self._key,
            self._table.data_ptr(),
        )

    def step_(
        self,
        shard: Shard,
        bucket: Bucket,
        gradients: Sources | Scattered | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        if found_inf is not None and bool(found_inf):
            return
        where, addresses, dtype, scale = _gradients_of(shard, gradients)
        kept = shard.remainder if shard.master is None else shard.master
        arguments = (
            _address(shard.parameter),
            ELEMENTS[shard.parameter.dtype],
            _address(kept),
            _weights_of(shard),
            _address(shard.exp_avg),
            _address(shard.exp_avg_sq),
            _address(shard.exp_avg_scale),
            _address(shard.exp_avg_sq_scale),
            _moments_of(shard),
            _address(shard.average),
            where,
            addresses.data_ptr(),
            addresses.numel(),
            ELEMENTS[dtype],
            scale,
            shard.blocks.data_ptr(),
            shard.blocks.element_size(),
            shard.first_block,
            self._counters.first_blocks.data_ptr(),
            self._counters.numels.data_ptr(),
            self._table.data_ptr(),
        )
        in_threads(lambda start, stop: update(*arguments, start, stop), shard.blocks.numel(), BLOCK)


@cache
def _prepare() -> None:
    prepare_sums()
    table = torch.zeros(COLUMNS, device="cpu")
    prepare(begin_step, 0, 0, 0, 0, 0, 0, True, *[0.0] * 8, True, 0.0, 0, table.data_ptr())
    prepare(update, *[0] * 14, 1.0, *[0] * 8)


def _gradients_of(shard: Shard, gradients: Sources | Scattered | None) -> tuple[int, Tensor, torch.dtype, float]:
    """Return where gradients are, their addresses, their dtype, and what multiplies a sum of flat ones."""
    if isinstance(gradients, Scattered):
        assert gradients.addresses is not None, "an arena with kernels has gradients with addresses"
        return SCATTERED, gradients.addresses.table, gradients.dtype, 1.0
    if isinstance(gradients, Sources):
        return FLAT, addresses_of(gradients.slices), gradients.slices[0].dtype, gradients.scale
    assert shard.gradient is not None, "the shard has no gradient, and step_ was given none"
    return FLAT, addresses_of([shard.gradient]), shard.gradient.dtype, 1.0


def _address(flat: Tensor | None) -> int:
    return 0 if flat is None else flat.data_ptr()


def _weights_of(shard: Shard) -> int:
    if shard.parameter.dtype == torch.float32:
        return OWN
    return MASTER if shard.master is not None else SPLIT if shard.remainder is not None else NONE


def _moments_of(shard: Shard) -> int:
    return {torch.float32: IN_FLOAT32, torch.bfloat16: IN_BFLOAT16, torch.int8: IN_INT8}[shard.exp_avg.dtype]


# Columns of the table. Row 0: what gradients are multiplied by, with the sign of ``maximize``; b1, 1 - b1, b2, 1 - b2,
# eps; the factor of decoupled weight decay, 1 - lr decay; and the factor of L2 decay.
COEFFICIENT, BETA1, REST1, BETA2, REST2, EPS, DECAY, L2 = range(8)
# Row 1 + i: 1 if parameter i takes this step, else 0; lr / (1 - b1^t); 1 / sqrt(1 - b2^t); C before this step; the key
# of its random bits, as the bits of an int32; how far the average moves: 1 at the first average, then 1 - decay, 0 if
# the step is skipped.
TAKEN, STEP_SIZE, CORRECTION, BOUND, KEY, RATE = range(6)


@compiled
def begin_step(
    steps,
    bounds,
    param_ids,
    n_averaged,
    count,
    used,
    found_inf,
    coefficient,
    lr,
    beta1,
    beta2,
    kept_bound,
    new_bound,
    eps,
    weight_decay,
    decoupled,
    rate,
    key,
    table,
):
    """Advance the counters of the parameters that take this step, and write its table; in float64.

    Args: addresses of the tensors of ``Counters``, of ``StepInputs.used`` and of the table; ``count`` parameters;
    C^2 after the step is ``kept_bound`` C^2 + ``new_bound``.
    """
    row = carray(float32_at(table), COLUMNS)
    row[COEFFICIENT], row[EPS] = coefficient, eps
    row[BETA1], row[REST1], row[BETA2], row[REST2] = beta1, 1.0 - beta1, beta2, 1.0 - beta2
    row[DECAY] = 1.0 - lr * weight_decay if decoupled else 1.0
    row[L2] = 0.0 if decoupled else weight_decay
    step_of, bound_of = carray(float32_at(steps), count), carray(float64_at(bounds), count)
    id_of, uses = carray(int64_at(param_ids), count), carray(uint8_at(used), count)
    for i in range(count):
        at = table + (1 + i) * COLUMNS * 4
        row, words = carray(float32_at(at), COLUMNS), carray(int32_at(at), COLUMNS)
        taken = uses[i] != 0 and not found_inf
        row[TAKEN] = 1.0 if taken else 0.0
        if taken:
            bound = bound_of[i]
            kept = 0.0 if kept_bound == 0.0 or bound == 0.0 else kept_bound * bound
            bound_of[i] = kept + new_bound
            step_of[i] += f32(1.0)
            t = float(step_of[i])
            row[STEP_SIZE] = lr / (1.0 - beta1**t)
            row[CORRECTION] = 1.0 / math.sqrt(1.0 - beta2**t)
            row[BOUND] = math.sqrt(bound)
            words[KEY] = i32(mixed(u32(mixed(u32(key + u32(t))) + u32(id_of[i]))))
        if n_averaged != 0:
            averages = carray(int64_at(n_averaged), count)
            row[RATE] = 0.0 if found_inf else 1.0 if averages[i] == 0 else rate
            averages[i] += 0 if found_inf else 1


@compiled
def update(
    parameter,
    element,  # of the parameter: one of ELEMENTS
    kept,  # master or remainder
    weights,  # OWN, MASTER, SPLIT, NONE
    exp_avg,
    exp_avg_sq,
    exp_avg_scale,
    exp_avg_sq_scale,
    moments,  # IN_FLOAT32, IN_BFLOAT16, IN_INT8
    average,
    where,  # FLAT, SCATTERED
    sources,  # int64: addresses of gradients
    source_count,
    source_element,
    scale,  # multiplies the sum of flat gradients
    blocks,
    block_bytes,  # of an element of blocks: 2 or 4
    first_block,  # the shard's first block in the arena
    first_blocks,
    numels,
    table,
    start,
    stop,
):
    """Do ``reference.step_`` on blocks ``start : stop``. Tensors are passed as addresses, 0 for None."""
    scratch = np.empty(5 * TILE, f32)
    first = scratch.ctypes.data
    w_scratch, g_scratch, m_scratch, v_scratch = first, first + 4 * TILE, first + 8 * TILE, first + 12 * TILE
    random = first + 16 * TILE
    scale32, scalars = f32(scale), carray(float32_at(table), COLUMNS)
    is_random = moments != IN_FLOAT32 or weights == NONE
    row = start
    while row < stop:
        owner = owner_of(blocks, block_bytes, row)
        end = row + 1
        while end < stop and end - row < TILE_BLOCKS and owner_of(blocks, block_bytes, end) == owner:
            end += 1
        at, n = row * BLOCK, (end - row) * BLOCK
        of_parameter = carray(float32_at(table + (1 + owner) * COLUMNS * 4), COLUMNS)
        taken = of_parameter[TAKEN] != 0.0
        rate = of_parameter[RATE] if average != 0 else f32(0.0)
        # Where the tile is in float32: where it is stored, or decoded.
        w = parameter + 4 * at if weights == OWN else kept + 4 * at if weights == MASTER else w_scratch
        m = exp_avg + 4 * at if moments == IN_FLOAT32 else m_scratch
        v = exp_avg_sq + 4 * at if moments == IN_FLOAT32 else v_scratch
        if weights == MASTER and not taken and rate != 0.0:  # its master stays as it is
            w = w_scratch
            load(w, kept, at, n, FLOAT32)
        if taken or rate != 0.0:
            decode_weight(w, parameter + 2 * at, kept + 2 * at, n, element, weights)
        if taken:
            g = g_scratch
            in_parameter = (first_block + row - carray(int64_at(first_blocks), owner + 1)[owner]) * BLOCK
            if where == SCATTERED:
                source = carray(int64_at(sources), source_count)[owner]
                numel = carray(int64_at(numels), owner + 1)[owner]
                load_scattered(g, source, in_parameter, numel, n, source_element)
            elif source_count == 1 and source_element == FLOAT32 and scale32 == f32(1.0) and scalars[L2] == f32(0.0):
                g = carray(int64_at(sources), 1)[0] + 4 * at
            else:
                load_sum(g, sources, source_count, at, n, source_element, scale32)
            if scalars[L2] != f32(0.0):
                add_decay(g, w, n, scalars)
            if is_random:
                key = u32(carray(int32_at(table + (1 + owner) * COLUMNS * 4), COLUMNS)[KEY])
                hash_positions(random, u32(in_parameter), key, n)
            if moments == IN_INT8:
                m_codes, v_codes = exp_avg + at, exp_avg_sq + at
                m_scales, v_scales = exp_avg_scale + 4 * row, exp_avg_sq_scale + 4 * row
                decode_moments(m, v, m_codes, v_codes, m_scales, v_scales, n, of_parameter[BOUND])
                adam(w, g, m, v, n, scalars, of_parameter, True)
                encode_moments(m, v, m_codes, v_codes, m_scales, v_scales, n, random)
            elif moments == IN_BFLOAT16:
                load(m, exp_avg, at, n, BFLOAT16)
                load(v, exp_avg_sq, at, n, BFLOAT16)
                adam(w, g, m, v, n, scalars, of_parameter, False)
                store_bfloat16(m, exp_avg + 2 * at, n, random, False)
                store_bfloat16(v, exp_avg_sq + 2 * at, n, random, True)
            else:
                adam(w, g, m, v, n, scalars, of_parameter, False)
            encode_weight(w, parameter + 2 * at, kept + 2 * at, n, element, weights, random)
        if rate != 0.0:
            move_average(average + 4 * at, w, n, rate)
        row = end


# Stages. Each works on a tile of n elements; w, g, m and v are addresses of float32, the others of what is stored.


@compiled
def add_decay(g_at, w_at, n, scalars):
    """Scale gradients, and add the L2 decay of the weights."""
    g, w = carray(float32_at(g_at), n), carray(float32_at(w_at), n)
    coefficient, l2 = scalars[COEFFICIENT], scalars[L2]
    for i in range(n):
        g[i] = g[i] * coefficient + l2 * w[i]


@compiled
def adam(w_at, g_at, m_at, v_at, n, scalars, of_parameter, wants_root):
    """Do ``reference.adam_``; with ``wants_root``, v receives its square root, at most ``LARGEST_ROOT``."""
    w, g = carray(float32_at(w_at), n), carray(float32_at(g_at), n)
    m, v = carray(float32_at(m_at), n), carray(float32_at(v_at), n)
    coefficient = scalars[COEFFICIENT] if scalars[L2] == f32(0.0) else f32(1.0)
    beta1, rest1, beta2, rest2 = scalars[BETA1], scalars[REST1], scalars[BETA2], scalars[REST2]
    eps, decay = scalars[EPS], scalars[DECAY]
    step_size, correction = of_parameter[STEP_SIZE], of_parameter[CORRECTION]
    for i in range(n):
        gradient = g[i] * coefficient
        average = beta1 * m[i] + rest1 * gradient
        square = beta2 * v[i] + rest2 * gradient * gradient
        root = f32(math.sqrt(square))
        m[i] = average
        v[i] = (MOST_ROOT if root > MOST_ROOT else root) if wants_root else square
        w[i] = w[i] * decay - step_size * average / (root * correction + eps)


@compiled
def move_average(average_at, w_at, n, rate):
    """Do ``reference.average_``."""
    average, w = carray(float32_at(average_at), n), carray(float32_at(w_at), n)
    if rate == f32(1.0):
        for i in range(n):
            average[i] = w[i]
    else:
        for i in range(n):
            average[i] += (w[i] - average[i]) * rate
