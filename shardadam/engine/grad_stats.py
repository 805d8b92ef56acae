# SPDX-License-Identifier: Apache-2.0
"""Statistics of gradients that a step needs before it uses them: whether they are finite, and their norm.

Works on any device, on the gradients of one rank. Only ``is_within`` waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam.layout import ALIGNMENT_NUMEL

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class GradStats:
    """Statistics of a flat gradient shard, from its parts, each measured while it is in the cache.

    Args:
        with_squares: also compute the sum of squares.

    Attributes:
        extremes: smallest and largest element of each part, 0-dim tensors in its dtype and on its device.
        sums_of_squares: one for each part, 0-dim float64 on its device; empty unless ``with_squares``.
    """

    def __init__(self, *, with_squares: bool) -> None:
        self.with_squares = with_squares
        self.extremes: list[Tensor] = []
        self.sums_of_squares: list[Tensor] = []

    def update(self, gradient: Tensor) -> None:
        """Add a part: 1-D, float32 or float64, a multiple of ``ALIGNMENT_NUMEL`` long."""
        self.extremes += torch.aminmax(gradient)  # both are NaN if any element is
        if self.with_squares:
            # By rows, then in float64: over one long row torch's float32 sum on the CPU is off by 1e-4 at 4M elements.
            norms = torch.linalg.vector_norm(gradient.view(-1, ALIGNMENT_NUMEL), dim=1)
            self.sums_of_squares.append(norms.double().square().sum())

    def mark_nonfinite(self) -> None:
        """Make ``are_finite`` return False for these statistics."""
        self.extremes.append(torch.tensor(torch.inf, device="cpu"))


def are_finite(grad_stats: Sequence[GradStats], device: torch.device) -> Tensor:
    """Return whether all measured elements are finite, 0-dim bool on ``device``; True if none were measured."""
    extremes = [extreme.to(device) for stats in grad_stats for extreme in stats.extremes]
    if not extremes:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.stack(extremes).isfinite().all()


def sum_of_squares(grad_stats: Sequence[GradStats], device: torch.device) -> Tensor:
    """Return the sum of squares of all measured elements, at least one; 0-dim float64 on ``device``."""
    return torch.stack([square.to(device) for stats in grad_stats for square in stats.sums_of_squares]).sum()


def is_within(gradient: Tensor, limit: float) -> bool:
    """Return whether every element is a number from ``-limit`` to ``limit``; False if any is NaN. Waits for the device.

    Args:
        gradient: of any shape and floating dtype, not empty.
    """
    low, high = torch.aminmax(gradient)
    return -limit <= float(low) and float(high) <= limit


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """Return the factor by which torch.nn.utils.clip_grad_norm_ would multiply gradients, 0-dim."""
    return (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
