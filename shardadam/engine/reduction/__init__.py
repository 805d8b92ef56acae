# SPDX-License-Identifier: Apache-2.0
"""``p.grad`` -> gradient shards, by one reducer for each ``gradient_sync``: ``BackwardReducer`` ("backward"),
``StepReducer`` ("step") and ``ExternalReducer`` ("external").
"""

from shardadam.engine.reduction.backward import BackwardReducer
from shardadam.engine.reduction.base import Reducer
from shardadam.engine.reduction.external import ExternalReducer
from shardadam.engine.reduction.in_step import StepReducer

__all__ = ["BackwardReducer", "ExternalReducer", "Reducer", "StepReducer"]
