# SPDX-License-Identifier: Apache-2.0
"""What must be known of gradients before they are used, measured as they pass: are they finite, and how large."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam.layout import ALIGNMENT_NUMEL

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class GradStats:
    """Looks at stretches of a flat gradient shard while they are in the cache; nothing waits for the device.

    Args:
        with_squares: measure the sum of squares, too.
    """

    def __init__(self, *, with_squares: bool) -> None:
        self.with_squares = with_squares
        # Of each stretch, and on its device.
        self.extremes: list[Tensor] = []
        self.sums_of_squares: list[Tensor] = []

    def update(self, gradient: Tensor) -> None:
        """``gradient``: 1-D, float32 or float64, a multiple of ``ALIGNMENT_NUMEL`` long."""
        self.extremes += torch.aminmax(gradient)  # both NaN if any is
        if self.with_squares:
            # By rows, then in float64: over one long row torch's float32 sum on the CPU is off by 1e-4 at 4M elements.
            norms = torch.linalg.vector_norm(gradient.view(-1, ALIGNMENT_NUMEL), dim=1)
            self.sums_of_squares.append(norms.double().square().sum())

    def judge(self, is_finite: bool) -> None:
        """Takes a verdict instead of a gradient."""
        self.extremes.append(torch.tensor(0.0 if is_finite else torch.inf))


def are_finite(grad_stats: Sequence[GradStats], device: torch.device) -> Tensor:
    """Whether all that they have seen is; 0-dim bool."""
    return torch.stack([extreme.to(device) for stats in grad_stats for extreme in stats.extremes]).isfinite().all()


def sum_of_squares(grad_stats: Sequence[GradStats], device: torch.device) -> Tensor:
    """Of all that they have seen; 0-dim float64."""
    return torch.stack([square.to(device) for stats in grad_stats for square in stats.sums_of_squares]).sum()


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """What torch.nn.utils.clip_grad_norm_ would multiply gradients by, 0-dim."""
    return (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
