# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of Adam on one flat shard: a readable truth (``reference``) and the fast forms that must equal it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Protocol

import torch

from shardadam.layout import Bucket
from shardadam.update.fused import FusedUpdate
from shardadam.update.shard import Counters, Shard, Sources, StepInputs

__all__ = ["Counters", "Shard", "Sources", "StepInputs", "Update", "choose", "has_kernel"]

KERNEL_DEVICES = {"cuda"}


class Update(Protocol):
    """The update of one arena on one rank. Reads and writes everything where it lies; on CUDA the host never waits.

    Args:
        needs_host_used: whether ``begin`` must be told on the host which parameters take part.
    """

    needs_host_used: bool

    def begin(self, inputs: StepInputs) -> None:
        """Advances the counters by one step of ``inputs``; then ``step_`` updates one bucket after the other."""

    def step_(self, shard: Shard, bucket: Bucket, sources: Sources | None = None) -> None:
        """One step on a bucket's shard, in place. Its gradient may be overwritten; it is summed from ``sources`` as the
        update goes, where there are any.
        """

    def reload(self) -> None:
        """The counters have been written from outside."""

    @property
    def nbytes(self) -> int:
        """What it holds of its own, in bytes, beside the counters."""


def has_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether parameters of ``dtype`` on ``device`` are updated by the Triton kernel."""
    return dtype != torch.float64 and device.type in KERNEL_DEVICES and find_spec("triton") is not None


def choose(counters: Counters, dtype: torch.dtype, *, seed: int, rank: int) -> Update:
    if has_kernel(dtype, counters.steps.device):
        from shardadam.update.triton import TritonUpdate

        return TritonUpdate(counters, seed=seed)
    return FusedUpdate(counters, seed=seed, rank=rank)
