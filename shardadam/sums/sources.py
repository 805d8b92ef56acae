# SPDX-License-Identifier: Apache-2.0
"""Sums one gradient of each rank, in rank order, and measures the sum while it is in the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam.chunks import chunks
from shardadam.sums import kernels_for
from shardadam.sums.stats import GradStats


def sum_sources_(
    shard: Tensor, sources: Sequence[Tensor], *, scale: float, accumulate: bool, stats: GradStats | None = None
) -> None:
    """Write ``scale`` times the sum of ``sources`` to ``shard``.

    Sums in their order and in float32 (float64 for a float64 shard). A narrower shard gets the sum rounded once, to the
    nearest, ties to even.

    Args:
        accumulate: add to what ``shard`` holds instead of overwriting it.
        stats: of ``shard``; measures its final values.
    """
    if stats is not None and stats.squares is not None:
        kernels_for(shard.device).sum_(shard, sources, stats.squares, scale=scale, accumulate=accumulate)
        return
    exact = torch.promote_types(shard.dtype, torch.float32)
    is_narrow = shard.dtype != exact
    for chunk in chunks(0, shard.numel(), shard.device):
        part = shard[chunk]
        total = torch.empty_like(part, dtype=exact) if accumulate or is_narrow else part
        sum_chunk_(total, [source[chunk] for source in sources], scale=scale)
        if is_narrow:
            part.copy_(total.add_(part) if accumulate else total)
        elif accumulate:
            part.add_(total)
        if stats is not None:
            stats.update(part)


def sum_chunk_(total: Tensor, sources: Sequence[Tensor], *, scale: float) -> None:
    """Write ``scale`` times the sum of ``sources`` to ``total``, summing in their order and in its dtype."""
    first, *others = sources
    if others and first.dtype == others[0].dtype == total.dtype:
        torch.add(first, others.pop(0), out=total)
    else:
        total.copy_(first)
    for other in others:
        total.add_(other)
    if scale != 1:
        total.mul_(scale)
