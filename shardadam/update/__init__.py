# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of Adam on one flat shard.

``reference`` is slow, readable and defines the result. ``triton`` on GPUs and ``compiled`` on CPUs equal it bit for
bit; ``fused`` equals it up to the rounding of torch's own kernel. Nothing here communicates.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from shardadam.layout import Bucket
from shardadam.precision import Format
from shardadam.sums import KERNEL_DEVICES, has_kernel, has_numba
from shardadam.sums.scattered import Scattered
from shardadam.update.fused import FusedUpdate
from shardadam.update.shard import SCALARS, Counters, Shard, Sources, StepInputs

__all__ = [
    "KERNEL_DEVICES",
    "Counters",
    "Shard",
    "Sources",
    "StepInputs",
    "Update",
    "choose",
    "scalar_table_bytes",
    "uses_kernels",
]


class Update(Protocol):
    """Updates the shards of one arena on one rank, in place. On CUDA the host never waits for the device.

    Args:
        needs_host_used: whether ``StepInputs.host_used`` must be given when some parameters take no part.
        takes_several: whether ``step_`` takes a shard with ``positions``: of several buckets, on several ranks.
    """

    needs_host_used: bool
    takes_several: bool

    def begin(self, inputs: StepInputs) -> None:
        """Start a step: advance the counters of the parameters that take part. Call it before any ``step_``."""

    def step_(
        self,
        shard: Shard,
        bucket: Bucket,
        gradients: Sources | Scattered | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update one bucket's shard in place.

        Args:
            shard: its gradient may be overwritten.
            bucket: that the shard is a slice of; see ``engine.merging.merged``.
            gradients: replace ``shard.gradient``: what the update sums as it goes, or gradients of all parameters of
                the arena where they are, with addresses for the kernel.
            found_inf: 0-dim float32: 1 if this shard alone must stay as it is, else 0; None for 0. Counters advance.
        """

    def reload(self) -> None:
        """Use counters that were written from outside, such as by a load."""

    @property
    def nbytes(self) -> int:
        """Bytes that the update itself holds on the device, without the counters."""


def choose(counters: Counters, format: Format, *, seed: int, rank: int) -> Update:
    """Return the update for an arena of ``format`` on the counters' device.

    Args:
        seed: of stochastic rounding.
        rank: of this process in its shard group.
    """
    kind = _kind(format, counters.steps.device)
    if kind == "triton":
        from shardadam.update.triton import TritonUpdate

        return TritonUpdate(counters, seed=seed)
    if kind == "numba":
        from shardadam.update.compiled import CompiledUpdate

        return CompiledUpdate(counters, seed=seed)
    return FusedUpdate(counters, seed=seed, rank=rank)


def uses_kernels(format: Format, device: torch.device) -> bool:
    """Return whether kernels update an arena of ``format``. Then ``sums.kernels_for`` sums up its gradients, too."""
    return _kind(format, device) != "torch"


def scalar_table_bytes(parameter_count: int, format: Format, device: torch.device) -> int:
    """Return the bytes of the table of scalars that the update keeps for an arena of so many parameters."""
    return 0 if not uses_kernels(format, device) else (1 + parameter_count) * SCALARS * torch.float32.itemsize


def _kind(format: Format, device: torch.device) -> Literal["triton", "numba", "torch"]:
    """Return what updates an arena of ``format`` on ``device``.

    On CPUs torch's kernel stays where it stores all there is: it is as fast as memory, and equals torch.optim.AdamW.
    """
    if has_kernel(format.dtype, device):
        return "triton"
    is_stock = format.moments == "fp32" and format.master == "own" and not format.has_average
    if device.type == "cpu" and format.dtype != torch.float64 and not is_stock and has_numba():
        return "numba"
    return "torch"
