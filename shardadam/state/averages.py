# SPDX-License-Identifier: Apache-2.0
"""Averages before the first step: until a first average is made, the average of a parameter is its exact weight. Local.

It is stored when the parameter is added, and again when it is read, since the weight may have been written meanwhile:
the model may be loaded after the optimizer was built.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from shardadam.engine.storage import ShardedParam
from shardadam.state import masters
from shardadam.state.local import local_state, own_elements
from shardadam.update import formats, reference


@torch.no_grad()
def refresh_(params: Iterable[ShardedParam]) -> None:
    """Stores the exact weights as the averages of those that have none yet. Waits for the device."""
    counts: dict[int, list[int]] = {}  # by the id of the arena
    for param in params:
        n_averaged = param.arena.counters.n_averaged
        if n_averaged is None:
            continue
        if id(param.arena) not in counts:
            counts[id(param.arena)] = n_averaged.tolist()
        if counts[id(param.arena)][param.arena_index] == 0:
            masters.refresh_(param)
            state, parameter = local_state(param), own_elements(param, param.local.detach())
            found = (state.get(name) for name in formats.MASTERS)
            kept = (None if one is None else one.to(parameter.device) for one in found)
            state[formats.AVERAGE].copy_(reference.exact_weight(parameter, *kept))
