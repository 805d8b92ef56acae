# SPDX-License-Identifier: Apache-2.0
"""Keeps exact masters while the model's values and the optimizer's state are written one after the other. Local.

Note: masters that wait for their parameter
    A master is exact only beside the parameter that it rounds to. A load may write the state before the model; averages
    may be swapped into the model, and out again. Until the next step, a master that does not round to its parameter
    stays in ``ShardedParam.kept_master``, and the parameter is the exact value. As soon as the parameter has the value
    that the kept master rounds to, that master is the exact value again. The next step settles it, and frees the copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from shardadam.engine.storage import ShardedParam
from shardadam.state.local import local_state, own_elements
from shardadam.update import formats


def write_master_(
    param: ShardedParam, master: Tensor, *, state: Mapping[str, Tensor], parameter: Tensor, start: int = 0
) -> None:
    """Stores ``master`` as the exact values behind this rank's elements ``start : start + len(master)``.

    Keeps a copy where the state alone cannot hold it, because the parameter does not have its value yet. Waits for the
    device.

    Args:
        param: with ``kept_master`` None before the first elements are written.
        master: 1-D.
        state: views of these elements' state, by the names in ``update/formats.py``.
        parameter: these elements' values.
    """
    formats.write_master_(state, parameter, master)
    if "remainder" not in state:
        return  # a float32 master is stored whole
    if param.kept_master is None:
        if not bool(formats.is_written(parameter, master.float()).any()):
            return
        param.kept_master = _exact(param).clone()
    param.kept_master[start : start + master.numel()] = master


@torch.no_grad()
def refresh_(param: ShardedParam) -> None:
    """Makes the stored master what the next step will start from, if the parameter was written from outside.

    Waits for the device, unless a master is kept.
    """
    state = local_state(param)
    kept = param.kept_master
    if "remainder" in state and kept is not None:
        formats.write_master_(state, _parameter(param), kept)
    elif "master" in state:
        parameter = _parameter(param)
        stored = state["master"].to(parameter.device)
        written = formats.is_written(parameter, stored)
        if kept is None:
            if not bool(written.any()):
                return
            kept = param.kept_master = stored.clone()
        value = torch.where(formats.is_written(parameter, kept), parameter.to(stored.dtype), kept)
        state["master"].copy_(torch.where(written, value, stored))


def settle_(params: Iterable[ShardedParam]) -> None:
    """Makes the present parameters decide about all kept masters, and frees these. The host does not wait, unless the
    state is offloaded.
    """
    for param in params:
        if param.kept_master is not None:
            refresh_(param)
            param.kept_master = None


def _parameter(param: ShardedParam) -> Tensor:
    return own_elements(param, param.local.detach())


def _exact(param: ShardedParam) -> Tensor:
    exact = formats.read_master(local_state(param), _parameter(param))
    assert exact is not None
    return exact
