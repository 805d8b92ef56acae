# SPDX-License-Identifier: Apache-2.0
"""What all ranks must know of the reduced gradients before they update: one small block, all-reduced once a step.

The block holds the squared norm, the non-finite flag, a used-bit for every parameter and, on the CPU, a fingerprint of
what the ranks are about to do, which must be the same on all. It is computed and read on the device; the host of a GPU
waits for nothing, unless this rank lacks a gradient itself and has to look which parameters take part.

Note: equal fingerprints
    The block adds up f and f^2 over N ranks. They are integers, below 2^18 and 2^36, and exact in float64 for fewer
    than 2^17 ranks. N sum(f^2) = sum(f)^2 exactly if all f are equal (Cauchy-Schwarz).
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
        agrees: False if the host knows that ranks have given different fingerprints. No rank must go on then.
    """

    norm: Tensor | None
    found_inf: Tensor
    used: Tensor
    all_used: bool
    agrees: bool = True


@torch.no_grad()
def survey(
    gauges: Sequence[Gauge],
    used: Sequence[bool],
    *,
    transport: Transport,
    with_norm: bool,
    device: torch.device,
    fingerprint: int | None = None,
) -> Survey:
    """Collective: adds up what this rank's gauges have seen, and its used-bits.

    Args:
        fingerprint: of what this rank is about to do, from 0 to 2^32; of it 18 bits count. None on all ranks: not
            compared.
    """
    block = torch.empty(len(used) + 4, dtype=torch.float64, device=device)
    if with_norm:
        block[0] = sum_of_squares(gauges, device) / transport.replicas  # all of which add it
    else:
        block[0] = 0.0
    block[1] = are_finite(gauges, device).logical_not()
    if fingerprint is None:
        block[2:4] = 0.0
    else:
        fingerprint %= 1 << 18
        block[2:4] = torch.tensor([fingerprint, fingerprint**2], dtype=torch.float64).to(device)
    all_used = all(used)
    if all_used:
        block[4:] = 1.0
    else:
        block[4:] = torch.tensor(used, dtype=torch.float64).to(device)
    transport.all_reduce(block).wait()
    agrees = True
    if fingerprint is not None:
        total, squares = map(int, block[2:4].tolist())
        agrees = transport.world_size * transport.replicas * squares == total**2
    return Survey(
        norm=block[0].sqrt().float() if with_norm else None,
        found_inf=(block[1] > 0).float(),
        used=block[4:] > 0,
        all_used=all_used,
        agrees=agrees,
    )


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """What torch.nn.utils.clip_grad_norm_ would multiply gradients by, 0-dim."""
    return (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
