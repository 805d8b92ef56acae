# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="untyped-decorator,import-untyped,var-annotated"
"""Sums of gradients and of their squares on CPUs by Numba, in one pass over memory: equal bit for bit to ``reference``.

Imports Numba, so it must be imported only where ``has_numba`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from torch import Tensor

from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.sums.native import (
    ELEMENTS,
    FLOAT32,
    add,
    addresses_of,
    carray,
    compiled,
    f32,
    float32_at,
    float64_at,
    in_threads,
    int64_at,
    load,
    load_scattered,
    load_sum,
    owner_of,
    prepare,
    store,
)
from shardadam.sums.reference import PROGRAM_NUMEL, TILE_NUMEL, program_count
from shardadam.sums.scattered import Addresses

BLOCK = ALIGNMENT_NUMEL


def sum_(shard: Tensor, sources: Sequence[Tensor], squares: Tensor | None, *, scale: float, accumulate: bool) -> None:
    """Do ``reference.sum_``, and write ``reference.sums_of_squares`` of what is stored to ``squares``.

    Args:
        shard: 1-D and contiguous.
        sources: 1-D and contiguous, float32, bfloat16 or float16.
        squares: float64, one for every ``PROGRAM_NUMEL`` elements; None: do not compute them.
    """
    addresses = addresses_of(sources)
    arguments = (
        shard.data_ptr(),
        ELEMENTS[shard.dtype],
        shard.numel(),
        addresses.data_ptr(),
        len(sources),
        ELEMENTS[sources[0].dtype],
        float(scale),
        accumulate,
        0 if squares is None else squares.data_ptr(),
    )
    in_threads(lambda start, stop: sum_programs(*arguments, start, stop), program_count(shard.numel()), PROGRAM_NUMEL)


def measure(flat: Tensor, squares: Tensor) -> None:
    """Write ``reference.sums_of_squares`` of ``flat``, which is 1-D and contiguous, to ``squares``."""
    arguments = flat.data_ptr(), ELEMENTS[flat.dtype], flat.numel(), squares.data_ptr()
    in_threads(lambda start, stop: measure_flat(*arguments, start, stop), program_count(flat.numel()), PROGRAM_NUMEL)


def measure_scattered(
    addresses: Addresses,
    squares: Tensor,
    *,
    blocks: Tensor,
    first_blocks: Tensor,
    numels: Tensor,
    positions: Tensor | None = None,
    first_block: int = 0,
) -> None:
    """Write ``reference.sums_of_squares`` of a shard to ``squares``, reading gradients where they lie.

    Args:
        addresses: of the gradients.
        squares: float64, one for every ``PROGRAM_NUMEL`` elements of the shard.
        blocks, positions, first_block: as in ``update.Shard``.
        first_blocks, numels: as in ``update.Counters``.
    """
    arguments = (
        addresses.table.data_ptr(),
        ELEMENTS[addresses.dtype],
        numels.data_ptr(),
        first_blocks.data_ptr(),
        blocks.data_ptr(),
        blocks.element_size(),
        0 if positions is None else positions.data_ptr(),
        first_block,
        blocks.numel(),
        squares.data_ptr(),
    )
    count = program_count(blocks.numel() * BLOCK)
    in_threads(lambda start, stop: measure_blocks(*arguments, start, stop), count, PROGRAM_NUMEL)


@cache
def prepare_sums() -> None:
    """Compile, or read machine code from disk, so that no step has to."""
    prepare(sum_programs, 0, 0, 0, 0, 0, 0, 1.0, False, 0, 0, 0)
    prepare(measure_flat, 0, 0, 0, 0, 0, 0)
    prepare(measure_blocks, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0)


# Compiled. Tensors are passed as addresses, 0 for None; ``start : stop`` are sums of squares, as in ``reference``.


@compiled
def sum_programs(shard, element, numel, sources, count, source_element, scale, accumulate, squares, start, stop):
    buffer, sums = np.empty(TILE_NUMEL, f32), np.empty(TILE_NUMEL, np.float64)
    values, scale32 = buffer.ctypes.data, f32(scale)
    for program in range(start, stop):
        sums[:] = 0.0
        for at in range(program * PROGRAM_NUMEL, min((program + 1) * PROGRAM_NUMEL, numel), TILE_NUMEL):
            n = min(TILE_NUMEL, numel - at)
            load_sum(values, sources, count, at, n, source_element, scale32)
            if accumulate:
                add(values, shard, at, n, element)
            store(values, shard, at, n, element)
            if squares != 0:
                if element != FLOAT32:
                    load(values, shard, at, n, element)
                add_squares(sums, 0, values, n)
        if squares != 0:
            carray(float64_at(squares), stop)[program] = sum_in_pairs(sums)


@compiled
def measure_flat(flat, element, numel, squares, start, stop):
    buffer, sums = np.empty(TILE_NUMEL, f32), np.empty(TILE_NUMEL, np.float64)
    values = buffer.ctypes.data
    for program in range(start, stop):
        sums[:] = 0.0
        for at in range(program * PROGRAM_NUMEL, min((program + 1) * PROGRAM_NUMEL, numel), TILE_NUMEL):
            n = min(TILE_NUMEL, numel - at)
            load(values, flat, at, n, element)
            add_squares(sums, 0, values, n)
        carray(float64_at(squares), stop)[program] = sum_in_pairs(sums)


@compiled
def measure_blocks(
    addresses,  # int64: of each parameter's gradient, 0 for none
    element,
    numels,  # int64: elements of each parameter
    first_blocks,  # int64: first block of each parameter in the arena
    blocks,  # the parameter of each block of the shard
    block_bytes,  # of an element of blocks: 2 or 4
    positions,  # int32: where each block is in the arena; 0: one after the other
    first_block,  # the shard's first block in the arena, without positions
    block_count,
    squares,
    start,
    stop,
):
    buffer, sums = np.empty(BLOCK, f32), np.empty(TILE_NUMEL, np.float64)
    values, rows = buffer.ctypes.data, PROGRAM_NUMEL // BLOCK
    for program in range(start, stop):
        sums[:] = 0.0
        for row in range(program * rows, min((program + 1) * rows, block_count)):
            owner = owner_of(blocks, block_bytes, row)
            position = owner_of(positions, 4, row) if positions != 0 else first_block + row
            block = position - carray(int64_at(first_blocks), owner + 1)[owner]
            address = carray(int64_at(addresses), owner + 1)[owner]
            numel = carray(int64_at(numels), owner + 1)[owner]
            load_scattered(values, address, block * BLOCK, numel, BLOCK, element)
            add_squares(sums, row * BLOCK % TILE_NUMEL, values, BLOCK)
        carray(float64_at(squares), stop)[program] = sum_in_pairs(sums)


@compiled
def add_squares(sums, first, values_at, n):
    """Add squares of n values to ``sums[first : first + n]``."""
    values, part = carray(float32_at(values_at), n), sums[first : first + n]
    for i in range(n):
        part[i] += np.float64(values[i]) * np.float64(values[i])


@compiled
def sum_in_pairs(sums):
    """Return the sum of ``sums``, added in pairs of neighbours again and again."""
    length = TILE_NUMEL // 2
    while length > 0:
        for i in range(length):
            sums[i] = sums[2 * i] + sums[2 * i + 1]
        length //= 2
    return sums[0]
