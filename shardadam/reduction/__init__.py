# SPDX-License-Identifier: Apache-2.0
"""Gradients -> gradient shards. ``rounds`` is the main road; ``exposed`` is where neighbours can read ``p.grad``, and
``external`` where somebody else has averaged them.
"""

from shardadam.reduction.base import Reducer
from shardadam.reduction.external import ExternalGradients
from shardadam.reduction.rounds import GradientReducer

__all__ = ["ExternalGradients", "GradientReducer", "Reducer"]
