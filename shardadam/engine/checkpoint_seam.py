# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint needs of an optimizer, and all that it may touch of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from shardadam.engine.step import StepEngine
from shardadam.engine.storage import ShardedParam, rebind_moved
from shardadam.ranks.store_barrier import StoreBarrier


class _AfterLoad(Protocol):
    def __call__(self, *, parameters: bool) -> None: ...


class CheckpointSeam:
    """
    Args:
        before_load: adds parameters that are not frozen any more. Collective if there are any.
        after_load: takes notice of loaded state, and with ``parameters=True`` of loaded parameters, which it gathers.
            Collective then.
    """

    def __init__(self, engine: StepEngine, before_load: Callable[[], None], after_load: _AfterLoad) -> None:
        self._engine = engine
        self.before_load = before_load
        self.after_load = after_load

    @property
    def store_barrier(self) -> StoreBarrier:
        """Where the ranks of the optimizer's process group exchange texts with a time limit."""
        return self._engine.transport.store_barrier

    @property
    def is_writer(self) -> bool:
        """Of the ranks that hold the same shard (replicas), the first one writes it."""
        return self._engine.transport.replica == 0

    @property
    def params(self) -> Sequence[ShardedParam]:
        return self._engine.parameters.params

    def description(self) -> dict[str, Any]:
        """The formats of the state, for people who inspect a checkpoint."""
        return {
            "moments": self._engine.options.precision.moments,
            "masters": sorted({arena.format.master for arena in self._engine.parameters.arenas}),
        }

    def before_save(self) -> None:
        """Waits until parameters and state are what the last step made of them. Collective.

        Raises:
            RuntimeError: a step or a load was broken off and left a part behind; a parameter was replaced.
            ValueError: ranks disagreed in the last step.
        """
        self._engine.step_sync.read_all()
        self._engine.poison.check("be saved")
        self._engine.gatherer.wait_all()
        rebind_moved(self.params)

    def bind_moved(self) -> None:
        """Takes parameters back whose ``data`` was replaced.

        Raises:
            RuntimeError: one was replaced by a tensor of another kind.
        """
        rebind_moved(self.params)

    def poison(self, reason: str) -> None:
        """Until another checkpoint is loaded, ``step`` and ``save`` raise with this reason."""
        self._engine.poison.reason = reason
