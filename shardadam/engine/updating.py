# SPDX-License-Identifier: Apache-2.0
"""Updates this rank's shards, bucket by bucket, from the gradients that a reducer has. Communicates nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardadam.engine.profiling import record
from shardadam.engine.storage import FlatArena, FlatBucket, merged
from shardadam.sums.scattered import Scattered
from shardadam.update import Sources, StepInputs

ParamGroups = Sequence[Mapping[str, Any]]


class Updater:
    """The updates of one step: ``begin``, then ``update`` once for each bucket.

    Args:
        ema_decay: of the averages; None without.
    """

    def __init__(self, ema_decay: float | None) -> None:
        self._ema_decay = ema_decay

    def begin(
        self,
        param_groups: ParamGroups,
        *,
        arenas: Sequence[FlatArena],
        found_inf: Tensor,
        used: Tensor,
        all_used: bool,
        coefficient_of: Callable[[FlatArena], Tensor | None],
    ) -> list[bool] | None:
        """Pass the inputs of this step to the updates of ``arenas``.

        Args:
            found_inf: 1 if no bucket must be written, else 0; 0-dim float32.
            used: which parameters take part; bool, by param index.
            all_used: whether the host knows that all do.
            coefficient_of: what the update of an arena multiplies gradients by; None for 1.

        Returns:
            Which parameters take part, by param index, if the host knows; None for all, or if only the device knows.
        """
        # If this rank had all gradients, all parameters take part. Otherwise only the device knows.
        must_read = not all_used and any(arena.update.needs_host_used for arena in arenas)
        host_used = used.tolist() if must_read else None
        for arena in arenas:
            device = arena.parameters.device
            arena.update.begin(
                StepInputs(
                    found_inf=found_inf.to(device),
                    used=used[arena.indices].to(device),
                    host_used=None if host_used is None else host_used[arena.indices],
                    coefficient=coefficient_of(arena),
                    hyperparameters=param_groups[arena.group_index],
                    ema_decay=self._ema_decay,
                )
            )
        return host_used

    def update(
        self,
        buckets: Sequence[FlatBucket],
        gradients: Sources | Scattered | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update the shards of ``adjoining`` buckets in place.

        Args:
            gradients, found_inf: as in ``update.Update.step_``.
        """
        first = buckets[0]
        with record("update"):
            first.arena.update.step_(merged(buckets), first.plan, gradients, found_inf)


def scale_of(arena: FlatArena) -> Tensor | None:
    """Return what the sums in the arena's gradient shards are multiplied by to be means; None for 1."""
    scale = arena.gradient_scale
    if scale == 1:
        return None
    return torch.full((), scale, dtype=arena.format.exact_dtype, device=arena.parameters.device)
