# SPDX-License-Identifier: Apache-2.0
"""Finds parameters whose data was replaced since they were bound to flat storage, and binds them again. Local."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam.engine.storage import ShardedParam, bind
from shardadam.engine.strides import same_order
from shardadam.transport import placement


def rebind_moved(params: Sequence[ShardedParam]) -> None:
    """Bind parameters again if their data was replaced by a tensor of the same kind (``p.data = ...``, ``model.to``).

    Raises:
        RuntimeError: a parameter has another device, dtype, shape or memory format than when it was added. Nothing has
            been changed.
    """
    for param in params:
        if param.local is not param.parameter:  # module.to() swaps the contents of a DTensor
            param.local = placement.local_tensor(param.parameter)
    moved = [param for param in params if param.local.data_ptr() != param.address or param.arena.is_borrowed]
    for param in moved:
        local, flat = param.local, param.arena.parameters
        found = (local.device, local.dtype, local.shape)
        expected = (flat.device, flat.dtype, param.shape)
        if found != expected or not same_order(local.stride(), param.stride, param.shape):
            raise RuntimeError(
                f"Parameter {param.name!r} was replaced after the optimizer was built: found {_describe(*found)} with "
                f"strides {local.stride()}, expected {_describe(*expected)} with strides {param.stride}. Call "
                "model.to(...) before building the optimizer."
            )
    for param in moved:
        if not param.arena.is_borrowed:
            bind(param)


class Bindings:
    """Finds out in one pass, cheaply, whether parameters are where they were bound."""

    def __init__(self) -> None:
        self._params: list[ShardedParam] = []
        self._fixed: list[Tensor] = []  # the parameters that are in arenas for good, but no DTensors
        self._addresses: list[int] = []  # of those
        self._others: list[ShardedParam] = []

    def add(self, params: Sequence[ShardedParam]) -> None:
        self._params += params
        for param in params:
            if param.local is param.parameter and not param.arena.is_borrowed:
                self._fixed.append(param.parameter)
                self._addresses.append(param.address)
            else:
                self._others.append(param)

    def restore(self) -> None:
        """Bind all parameters again whose data was replaced; raises as ``rebind_moved``."""
        if [parameter.data_ptr() for parameter in self._fixed] != self._addresses:
            rebind_moved(self._params)
        elif self._others:
            rebind_moved(self._others)


def _describe(device: torch.device, dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{dtype} of shape {tuple(shape)} on {device}"
