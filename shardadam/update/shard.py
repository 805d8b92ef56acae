# SPDX-License-Identifier: Apache-2.0
"""The inputs of an update, as plain data: a flat shard in its stored formats, counters, and what one step adds to them.

Nothing here computes. ``update/reference.py`` says what the formats mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from shardadam.layout import ALIGNMENT_NUMEL

SCALARS = 8
"""Columns of the table, float32, in which a kernel finds what is the same for a whole step or parameter."""
_ONE_PER_BLOCK = ("exp_avg_scale", "exp_avg_sq_scale", "blocks", "positions")


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A rank's flat shard in its stored formats: 1-D contiguous tensors of one length, on one device.

    A block is ``ALIGNMENT_NUMEL`` elements; a shard is a whole number of blocks.

    Args:
        parameter: the shard's slice of the parameters, in their dtype. With ``positions`` all parameters of the arena.
        gradient: averaged over ranks, up to ``StepInputs.coefficient``; of any floating dtype. None if ``step_`` is
            given ``Sources`` or ``Scattered``.
        exp_avg, exp_avg_sq: float32 (float64), bfloat16, or int8 and uint8 codes.
        exp_avg_scale, exp_avg_sq_scale: float32, one for each block; None unless the moments are codes.
        master: float32, or None.
        remainder: int16, or None. With neither, a parameter below float32 is rounded stochastically.
        blocks: for each block the parameter that it belongs to, as an index into ``Counters``; int16 or int32. Padding
            belongs to the parameter before it.
        first_block: the shard's offset in its arena, in blocks; not used with ``positions``.
        positions: for the kernel, of a shard that is not contiguous in its arena, as that of several buckets: the
            position of each block in the arena, in blocks; int32. Else None.
        average: exponential moving average of the exact weights, float32 (float64); None without ``ema_decay``.
    """

    parameter: Tensor
    gradient: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor | None
    exp_avg_sq_scale: Tensor | None
    master: Tensor | None
    remainder: Tensor | None
    blocks: Tensor
    first_block: int
    positions: Tensor | None = None
    average: Tensor | None = None

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    @property
    def is_encoded(self) -> bool:
        """Whether the parameter or the moments are stored in another dtype than the arithmetic uses."""
        return not self.parameter.dtype == self.exp_avg.dtype == self.exact_dtype

    @property
    def is_random(self) -> bool:
        """Whether the parameter or the moments are rounded stochastically."""
        return self.exp_avg.dtype != self.exact_dtype or not self.has_exact_weight

    @property
    def has_exact_weight(self) -> bool:
        """Whether the exact weight is stored: the parameter is exact, or has a master or a remainder."""
        is_exact = self.parameter.dtype == self.exact_dtype
        return is_exact or self.master is not None or self.remainder is not None

    def with_state(self, state: Mapping[str, Tensor]) -> Shard:
        """Return the shard with other tensors as its state, by the names in ``update/formats.py``."""
        values: dict[str, Any] = dict(state)
        return replace(self, **values)

    def narrow(self, elements: slice, gradient: Tensor | None = None) -> Shard:
        """Return the shard's ``elements``, as views.

        Args:
            elements: start and stop are multiples of ``ALIGNMENT_NUMEL``.
            gradient: of these elements; None: the shard's own.
        """
        blocks = slice(elements.start // ALIGNMENT_NUMEL, elements.stop // ALIGNMENT_NUMEL)
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "gradient" and gradient is not None:
                value = gradient
            elif isinstance(value, Tensor) and not (field.name == "parameter" and self.positions is not None):
                value = value[blocks if field.name in _ONE_PER_BLOCK else elements]
            values[field.name] = value
        values["first_block"] = self.first_block + blocks.start
        return Shard(**values)


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """Gradients that the update sums itself: ``scale`` times the sum of ``slices``, in their order.

    The sum is made in float32, or in float64 for float64 parameters.

    Args:
        slices: one of each rank, as long as the shard, in the dtype of the parameters.
        scale: multiplies the sum.
    """

    slices: list[Tensor]
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class Counters:
    """State of each parameter of an arena, on the arena's device; all tensors have one element for each parameter.

    Args:
        steps: float32; t, the number of steps in which the parameter took part.
        bounds: float64; C^2 after those steps (``reference.bound_squared_after``).
        param_ids: int64; the parameter's position in ``param_groups``, counted over all groups.
        first_blocks: int64; the parameter's offset in the arena, in blocks of ``ALIGNMENT_NUMEL`` elements.
        numels: int64; elements of the parameter.
        n_averaged: int64; number of averages that were made of it; None without ``ema_decay``. It may exceed ``steps``:
            a parameter that takes no part in a step is averaged all the same, as in torch.optim.swa_utils.
    """

    steps: Tensor
    bounds: Tensor
    param_ids: Tensor
    first_blocks: Tensor
    numels: Tensor
    n_averaged: Tensor | None = None

    def clone(self) -> Counters:
        """Return a copy of what steps change, beside the same tables."""
        averaged = None if self.n_averaged is None else self.n_averaged.clone()
        return replace(self, steps=self.steps.clone(), bounds=self.bounds.clone(), n_averaged=averaged)

    def copy_(self, other: Counters) -> None:
        """Take over what steps change from ``other``."""
        self.steps.copy_(other.steps)
        self.bounds.copy_(other.bounds)
        if self.n_averaged is not None and other.n_averaged is not None:
            self.n_averaged.copy_(other.n_averaged)

    @property
    def scalar_bytes(self) -> int:
        """Bytes of what steps change."""
        return self.steps.nbytes + self.bounds.nbytes + (0 if self.n_averaged is None else self.n_averaged.nbytes)

    @property
    def table_bytes(self) -> int:
        """Bytes of what no step changes."""
        return self.param_ids.nbytes + self.first_blocks.nbytes + self.numels.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """What one step needs beside the shards and the counters, for all parameters of one arena.

    Args:
        found_inf: 0-dim float32: 1 if a gradient on any rank is not finite, and then nothing is written; else 0.
        used: bool, one for each parameter of the arena: whether it takes part in this step.
        host_used: ``used`` on the host; None if all parameters take part, or if the update reads ``used`` alone.
        coefficient: what gradients are multiplied by, 0-dim float32 (float64 for float64 parameters); None for 1.
        hyperparameters: a param group: lr, betas, eps, weight_decay, maximize, decoupled_weight_decay.
        ema_decay: of the averages; used if the arena has them.
    """

    found_inf: Tensor
    used: Tensor
    host_used: Sequence[bool] | None
    coefficient: Tensor | None
    hyperparameters: Mapping[str, Any]
    ema_decay: float | None = None
