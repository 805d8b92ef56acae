# SPDX-License-Identifier: Apache-2.0
"""Statistics of gradients that a step needs before it uses them: whether they are finite, and their norm.

Works on any device, on the gradients of one rank. Only ``is_within`` waits for the device.

Note: one sum tells
    A sum is NaN or infinite if any of its terms is, and torch's takes a quarter of the time of its ``aminmax``. So on
    CPUs, where the host may read values, a finite sum shows that all terms are finite. Finite terms may overflow in it:
    then the extremes tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from shardadam.chunks import chunks
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.sums import kernels_for

_SMALL_NUMEL = 1 << 15
_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class GradStats:
    """Statistics of a flat gradient shard: whether it is finite, and its sum of squares.

    By torch, each part of the shard is measured while it is in the cache. By a Triton kernel, the whole shard is; its
    squares are summed up in float64, where the square of a float32 cannot overflow. So one sum tells both.

    Args:
        with_squares: also compute the sum of squares. A kernel always does.
        scale: the mean gradient is ``scale`` times what the shard holds.
        weight: of the squares in ``sum_of_squares``.
        squares: for a kernel to write: float64, one for every ``PROGRAM_NUMEL`` elements of the shard.

    Attributes:
        flags: 0-dim tensors that are finite if and only if the gradient is, on its device.
        sums_of_squares: of the parts measured by torch, 0-dim float64.
    """

    def __init__(
        self, *, with_squares: bool, scale: float = 1.0, weight: float = 1.0, squares: Tensor | None = None
    ) -> None:
        self.with_squares = with_squares or squares is not None
        self.factor = scale**2 * weight  # of a square in the shard, in the sum of squares
        self.squares = squares
        self.flags: list[Tensor] = []
        self.sums_of_squares: list[Tensor] = []

    def update(self, gradient: Tensor) -> None:
        """Add a part by torch: 1-D, of a floating dtype, a multiple of ``ALIGNMENT_NUMEL`` long."""
        if self.with_squares:
            # By rows, then in float64: over one long row torch's float32 sum on the CPU is off by 1e-4 at 4M elements.
            exact = torch.promote_types(gradient.dtype, torch.float32)
            norms = torch.linalg.vector_norm(gradient.view(-1, ALIGNMENT_NUMEL), dim=1, dtype=exact)
            self.sums_of_squares.append(norms.double().square().sum())
        on_cpu = gradient.device.type == "cpu"
        total = self.sums_of_squares[-1] if self.with_squares else gradient.sum() if on_cpu else None
        if on_cpu and total is not None and math.isfinite(float(total)):
            self.flags.append(total)  # see "Note: one sum tells"
        else:
            self.flags += torch.aminmax(gradient)  # both are NaN if any element is

    def update_pieces(self, pieces: Sequence[Tensor]) -> None:
        """Add parts of any length by torch: 1-D, of one floating dtype; in few calls if many are small."""
        small = [piece for piece in pieces if 0 < piece.numel() <= _SMALL_NUMEL]
        if small:
            # In float64, squares of narrower numbers cannot overflow, so one norm tells both.
            one_tells_both = self.with_squares and small[0].dtype != torch.float64
            if not one_tells_both:
                self.flags.append(torch.stack(torch._foreach_norm(small, math.inf)).max())
            if self.with_squares:
                norms = torch.stack(torch._foreach_norm(small, 2, dtype=torch.float64))
                self.sums_of_squares.append(norms.square().sum())
                if one_tells_both:
                    self.flags.append(norms.max())
        for piece in pieces:
            if piece.numel() > _SMALL_NUMEL:
                whole = piece.numel() // ALIGNMENT_NUMEL * ALIGNMENT_NUMEL
                for chunk in chunks(0, whole, piece.device):
                    self.update(piece[chunk])
                self.update_pieces([piece[whole:]])

    def measure(self, gradient: Tensor) -> None:
        """Measure the whole shard, as ``update`` takes it."""
        if self.squares is None:
            for chunk in chunks(0, gradient.numel(), gradient.device):
                self.update(gradient[chunk])
        else:
            kernels_for(gradient.device).measure(gradient, self.squares)

    def finite_flags(self) -> list[Tensor]:
        """Return ``flags`` that stay as they are when the shard is written and measured again."""
        return self.flags if self.squares is None else [*self.flags, self.squares.sum()]

    def mark_nonfinite(self) -> None:
        """Make ``are_finite`` return False for these statistics."""
        self.flags.append(torch.tensor(torch.inf, device="cpu"))


def are_finite(grad_stats: Sequence[GradStats], device: torch.device) -> Tensor:
    """Return whether all measured elements are finite, 0-dim bool on ``device``; True if none were measured."""
    flags = [flag.to(device) for stats in grad_stats for flag in stats.flags]
    found = torch.stack(flags).isfinite().all() if flags else torch.ones((), dtype=torch.bool, device=device)
    for squares in _by_factor(grad_stats).values():
        found = found & squares.sum().isfinite().to(device)
    return found


def sum_of_squares(grad_stats: Sequence[GradStats], device: torch.device) -> Tensor:
    """Return the weighted sum of squares of all mean gradients; 0-dim float64 on ``device``."""
    sums = [(squares.sum().to(device), factor) for (factor, _), squares in _by_factor(grad_stats).items()]
    by_torch: dict[float, list[Tensor]] = {}
    for stats in grad_stats:
        by_torch.setdefault(stats.factor, []).extend(square.to(device) for square in stats.sums_of_squares)
    sums += [(torch.stack(squares).sum(), factor) for factor, squares in by_torch.items() if squares]
    means = [total if factor == 1 else total * factor for total, factor in sums]
    return reduce(torch.add, means) if means else torch.zeros((), dtype=torch.float64, device=device)


def _by_factor(grad_stats: Sequence[GradStats]) -> dict[tuple[float, torch.device], Tensor]:
    """Return all sums of squares that kernels have written, in one tensor for each factor and device."""
    found: dict[tuple[float, torch.device], list[Tensor]] = {}
    for stats in grad_stats:
        if stats.squares is not None:
            found.setdefault((stats.factor, stats.squares.device), []).append(stats.squares)
    return {key: torch.cat(parts) if len(parts) > 1 else parts[0] for key, parts in found.items()}


def is_within(gradient: Tensor, limit: float) -> bool:
    """Return whether every element is a number from ``-limit`` to ``limit``; False if any is NaN. Waits for the device.

    Args:
        gradient: 1-D, of any floating dtype, not empty.
    """
    is_exact = gradient.dtype in (torch.float32, torch.float64)
    norm = torch.dot(gradient, gradient).sqrt() if is_exact else torch.linalg.vector_norm(gradient)
    if float(norm) < limit / 2:  # no element exceeds the norm, which may be rounded
        return True
    low, high = torch.aminmax(gradient)
    return -limit <= float(low) and float(high) <= limit


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """Return the factor by which torch.nn.utils.clip_grad_norm_ would multiply gradients, 0-dim."""
    return (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
