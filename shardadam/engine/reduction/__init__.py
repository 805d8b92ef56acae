# SPDX-License-Identifier: Apache-2.0
"""``p.grad`` -> mean gradients, by one reducer for each ``gradient_sync``: ``BackwardReducer`` ("backward"),
``StepReducer`` ("step") and ``LocalReducer`` ("external"). ``AloneReducer`` and ``LocalReducer`` stand in for the first
two on one rank, ``AloneInBackward`` with ``update="backward"``.
"""

from shardadam.engine.reduction.backward_reducer import BackwardReducer
from shardadam.engine.reduction.base import Reducer, Take
from shardadam.engine.reduction.local_reducer import AloneInBackward, AloneReducer, LocalReducer
from shardadam.engine.reduction.step_reducer import StepReducer
from shardadam.transport import Transport

__all__ = ["LocalReducer", "Reducer", "StepReducer", "reducer_for"]


def reducer_for(gradient_sync: str, transport: Transport, *, with_squares: bool, take: Take | None = None) -> Reducer:
    """Return the reducer for ``gradient_sync``.

    Args:
        with_squares: sum up the squares for the norm during the reduction, while gradients are in the cache.
        take: for ``update="backward"``, takes the gradients of each bucket when they are reduced.
    """
    if take is not None:
        if transport.sends:
            return BackwardReducer(transport, with_squares=False, take=take)
        return AloneInBackward(take)
    if gradient_sync == "external":
        return LocalReducer(is_external=True)
    if not transport.sends:
        return AloneReducer() if gradient_sync == "backward" else LocalReducer(is_external=False)
    kind = BackwardReducer if gradient_sync == "backward" else StepReducer
    return kind(transport, with_squares=with_squares)
