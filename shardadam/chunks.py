# SPDX-License-Identifier: Apache-2.0
"""Passes over long flat tensors in stretches that stay in the CPU's cache, so that what follows finds them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_CPU_NUMEL = 1 << 18  # of each thread: a few float32 stretches of it stay in cache, and torch's calls cost little
_GPU_NUMEL = 1 << 24  # only bounds the temporaries


def chunks(start: int, stop: int, device: torch.device) -> Iterator[slice]:
    """Cuts ``start : stop``; every cut is a multiple of 128 elements from ``start``."""
    numel = _CPU_NUMEL * torch.get_num_threads() if device.type == "cpu" else _GPU_NUMEL
    for low in range(start, stop, numel):
        yield slice(low, min(low + numel, stop))


OnChunk = Callable[[Tensor], None]
"""Called with stretches of a shard one after the other, on the transfer's stream, as soon as they are what they will
be: on the CPU they are still in the cache then."""


def sum_sources_(
    shard: Tensor, sources: Sequence[Tensor], *, scale: float, accumulate: bool, on_chunk: OnChunk | None = None
) -> None:
    """``scale`` times the sum of ``sources``, in their order and in the dtype of ``shard``, into or onto ``shard``."""
    for chunk in chunks(0, shard.numel(), shard.device):
        part = shard[chunk]
        total = torch.empty_like(part) if accumulate else part
        sum_chunk_(total, [source[chunk] for source in sources], scale=scale)
        if accumulate:
            part.add_(total)
        if on_chunk is not None:
            on_chunk(part)


def sum_chunk_(total: Tensor, sources: Sequence[Tensor], *, scale: float) -> None:
    """``scale`` times the sum of ``sources``, in their order and in the dtype of ``total``, which it goes to."""
    first, *others = sources
    if others and first.dtype == others[0].dtype == total.dtype:
        torch.add(first, others.pop(0), out=total)
    else:
        total.copy_(first)
    for other in others:
        total.add_(other)
    if scale != 1:
        total.mul_(scale)
