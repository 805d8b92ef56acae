# SPDX-License-Identifier: Apache-2.0
"""Updates this rank's shards, bucket by bucket, from the gradients that a reducer has. Communicates nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardadam.engine.merging import merged
from shardadam.engine.profiling import record
from shardadam.engine.storage import FlatArena, FlatBucket
from shardadam.offload import StateStore
from shardadam.sums.scattered import Scattered
from shardadam.update import Sources, StepInputs

ParamGroups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class LastStep:
    """What the last step of an arena depended on beside its state: from both, ``norms.py`` computes the update.

    Args:
        found_inf, used: as in ``update.StepInputs``.
        lr: a tensor is a copy: the user's may have changed since.
    """

    found_inf: Tensor
    used: Tensor
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    is_decoupled: bool


class Updater:
    """The updates of one step: ``begin``, ``update`` once for each bucket, and ``end``.

    Note: lost state
        If a rank cannot read or write offloaded state, it updates no bucket any more, but takes part in all collectives
        of the step, so that no peer waits for it. ``end`` raises; the next sync tells all ranks.

    Args:
        ema_decay: of the averages; None without.
        store: of offloaded state.

    Attributes:
        last: of each arena, its last step; none if it has taken none since it was built or loaded.
        left_out: by bucket index: whether its shard alone stayed as it was in that step; with ``update="backward"``.
    """

    def __init__(self, ema_decay: float | None, store: StateStore | None) -> None:
        self._ema_decay = ema_decay
        self._store = store
        self.last: dict[FlatArena, LastStep] = {}
        self.left_out: dict[int, Tensor] = {}
        self._lr: dict[int, Tensor] = {}  # copies of learning rates on the device, by param group

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
            device, group = arena.parameters.device, param_groups[arena.group_index]
            inputs = StepInputs(
                found_inf=found_inf.to(device),
                used=used[arena.indices].to(device),
                host_used=None if host_used is None else host_used[arena.indices],
                coefficient=coefficient_of(arena),
                hyperparameters=group,
                ema_decay=self._ema_decay,
            )
            arena.update.begin(inputs)
            self.last[arena] = LastStep(
                inputs.found_inf,
                inputs.used,
                lr=self._copied(group["lr"], arena.group_index),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                is_decoupled=group["decoupled_weight_decay"],
            )
        return host_used

    def _copied(self, lr: float | Tensor, group_index: int) -> float | Tensor:
        if not isinstance(lr, Tensor) or lr.device.type == "cpu":
            return float(lr)
        if group_index not in self._lr:
            self._lr[group_index] = torch.empty((), dtype=lr.dtype, device=lr.device)
        return self._lr[group_index].copy_(lr.reshape(()))  # always the same memory, for captured graphs

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
        first.arena.snapshot.finish()
        if found_inf is not None:
            self.left_out[first.index] = found_inf
        with record("update"):
            if first.stored is None:
                first.arena.update.step_(*merged(buckets), gradients, found_inf)
                return
            (bucket,) = buckets
            with first.stored.reserved.store.on_device(first.stored) as state:
                if state is not None:
                    shard = bucket.shard.with_state(state)
                    bucket.arena.update.step_(shard, bucket.plan, gradients, found_inf)

    def expect(self, order: Sequence[FlatBucket]) -> None:
        """Say in which order ``update`` will probably be called, so that offloaded state is read ahead."""
        store = self._store
        if store is not None:
            store.expect([bucket.stored for bucket in order if bucket.stored is not None])

    def end(self) -> None:
        """Wait until offloaded state is stored where the next access finds it.

        Raises:
            RuntimeError: state has been lost; see "Note: lost state".
        """
        store = self._store
        if store is not None:
            store.end_step()
        self.refuse_lost_state()

    def refuse_lost_state(self) -> None:
        """Raise RuntimeError if state has been lost; see "Note: lost state"."""
        if self.error is not None:
            raise RuntimeError(f"{self.error}. Load a whole checkpoint, on all ranks.")

    def recover(self) -> None:
        """Forget ``error`` and the last step: the whole state has been written anew."""
        self.last.clear()
        self.left_out.clear()
        if self._store is not None:
            self._store.recover()

    @property
    def error(self) -> str | None:
        """Why offloaded state has been lost; None if it is whole."""
        store = self._store
        return None if store is None or store.error is None else f"offload: {store.error}"


def scale_of(arena: FlatArena) -> Tensor | None:
    """Return what the sums in the arena's gradient shards are multiplied by to be means; None for 1."""
    scale = arena.gradient_scale
    if scale == 1:
        return None
    return torch.full((), scale, dtype=arena.format.exact_dtype, device=arena.parameters.device)
