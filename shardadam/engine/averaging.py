# SPDX-License-Identifier: Apache-2.0
"""Averages of the weights (``ema_decay``) in place of the parameters, and the training weights back, exactly.

Only this rank's shards of the training weights are kept meanwhile, 1/N of the parameters: an all-gather restores the
rest. Masters and remainders stay where they are, and are exact again beside the parameters that come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from shardadam.engine.borrowing import lent
from shardadam.engine.gathering import ParameterGatherer, mark_written
from shardadam.engine.parameters import ShardedParameters
from shardadam.engine.step_sync import Poison
from shardadam.engine.storage import FlatBucket
from shardadam.update import formats, reference


class ParameterAverages:
    """What ``ShardedAdam.averaged_parameters`` does at its beginning and at its end.

    Attributes:
        is_active: whether parameters have the values of their averages now.
    """

    def __init__(self, parameters: ShardedParameters, gatherer: ParameterGatherer, poison: Poison) -> None:
        self._parameters = parameters
        self._gatherer = gatherer
        self._poison = poison
        self._kept: list[tuple[FlatBucket, Tensor]] = []  # this rank's shards of the training weights
        self._paused: AbstractContextManager[None] = nullcontext()
        self.is_active = False

    def check(self) -> None:
        """Raise RuntimeError unless there are averages, and parameters are the training weights."""
        if self._parameters.options.ema_decay is None:
            raise RuntimeError(
                "averaged_parameters: found an optimizer without averages, expected one with ema_decay. Build it with "
                "ema_decay=0.999, for example."
            )
        self.refuse("averaged_parameters()")
        self._poison.check("put averages into its parameters")

    def refuse(self, call: str) -> None:
        """Raise RuntimeError if parameters have the values of their averages now."""
        if self.is_active:
            raise RuntimeError(
                f"{call}: found the averages in the parameters (within averaged_parameters()), expected the training "
                f"weights. Leave the context first; nothing has been changed or lost."
            )

    @torch.no_grad()
    def begin(self, paused: AbstractContextManager[None]) -> None:
        """Put the averages into the parameters, rounded to their dtype. Collective.

        An average that equals its exact weight gives the parameter's own value, bit for bit.

        Args:
            paused: entered until ``end``: with ``update="backward"``, a context in which backward updates nothing.
        """
        parameters = self._parameters
        self._kept, self._paused = [], paused
        self.is_active = True
        with self._poisoned_by_errors("did not begin"), lent(parameters.arenas, written=True):
            paused.__enter__()
            for bucket in parameters.buckets:
                parameter = bucket.shard.parameter
                self._kept.append((bucket, parameter.clone()))
                parameter.copy_(rounded(bucket.exact_state(formats.AVERAGE), parameter.dtype))
                self._gatherer.dispatch(bucket)
            self._gatherer.synchronize()
        mark_written(parameters.params)

    @torch.no_grad()
    def end(self) -> None:
        """Put the training weights back. Collective, also if the code in between has raised on some ranks."""
        parameters = self._parameters
        with self._poisoned_by_errors("did not put the weights back"):
            self._gatherer.synchronize()
            try:
                parameters.bindings.restore()
            finally:
                kept, self._kept = self._kept, []
                self.is_active = False
                self._paused.__exit__(None, None, None)
                with lent(parameters.arenas, written=True):
                    for bucket, values in kept:
                        bucket.shard.parameter.copy_(values)
                        self._gatherer.dispatch(bucket)
                    self._gatherer.synchronize()
                mark_written(parameters.params)

    @contextmanager
    def _poisoned_by_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._poison.reason = f"averaged_parameters() {what} ({type(error).__name__})"
            raise


def rounded(average: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``average`` in a parameter's dtype, rounded as a master is: half away from zero."""
    if average.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16):
        return reference.round_half_away(average, dtype)
    return average.to(dtype)
