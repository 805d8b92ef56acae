# SPDX-License-Identifier: Apache-2.0
"""The agreement of ranks in ``save`` and ``load``: after each phase of a call, they exchange values and errors.

If one rank fails in a phase, all ranks raise at its end. Uses the store and no collective, so a thread beside training
may do it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from shardadam.checkpoint.files import CheckpointError
from shardadam.optimizer import ShardedAdam
from shardadam.ranks import desync
from shardadam.ranks.store_barrier import StoreBarrier
from shardadam.transport.groups import store_barrier_of

_P = ParamSpec("_P")
_R = TypeVar("_R")

ARRIVAL = "arrival"
"""The first phase of every call."""


def store_barrier_for(optimizer: ShardedAdam | None) -> StoreBarrier:
    """Returns the barrier of the optimizer's process group; without an optimizer, of the default group."""
    if isinstance(optimizer, ShardedAdam):
        return optimizer._checkpoint_seam.store_barrier
    return store_barrier_of(None) or StoreBarrier(None, 0, [0])


@dataclass(slots=True)
class Phase:
    """A block sets this rank's ``value`` (JSON); after the block, ``values`` has those of all ranks, in rank order."""

    value: Any = None
    values: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RankExchange:
    """What ranks exchange during one call.

    Note: late ranks
        The other ranks may have given up on a late rank. Its message about the old call then arrives in the first phase
        of a new one. The late rank raises; the others ignore the message and keep waiting.

    Args:
        call: the name of the call, equal on all ranks that make the same one.
        what: what the ranks are doing; begins every message.
        timeout_s: how long to wait for a rank that shows no heartbeat, in seconds.
    """

    store_barrier: StoreBarrier
    call: str
    what: str
    timeout_s: float

    @contextmanager
    def phase(self, name: str, *, is_last: bool = False) -> Iterator[Phase]:
        """Runs a block, then waits until all ranks have run theirs. Collective.

        Raises:
            Exception: what the block raised on this rank; an OSError as CheckpointError.
            CheckpointError: the block failed on another rank, or ranks are in different calls.
            TimeoutError: names the ranks that did not arrive.
        """
        phase = Phase()
        failure: Exception | None = None
        try:
            yield phase
        except Exception as error:
            failure = error
        answers = self._exchange(name, phase.value, failure, is_last=is_last)
        if isinstance(failure, OSError):
            raise CheckpointError(f"{self.what}: {failure}.") from failure
        if failure is not None:
            raise failure
        for rank, answer in zip(self.store_barrier.ranks, answers, strict=True):
            if answer["failure"] is not None:
                raise CheckpointError(f"{self.what}: failed on rank {rank}, so on all ranks: {answer['failure']}")
        phase.values = [answer["value"] for answer in answers]

    def _exchange(self, phase: str, value: Any, failure: Exception | None, *, is_last: bool) -> list[dict[str, Any]]:
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        text = json.dumps({"call": self.call, "phase": phase, "failure": message, "value": value})
        while True:
            try:
                texts = self.store_barrier.exchange(text, what=self.what, timeout_s=self.timeout_s, linger=is_last)
            except TimeoutError as error:
                if phase != ARRIVAL:
                    raise
                raise TimeoutError(f"{error}{desync.known_status(self.store_barrier.ranks)}") from None
            answers = [json.loads(text) for text in texts]
            phases = {answer["phase"] for answer in answers}
            calls = sorted({answer["call"] for answer in answers})
            if len(phases) == len(calls) == 1:
                return answers
            if phase != ARRIVAL:
                raise CheckpointError(
                    f"{self.what}: this rank arrived after the others had given up waiting for it. Call it again on "
                    "all ranks."
                ) from failure
            if phases == {ARRIVAL}:
                raise CheckpointError(
                    f"{self.what}: ranks are in different calls, found {' and '.join(calls)}, expected the same one."
                )


def reported(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: make desync reports name ``save`` and ``load`` while they run."""

    @wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        optimizer = kwargs.get("optimizer")
        with desync.in_call(call.__name__, optimizer if isinstance(optimizer, ShardedAdam) else _no_optimizer):
            return call(*args, **kwargs)

    return run


class _NoOptimizer:
    """Stands for the optimizer of calls without one."""


_no_optimizer = _NoOptimizer()
