# SPDX-License-Identifier: Apache-2.0
"""Plans the bytes that training takes on each rank, by kind, before anything is allocated.

Uses the optimizer's own layout, formats and tables, so that a plan equals ``optimizer.memory()``. Allocates no
tensor of a parameter's size, and measures nothing.
"""

from shardadam.planner.fitting import Fit, fitting
from shardadam.planner.need import Need, adamw_bytes, adamw_need, need, need_of
from shardadam.planner.planning import (
    Planned,
    PlannedParameter,
    Setting,
    lay_out,
    memory_of,
    plan,
    shard_group_multiple,
)

__all__ = [
    "Fit",
    "Need",
    "Planned",
    "PlannedParameter",
    "Setting",
    "adamw_bytes",
    "adamw_need",
    "fitting",
    "lay_out",
    "memory_of",
    "need",
    "need_of",
    "plan",
    "shard_group_multiple",
]
