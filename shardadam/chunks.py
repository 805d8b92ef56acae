# SPDX-License-Identifier: Apache-2.0
"""Passes over long flat tensors in stretches that stay in the CPU's cache, so that what follows finds them there."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CPU_NUMEL = 1 << 17  # of each thread: a few float32 stretches of it stay in cache
_GPU_NUMEL = 1 << 24  # only bounds the temporaries


def chunks(start: int, stop: int, device: torch.device) -> Iterator[slice]:
    """Cuts ``start : stop``; every cut is a multiple of 128 elements from ``start``."""
    numel = _CPU_NUMEL * torch.get_num_threads() if device.type == "cpu" else _GPU_NUMEL
    for low in range(start, stop, numel):
        yield slice(low, min(low + numel, stop))
