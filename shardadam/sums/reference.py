# SPDX-License-Identifier: Apache-2.0
"""Sums of gradients and of their squares in plain torch operations: defines what ``kernel`` computes, bit for bit.

Imports nothing of the project.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PROGRAM_NUMEL = 2**14
"""Elements of each sum of squares."""
TILE_NUMEL = 2**12
"""Elements that are added to sums of their own before these are added up."""


def program_count(numel: int) -> int:
    """Return how many sums of squares ``numel`` elements have."""
    return -(-numel // PROGRAM_NUMEL)


def sum_(shard: Tensor, sources: Sequence[Tensor], *, scale: float, accumulate: bool) -> None:
    """Write ``scale`` times the sum of ``sources`` to ``shard``.

    Sums in float32 (float64 for float64 sources), in their order, and rounds once, to the nearest, ties to even.

    Args:
        shard: 1-D, float32, bfloat16 or float16.
        sources: at least one; as long as ``shard``, and all of one dtype.
        accumulate: add to what ``shard`` holds instead of overwriting it.
    """
    exact = torch.promote_types(sources[0].dtype, torch.float32)
    total = sources[0].to(exact)
    for source in sources[1:]:
        total = total + source.to(exact)
    if scale != 1:
        total = total * scale
    if accumulate:
        total = total + shard.to(exact)
    shard.copy_(total)


def sums_of_squares(flat: Tensor) -> Tensor:
    """Return the sum of squares of every ``PROGRAM_NUMEL`` elements, of what is left for the last one; float64.

    They are finite if and only if all elements are: the square of a float32 is exact in float64 and far below its
    largest. Element i is added to sum i modulo ``TILE_NUMEL``, in order; then these are added in pairs of neighbours,
    again and again.

    Args:
        flat: 1-D, float32, bfloat16 or float16.
    """
    squares = flat.double().square()
    squares = torch.cat([squares, squares.new_zeros(-len(squares) % PROGRAM_NUMEL)])
    tiles = squares.view(-1, PROGRAM_NUMEL // TILE_NUMEL, TILE_NUMEL)
    sums = torch.zeros_like(tiles[:, 0])
    for tile in tiles.unbind(1):
        sums = sums + tile
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    return sums[:, 0]
