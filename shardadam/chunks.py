# SPDX-License-Identifier: Apache-2.0
"""Passes over long flat tensors in chunks that fit the CPU's cache, where the next operation finds them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CPU_NUMEL = 1 << 18  # per thread: a few such float32 chunks fit the cache, and torch's overhead is small
_GPU_NUMEL = 1 << 24  # bounds the temporaries


def chunks(start: int, stop: int, device: torch.device, *, is_long: bool = False) -> Iterator[slice]:
    """Cut ``start : stop`` into chunks that are multiples of 128 elements long, except for the last.

    Args:
        is_long: for passes of one or two operations, whose overhead counts; chunks fit a large cache only.
    """
    numel = _CPU_NUMEL * torch.get_num_threads() if device.type == "cpu" else _GPU_NUMEL
    numel *= 4 if is_long else 1
    for low in range(start, stop, numel):
        yield slice(low, min(low + numel, stop))
