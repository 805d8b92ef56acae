# SPDX-License-Identifier: Apache-2.0
"""``update="backward"``: a bucket is updated as soon as its gradients are reduced, while backward goes on.

So no gradient is kept until the step. Communicates nothing.

Note: what a bucket waits for
    A bucket is updated in backward only if this rank had a gradient for each of its parameters: they take part in the
    step whatever the other ranks had. Of the others only the sync of all ranks tells whether a parameter had a gradient
    anywhere. Such buckets keep their reduced gradients until ``step``, and so do all while a peer may still be reading
    what this rank would write.

Note: the counters
    The first bucket of a step advances the counters of all parameters. If some turn out to take no part, ``step`` puts
    all counters back, and advances those that do. So the result is that of an update in ``step``, bit for bit.

Note: gradients that are not finite
    No rank knows of the gradients of others when it updates a bucket. So only the shard whose gradient is infinite or
    NaN stays as it is; its parameters' steps count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardadam.checks import arguments
from shardadam.engine.averaging import ParameterAverages
from shardadam.engine.gathering import ParameterGatherer
from shardadam.engine.parameters import ShardedParameters
from shardadam.engine.reduction.base import Gradients
from shardadam.engine.step_sync import Poison
from shardadam.engine.storage import FlatArena, FlatBucket
from shardadam.engine.updating import ParamGroups, Updater, scale_of
from shardadam.state import masters
from shardadam.sums.stats import GradStats, are_finite
from shardadam.transport.streams import InStreamOrder
from shardadam.update import Counters


class UpdateInBackward:
    """Updates the buckets of one step as a reducer completes them, and the rest in ``finish``.

    Args:
        param_groups: returns those of the optimizer now.
        poison: gets the reason if an update is interrupted.
    """

    def __init__(
        self,
        parameters: ShardedParameters,
        updater: Updater,
        gatherer: ParameterGatherer,
        averages: ParameterAverages,
        *,
        param_groups: Callable[[], ParamGroups],
        poison: Poison,
    ) -> None:
        self._parameters = parameters
        self._updater = updater
        self._gatherer = gatherer
        self._averages = averages
        self._param_groups = param_groups
        self._poison = poison
        self._streams = InStreamOrder()
        # Of the step that has begun
        self._groups: list[dict[str, Any]] = []  # hyperparameters when it began
        self._before: dict[FlatArena, Counters] = {}  # the counters when it began, of the arenas that take part
        self._kept: dict[int, tuple[Gradients, Tensor]] = {}  # by bucket index: gradients, and whether to leave it out
        self._left_out: list[Tensor] = []  # of each bucket: whether its shard stays as it is, 0-dim float32

    @torch.no_grad()
    def take(self, bucket: FlatBucket, gradients: Gradients, stats: GradStats, used: Sequence[bool]) -> bool:
        """Update the bucket's shard, or keep its gradients until ``finish``. Local.

        Args:
            stats: of the gradients.
            used: by param index: whether this rank has had a gradient.

        Returns:
            Whether the gradients have been used, so that their memory may be.

        Raises:
            TypeError, ValueError: a hyperparameter is not valid. Nothing has been written; the gradients are kept.
            RuntimeError: a step was interrupted before, and no checkpoint has been loaded since; or parameters have the
                values of their averages.
        """
        self._poison.check("update parameters")
        self._averages.refuse('backward with update="backward"')
        with self._streams.on(bucket.parameters.device):
            found_inf = are_finite([stats], bucket.parameters.device).logical_not().float()
            self._left_out.append(found_inf)
            self._kept[bucket.index] = gradients, found_inf
            if not self._gatherer.is_idle or not all(used[param.index] for param, _ in bucket.segments):
                return False
            if not self._before:
                arguments.check_before_step(self._param_groups())
                self._parameters.bindings.restore()
            with self._poisoned_if_interrupted():
                self._begin()
                self._update(bucket, gradients, found_inf)
            del self._kept[bucket.index]
        return True

    def left_out(self, device: torch.device) -> Tensor:
        """Return the number of this rank's shards that stay as they are, 0-dim float64."""
        if not self._left_out:
            return torch.zeros((), dtype=torch.float64, device=device)
        return torch.stack([one.to(device) for one in self._left_out]).sum(dtype=torch.float64)

    @torch.no_grad()
    def finish(self, param_groups: ParamGroups, *, used: Tensor, all_used: bool) -> list[bool] | None:
        """Update the remaining buckets, now that it is known which parameters take part in the step.

        Args:
            used, all_used: as in ``Updater.begin``.

        Returns:
            As ``Updater.begin``.
        """
        with self._poisoned_if_interrupted():
            self._groups = self._groups or _hyperparameters(param_groups)
            host_used: list[bool] | None = None
            if not all_used:
                for arena, before in self._before.items():
                    arena.counters.copy_(before)
                arenas = self._parameters.arenas
                host_used = self._begin_arenas(arenas, used=used, all_used=False)
            else:
                self._begin()
            self._updater.expect([self._parameters.buckets[index] for index in self._kept])
            for index, (gradients, found_inf) in self._kept.items():
                self._update(self._parameters.buckets[index], gradients, found_inf)
        self.reset()
        return host_used

    def reset(self) -> None:
        """Forget the step. All streams of a later backward run after it."""
        self._streams = InStreamOrder()
        self._groups = []
        self._before.clear()
        self._kept.clear()
        self._left_out.clear()

    def _begin(self) -> None:
        """Begin the update of all arenas that it has not begun for, as if all parameters took part."""
        left = [arena for arena in self._parameters.arenas if arena not in self._before]
        if left:
            masters.settle_(self._parameters.params)
            self._groups = self._groups or _hyperparameters(self._param_groups())
            for arena in left:
                self._before[arena] = arena.counters.clone()
            self._begin_arenas(left, used=None, all_used=True)
            self._updater.expect(self._parameters.buckets)

    def _begin_arenas(self, arenas: Sequence[FlatArena], *, used: Tensor | None, all_used: bool) -> list[bool] | None:
        device = arenas[0].parameters.device
        if used is None:
            used = torch.ones(len(self._parameters.params), dtype=torch.bool, device=device)
        return self._updater.begin(
            self._groups,
            arenas=arenas,
            found_inf=torch.zeros((), device=device),
            used=used,
            all_used=all_used,
            coefficient_of=scale_of,
        )

    def _update(self, bucket: FlatBucket, gradients: Gradients, found_inf: Tensor) -> None:
        if not isinstance(gradients, Tensor):
            self._updater.update([bucket], gradients, found_inf)
            return
        before = bucket.shard
        bucket.shard = replace(before, gradient=gradients)
        try:
            self._updater.update([bucket], None, found_inf)
        finally:
            bucket.shard = before

    @contextmanager
    def _poisoned_if_interrupted(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._poison.reason = f"an update in backward did not complete ({type(error).__name__})"
            raise


def _hyperparameters(param_groups: ParamGroups) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in param_groups]
