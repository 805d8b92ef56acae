# SPDX-License-Identifier: Apache-2.0
"""Passes over long flat tensors in chunks that fit the CPU's cache, where the next operation finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_CPU_NUMEL = 1 << 18  # per thread: a few such float32 chunks fit the cache, and torch's overhead is small
_GPU_NUMEL = 1 << 24  # bounds the temporaries


def chunks(start: int, stop: int, device: torch.device) -> Iterator[slice]:
    """Cut ``start : stop`` into chunks that are multiples of 128 elements long, except for the last."""
    numel = _CPU_NUMEL * torch.get_num_threads() if device.type == "cpu" else _GPU_NUMEL
    for low in range(start, stop, numel):
        yield slice(low, min(low + numel, stop))


OnChunk = Callable[[Tensor], None]
"""Called with each chunk of a shard, in order and on the transfer's stream, as soon as it has its final value; on the
CPU, while it is in the cache.
"""


def sum_sources_(
    shard: Tensor, sources: Sequence[Tensor], *, scale: float, accumulate: bool, on_chunk: OnChunk | None = None
) -> None:
    """Write ``scale`` times the sum of ``sources`` to ``shard``, summing in their order and in its dtype, by chunks.

    Args:
        accumulate: add to what ``shard`` holds instead of overwriting it.
    """
    for chunk in chunks(0, shard.numel(), shard.device):
        part = shard[chunk]
        total = torch.empty_like(part) if accumulate else part
        sum_chunk_(total, [source[chunk] for source in sources], scale=scale)
        if accumulate:
            part.add_(total)
        if on_chunk is not None:
            on_chunk(part)


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
