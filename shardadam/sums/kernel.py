# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="untyped-decorator,import-untyped"
"""Sums of gradients and of their squares by Triton, in one pass over memory: equal bit for bit to ``reference``.

bfloat16 is passed as int16, its bits. Imports Triton, so it must be imported only where ``has_kernel`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.sums.reference import PROGRAM_NUMEL, TILE_NUMEL, program_count
from shardadam.sums.scattered import ALIGNMENT_BYTES, Addresses

__all__ = ["PROGRAM_NUMEL", "measure", "measure_scattered", "sum_"]

WARPS = 8
BLOCK = tl.constexpr(ALIGNMENT_NUMEL)
PROGRAM, TILE = tl.constexpr(PROGRAM_NUMEL), tl.constexpr(TILE_NUMEL)
TILES, TILE_BLOCKS = tl.constexpr(PROGRAM_NUMEL // TILE_NUMEL), tl.constexpr(TILE_NUMEL // ALIGNMENT_NUMEL)
TILE_BITS = tl.constexpr(TILE_NUMEL.bit_length() - 1)
WORD_BYTES = tl.constexpr(ALIGNMENT_BYTES)
ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.int16}
"""What kernels load for an element of each dtype."""


def sum_(shard: Tensor, sources: Sequence[Tensor], squares: Tensor | None, *, scale: float, accumulate: bool) -> None:
    """Do ``reference.sum_``, and write ``reference.sums_of_squares`` of what is stored to ``squares``, in one launch.

    Sources that do not lie at equal distances, as chunks of one buffer do, are copied first.

    Args:
        shard: 1-D and contiguous.
        sources: 1-D and contiguous, float32, bfloat16 or float16, on the device of ``shard``.
        squares: float64, one for every ``PROGRAM_NUMEL`` elements; None: do not compute them.
    """
    numel = shard.numel()
    if numel == 0:
        return
    distance = _distance(sources)
    if distance is None:
        sources, distance = torch.cat(list(sources)).chunk(len(sources)), numel
    with torch.cuda.device_of(shard):
        sum_sources[_grid(numel)](
            bits_of(shard),
            bits_of(sources[0]),
            distance,
            squares,
            numel,
            scale,
            COUNT=len(sources),
            ACCUMULATE=accumulate,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


def measure(flat: Tensor, squares: Tensor) -> None:
    """Write ``reference.sums_of_squares`` of ``flat``, which is 1-D and contiguous, to ``squares``, in one launch."""
    numel = flat.numel()
    if numel > 0:
        with torch.cuda.device_of(flat):
            measure_flat[_grid(numel)](bits_of(flat), squares, numel, num_warps=WARPS)


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
    """Write ``reference.sums_of_squares`` of a shard to ``squares``, reading gradients where they lie, in one launch.

    Args:
        addresses: of the gradients.
        squares: float64, one for every ``PROGRAM_NUMEL`` elements of the shard.
        blocks, positions, first_block: as in ``update.Shard``.
        first_blocks, numels: as in ``update.Counters``.
    """
    count = blocks.numel()
    if count > 0:
        with torch.cuda.device_of(blocks):
            measure_blocks[_grid(count * ALIGNMENT_NUMEL)](
                addresses.table,
                numels,
                first_blocks,
                blocks,
                positions,
                first_block,
                count,
                squares,
                ELEMENT=ELEMENTS[addresses.dtype],
                ALIGNED=addresses.is_aligned,
                num_warps=WARPS,
            )


def launch_nothing(device: torch.device) -> None:
    """Build and launch a kernel that does nothing.

    Raises:
        Exception: of many types: Triton cannot.
    """
    do_nothing[(1,)](torch.empty(1, device=device))


def bits_of(flat: Tensor) -> Tensor:
    """Return ``flat``, bfloat16 as int16."""
    return flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat


def _grid(numel: int) -> tuple[int]:
    return (program_count(numel),)


def _distance(sources: Sequence[Tensor]) -> int | None:
    """Return how many elements each source begins after the one before it; None if that differs."""
    found = {after.data_ptr() - before.data_ptr() for before, after in pairwise(sources)} or {0}
    distance, rest = divmod(found.pop(), sources[0].element_size())
    return None if found or rest else distance


@triton.jit
def do_nothing(pointer):
    pass


@triton.jit
def sum_sources(
    shard,  # float32, float16, or int16: the bits of bfloat16; out, and in if ACCUMULATE
    source,  # float32, float16 or int16: the first source
    distance,  # from each source to the next, in elements
    squares,  # float64, out: one for each program; None: are not computed
    numel,  # of the shard
    scale,  # float32: multiplies the sum
    COUNT: tl.constexpr,  # number of sources
    ACCUMULATE: tl.constexpr,  # bool: add to what the shard holds
):
    """Do ``reference.sum_`` for PROGRAM elements, one TILE after the other."""
    start = tl.program_id(0).to(tl.int64) * PROGRAM
    sums = tl.zeros([TILE], tl.float64)
    for tile in range(TILES):
        index = tile * TILE + tl.arange(0, TILE)
        inside = index < numel - start
        at = source + start
        total = to_float32(tl.load(at + index, mask=inside, other=0))
        for _ in range(COUNT - 1):
            at += distance
            total += to_float32(tl.load(at + index, mask=inside, other=0))
        total *= scale
        if ACCUMULATE:
            total += to_float32(tl.load(shard + start + index, mask=inside, other=0))
        stored = round_to_nearest(total, shard.dtype.element_ty)
        tl.store(shard + start + index, stored, mask=inside)
        if squares is not None:
            sums = add_squares(sums, to_float32(stored))
    if squares is not None:
        store_sum(squares, sums)


@triton.jit
def measure_flat(
    flat,  # float32, float16, or int16: the bits of bfloat16
    squares,  # float64, out: one for each program
    numel,  # of flat
):
    """Do ``reference.sums_of_squares`` for PROGRAM elements, one TILE after the other."""
    start = tl.program_id(0).to(tl.int64) * PROGRAM
    sums = tl.zeros([TILE], tl.float64)
    for tile in range(TILES):
        index = tile * TILE + tl.arange(0, TILE)
        sums = add_squares(sums, to_float32(tl.load(flat + start + index, mask=index < numel - start, other=0)))
    store_sum(squares, sums)


@triton.jit(do_not_specialize=["first_block", "block_count"], do_not_specialize_on_alignment=["blocks", "positions"])
def measure_blocks(
    addresses,  # int64: of each parameter's gradient, 0 for none
    numels,  # int64: elements of each parameter
    first_blocks,  # int64: first block of each parameter in the arena
    blocks,  # int16 or int32: the parameter of each block of the shard
    positions,  # int32: where each block is in the arena; None: one after the other
    first_block,  # the shard's first block in the arena, without positions
    block_count,  # blocks of the shard
    squares,  # float64, out: one for each program
    ELEMENT: tl.constexpr,  # what is loaded: float32, float16, or int16, the bits of bfloat16
    ALIGNED: tl.constexpr,  # bool: all addresses are multiples of WORD_BYTES
):
    """Do ``reference.sums_of_squares`` for PROGRAM elements of a shard whose gradients lie at ``addresses``."""
    start = tl.program_id(0).to(tl.int64) * (PROGRAM // BLOCK)
    sums = tl.zeros([TILE], tl.float64)
    if ALIGNED:  # unrolled, so that the tables of all tiles are loaded at once; otherwise that takes too many registers
        for tile in tl.static_range(TILES):
            row = start + tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)[:, None]
            inside = row < block_count
            parameter, block = locate(blocks, positions, first_blocks, first_block, row, inside)
            values = load_scattered(addresses, numels, parameter, block, inside, ELEMENT, ALIGNED)
            sums = add_squares(sums, tl.reshape(values, [TILE]))
    else:
        for tile in range(TILES):
            row = start + tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)[:, None]
            inside = row < block_count
            parameter, block = locate(blocks, positions, first_blocks, first_block, row, inside)
            values = load_scattered(addresses, numels, parameter, block, inside, ELEMENT, ALIGNED)
            sums = add_squares(sums, tl.reshape(values, [TILE]))
    store_sum(squares, sums)


@triton.jit
def locate(blocks, positions, first_blocks, first_block, row, inside):
    """Return the parameter that each of the shard's blocks ``row`` belongs to, and the block's position in it."""
    parameter = tl.load(blocks + row, mask=inside, other=0).to(tl.int32)
    if positions is not None:
        position = tl.load(positions + row, mask=inside, other=0)
    else:
        position = first_block + row
    return parameter, position - tl.load(first_blocks + parameter)


@triton.jit
def load_scattered(addresses, numels, parameter, block, inside, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return blocks of gradients as float32, one a row; 0 beyond the parameter and where it has no gradient.

    ``parameter``, ``block`` (in the parameter) and ``inside`` are columns.
    """
    address = tl.load(addresses + parameter, mask=inside, other=0)
    start = block.to(tl.int64) * BLOCK
    left = tl.load(numels + parameter, mask=inside, other=0) - start
    left = tl.where(address != 0, tl.minimum(left, BLOCK), 0).to(tl.int32)
    element = address.to(tl.pointer_type(ELEMENT))
    loaded = left
    if ALIGNED:
        # Whole words: one that holds an element of a tensor lies on pages that the tensor is on.
        element = tl.multiple_of(element, [WORD_BYTES, WORD_BYTES])
        word: tl.constexpr = WORD_BYTES * 8 // ELEMENT.primitive_bitwidth
        loaded = (left + word - 1) // word * word
    lane = tl.arange(0, BLOCK)[None, :]
    value = to_float32(tl.load(element + start + lane, mask=lane < loaded, other=0))
    return tl.where(lane < left, value, 0.0)


@triton.jit
def add_squares(sums, values):
    values = values.to(tl.float64)
    return sums + values * values


@triton.jit
def store_sum(squares, sums):
    """Store the sum of ``sums``, added in pairs of neighbours again and again: in an order that no layout changes."""
    for _ in tl.static_range(TILE_BITS):
        sums = tl.sum(tl.reshape(sums, [sums.shape[0] // 2, 2]), axis=1)
    tl.store(squares + tl.program_id(0) + tl.arange(0, 1), sums)


@triton.jit
def to_float32(stored):
    if stored.dtype == tl.int16:
        return from_bfloat16(stored)
    else:
        return stored.to(tl.float32)


@triton.jit
def from_bfloat16(stored):
    return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def round_to_nearest(value, dtype: tl.constexpr):
    """Return ``value`` in ``dtype``, ties to even; Triton's interpreter would truncate to bfloat16."""
    if dtype == tl.int16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (tl.where(value == value, rounded, bits | 0x400000) >> 16).to(tl.int16)
    else:
        return value.to(dtype)
