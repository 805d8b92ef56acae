# SPDX-License-Identifier: Apache-2.0
"""What the update works on: a flat shard as it is stored, and the counters of the parameters in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from shardadam.layout import ALIGNMENT_NUMEL


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A rank's flat shard, in the formats of ``update/reference.py``; 1-D tensors, contiguous, on one device.

    Args:
        parameter: the parameters' slice, in their dtype.
        gradient: averaged over ranks; float32, float64 for float64 parameters. Its memory may not be there while there
            are ``Sources`` to sum instead.
        exp_avg, exp_avg_sq: float32 (float64), bfloat16, or int8 and uint8 codes.
        exp_avg_scale, exp_avg_sq_scale: float32, one for every ``ALIGNMENT_NUMEL`` elements, with codes only.
        master: float32, or None.
        remainder: int16, or None. Without either, a parameter below float32 is rounded stochastically.
        blocks: which parameter of the arena each ``ALIGNMENT_NUMEL`` elements belong to, as an index into ``Counters``;
            int16 or int32. Padding counts to the parameter before it.
        first_block: where the shard begins in its arena, in units of ``ALIGNMENT_NUMEL`` elements.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None
    exp_avg_sq_scale: Tensor | None
    master: Tensor | None
    remainder: Tensor | None
    blocks: Tensor
    first_block: int

    @property
    def is_coded(self) -> bool:
        """Whether anything is stored in another format than it is worked on."""
        return not self.parameter.dtype == self.exp_avg.dtype == self.gradient.dtype

    @property
    def is_random(self) -> bool:
        """Whether anything is rounded stochastically."""
        exact = self.gradient.dtype
        has_weight = self.parameter.dtype == exact or self.master is not None or self.remainder is not None
        return self.exp_avg.dtype != exact or not has_weight

    def part(self, elements: slice, gradient: Tensor | None = None) -> Shard:
        """The elements from ``start`` to ``stop``, which are multiples of ``ALIGNMENT_NUMEL``.

        Args:
            gradient: theirs, if it is not the shard's.
        """
        blocks = slice(elements.start // ALIGNMENT_NUMEL, elements.stop // ALIGNMENT_NUMEL)
        parts: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "gradient" and gradient is not None:
                parts["gradient"] = gradient
                continue
            of_blocks = field.name in ("exp_avg_scale", "exp_avg_sq_scale", "blocks")
            parts[field.name] = value[blocks if of_blocks else elements] if isinstance(value, Tensor) else value
        parts["first_block"] = self.first_block + blocks.start
        return Shard(**parts)


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """Where the gradient of a shard comes from, if it has not been summed up: ``scale`` times the sum of ``slices``, in
    their order and in float32 (float64).

    Args:
        slices: of every rank, as long as the shard, in the dtype of the parameters.
    """

    slices: list[Tensor]
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Counters:
    """What the update must know of each parameter of an arena, on its device; all of one length.

    Args:
        steps: t, float32: steps in which the parameter took part.
        bounds: C^2 after those steps, float64 (``reference.bound_squared_after``).
        param_ids: the parameter's place among all parameters of the optimizer, int64.
        first_blocks: where the parameter begins in the arena, in units of ``ALIGNMENT_NUMEL`` elements, int64.
    """

    steps: Tensor
    bounds: Tensor
    param_ids: Tensor
    first_blocks: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """What one step needs beside the shards and the counters, for all parameters of one arena.

    Args:
        found_inf: 0-dim float32: 1 if a gradient on any rank is not finite, and then nothing is written; else 0.
        used: bool, one for each parameter of the arena: whether it takes part in this step.
        host_used: ``used`` on the host; None if all parameters take part, or if the update reads ``used`` alone.
        coefficient: what gradients are multiplied by, 0-dim float32; None for 1.
        hyperparameters: a param group: lr, betas, eps, weight_decay, maximize, decoupled_weight_decay.
    """

    found_inf: Tensor
    used: Tensor
    host_used: Sequence[bool] | None
    coefficient: Tensor | None
    hyperparameters: Mapping[str, Any]
