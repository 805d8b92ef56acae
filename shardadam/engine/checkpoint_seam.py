# SPDX-License-Identifier: Apache-2.0
"""The only access of ``checkpoint/`` to an optimizer's internals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from shardadam.engine.bindings import rebind_moved
from shardadam.engine.step import StepEngine
from shardadam.engine.storage import ShardedParam
from shardadam.ranks.store_barrier import StoreBarrier
from shardadam.transport import placement


class _AfterLoad(Protocol):
    def __call__(self, *, parameters: bool) -> None: ...


class CheckpointSeam:
    """What ``save`` and ``load`` read and call of an optimizer.

    Args:
        before_load: adds parameters that were unfrozen. Collective if there are any.
        after_load: updates what depends on the loaded state; with ``parameters=True``, also gathers the loaded
            parameters (collective).
    """

    def __init__(self, engine: StepEngine, before_load: Callable[[], None], after_load: _AfterLoad) -> None:
        self._engine = engine
        self._before_load = before_load
        self.after_load = after_load

    def before_load(self) -> None:
        """Adds parameters that were unfrozen. Collective if there are any.

        Raises:
            RuntimeError: parameters have the values of their averages.
        """
        self._engine.averages.refuse("load")
        self._before_load()

    @property
    def store_barrier(self) -> StoreBarrier:
        """The barrier of all ranks of the job: data-parallel ones, and those that hold other parts of the model."""
        return self._engine.job.store_barrier

    def writes(self, param: ShardedParam) -> bool:
        """Returns whether this rank is the first of those that hold equal shards of ``param``, which are saved once."""
        if param.arena.transport.replica > 0 or not placement.is_first_copy(param.parameter):
            return False
        # What lies on no mesh, or on one of some ranks that hold parts of the model, is equal on the other ones.
        parts, barrier = self._engine.parameters.parts, self._engine.job.store_barrier
        return not parts or min(parts) in (placement.mesh_ranks(param.parameter) or {barrier.ranks[barrier.rank]})

    @property
    def params(self) -> Sequence[ShardedParam]:
        return self._engine.parameters.params

    def description(self) -> dict[str, Any]:
        """Returns the formats of the state, for readers of the manifest."""
        return {
            "moments": self._engine.options.precision.moments,
            "masters": sorted({arena.format.master for arena in self._engine.parameters.arenas}),
        }

    def before_save(self) -> None:
        """Waits until the last step has updated parameters and state. Collective.

        Raises:
            RuntimeError: a step or a load was interrupted halfway, or a parameter was replaced.
            ValueError: ranks disagreed in the last step.
        """
        self._engine.check_between_steps()
        self._engine.step_sync.read_all()
        self._engine.poison.check("be saved")
        self._engine.averages.refuse("save")
        self._engine.gatherer.wait_all()
        rebind_moved(self.params)
        self._engine.refresh_masters()

    def bind_moved(self) -> None:
        """Copies parameters whose ``data`` was replaced back into the flat storage. Local.

        Raises:
            RuntimeError: device, dtype, shape or strides have changed.
        """
        rebind_moved(self.params)

    def poison(self, reason: str) -> None:
        """Makes ``step`` and ``save`` raise with this reason until a checkpoint is loaded."""
        self._engine.poison.reason = reason
