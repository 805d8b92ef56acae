# SPDX-License-Identifier: Apache-2.0
"""``p.grad`` -> gradient shards, by one reducer for each ``gradient_sync``: ``BackwardReducer`` ("backward"),
``StepReducer`` ("step") and ``ExternalReducer`` ("external").
"""

from shardadam.engine.reduction.backward_reducer import BackwardReducer
from shardadam.engine.reduction.base import Reducer
from shardadam.engine.reduction.external_reducer import ExternalReducer
from shardadam.engine.reduction.step_reducer import StepReducer

__all__ = ["BackwardReducer", "ExternalReducer", "Reducer", "StepReducer"]
