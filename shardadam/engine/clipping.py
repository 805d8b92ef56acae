# SPDX-License-Identifier: Apache-2.0
"""What all ranks must know of the reduced gradients before they update: one small block, all-reduced once a step.

The block holds the squared norm, the non-finite flag, a fingerprint of what the ranks are about to do, which must be
the same on all, and a used-bit for every parameter. It is computed and read on the device; the host of a GPU waits for
nothing, unless this rank lacks a gradient itself and has to look which parameters take part.

Note: equal fingerprints
    The block adds up f and f^2 over N ranks. They are integers, below 2^17 and 2^34, and exact in float64.
    N sum(f^2) = sum(f)^2 exactly if all f are equal (Cauchy-Schwarz); both fit into 63 bits for 2^14 ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam.engine.grad_stats import GradStats, are_finite, sum_of_squares
from shardadam.transport import Transport

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_
_FINGERPRINT_BITS = 17


class GlobalGradStats:
    """What is true of the gradients over all ranks.

    ``norm``: 2-norm of all averaged gradients, 0-dim float32; None if it was not asked for. ``found_inf``: 1 if any of
    them is infinite or NaN, or ranks have given different fingerprints, else 0; 0-dim float32. ``used``: which
    parameters have had a gradient on any rank, bool, one for each param in order of indices. ``all_used``: True if
    the host knows that all of them have, without having to look.

    Args:
        block: as it is summed over all ranks.
        ranks: how many they are.
        compares: whether there are fingerprints in it.
    """

    def __init__(self, block: Tensor, ranks: int, *, with_norm: bool, compares: bool, all_used: bool) -> None:
        self._block = block
        self._ranks = ranks
        self.norm = block[0].sqrt().float() if with_norm else None
        is_refused = block[1] > 0
        if compares:
            total, squares = block[2:4].long().unbind()
            is_refused |= squares * ranks != total * total
        self.found_inf = is_refused.float()
        self.used = block[4:] > 0
        self.all_used = all_used

    def host_copy(self) -> HostCopy:
        return HostCopy(self._block, self._ranks)


class HostCopy:
    """A survey for the host. It is copied when this is made, and whoever looks at it waits for that copy."""

    def __init__(self, block: Tensor, ranks: int) -> None:
        self._ranks = ranks
        self._event: torch.cuda.Event | None = None
        self._block = block
        if block.is_cuda:
            self._block = torch.empty_like(block, device="cpu", pin_memory=True).copy_(block, non_blocking=True)
            self._event = torch.cuda.current_stream(block.device).record_event()

    def _await(self) -> Tensor:
        if self._event is not None:
            if not self._event.query():  # type: ignore[no-untyped-call]
                self._event.synchronize()
            self._event = None
        return self._block

    @property
    def agrees(self) -> bool:
        """Whether all ranks have given the same fingerprint."""
        total, squares = map(int, self._await()[2:4].tolist())
        return self._ranks * squares == total**2

    @property
    def found_inf(self) -> bool:
        return bool(self._await()[1] > 0)

    @property
    def used(self) -> Tensor:
        return self._await()[4:] > 0


@torch.no_grad()
def all_reduce_stats(
    grad_stats: Sequence[GradStats],
    used: Sequence[bool],
    *,
    transport: Transport,
    with_norm: bool,
    device: torch.device,
    refuses: bool = False,
    fingerprint: int | None = None,
) -> GlobalGradStats:
    """Collective: adds up what this rank's grad_stats have seen, and its used-bits.

    Args:
        refuses: no rank is to use these gradients, as if one were infinite.
        fingerprint: of what this rank is about to do, from 0 to 2^32; of it 17 bits count. None on all ranks: not
            compared.
    """
    block = torch.empty(len(used) + 4, dtype=torch.float64, device=device)
    if with_norm:
        block[0] = sum_of_squares(grad_stats, device) / transport.replicas  # all of which add it
    else:
        block[0] = 0.0
    block[1] = 1.0 if refuses else are_finite(grad_stats, device).logical_not()
    # Fills, as a copy from the host would wait for the device.
    mine = 0 if fingerprint is None else fingerprint % (1 << _FINGERPRINT_BITS)
    block[2], block[3] = mine, mine**2
    all_used = all(used)
    if all_used:
        block[4:] = 1.0
    else:
        block[4:] = torch.tensor(used, dtype=torch.float64).to(device)
    transport.all_reduce(block).wait()
    ranks = transport.world_size * transport.replicas
    return GlobalGradStats(block, ranks, with_norm=with_norm, compares=fingerprint is not None, all_used=all_used)


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """What torch.nn.utils.clip_grad_norm_ would multiply gradients by, 0-dim."""
    return (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0)
