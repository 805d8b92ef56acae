# SPDX-License-Identifier: Apache-2.0
"""Gradients -> gradient shards. ``rounds`` is the main road; ``bucket_views`` is where peers can read ``p.grad``, and
``external`` where somebody else has averaged them.
"""

from shardadam.engine.reduction.base import Reducer
from shardadam.engine.reduction.external import ExternalGradients
from shardadam.engine.reduction.rounds import GradientReducer

__all__ = ["ExternalGradients", "GradientReducer", "Reducer"]
