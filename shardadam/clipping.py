# SPDX-License-Identifier: Apache-2.0
"""What all ranks must know of the reduced gradients before they update: one small block, all-reduced once a step.

The block holds the squared norm, the non-finite flag and a used-bit for every parameter. It is computed and read on the
device; the host waits for nothing, unless this rank lacks a gradient itself and has to look which parameters take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.gauge import Gauge, are_finite, sum_of_squares
from shardadam.transport import Transport

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, slots=True)
class Survey:
    """What is true of the gradients over all ranks.

    Args:
        norm: 2-norm of all averaged gradients, 0-dim float32; None if it was not asked for.
        found_inf: 1 if any of them is infinite or NaN, else 0; 0-dim float32.
        used: which parameters have had a gradient on any rank, bool, one for each member in order of ordinals.
        all_used: True if the host knows that all of them have, without having to look.
    """

    norm: Tensor | None
    found_inf: Tensor
    used: Tensor
    all_used: bool


@torch.no_grad()
def survey(
    gauges: Sequence[Gauge], used: Sequence[bool], *, transport: Transport, with_norm: bool, device: torch.device
) -> Survey:
    """Collective: adds up what this rank's gauges have seen, and its used-bits."""
    block = torch.empty(2 + len(used), dtype=torch.float64, device=device)
    if with_norm:
        block[0] = sum_of_squares(gauges, device) / transport.replicas  # all of which add it
    else:
        block[0] = 0.0
    block[1] = are_finite(gauges, device).logical_not()
    all_used = all(used)
    if all_used:
        block[2:] = 1.0
    else:
        block[2:] = torch.tensor(used, dtype=torch.float64).to(device)
    transport.all_reduce(block).wait()
    return Survey(
        norm=block[0].sqrt().float() if with_norm else None,
        found_inf=(block[1] > 0).float(),
        used=block[2:] > 0,
        all_used=all_used,
    )


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """What torch.nn.utils.clip_grad_norm_ would multiply gradients by, 0-dim."""
    return (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
