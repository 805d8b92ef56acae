# SPDX-License-Identifier: Apache-2.0
"""The part of torch.optim's interface that is about the optimizer's state."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from shardadam.checks import arguments
from shardadam.engine.collective_method import collective
from shardadam.engine.step import StepEngine
from shardadam.state import whole
from shardadam.state.loading import load_local
from shardadam.state.state_dict import local_state_dict, shallow_copy, whole_state_dict
from shardadam.state.torch_view import OptimizerState


class StatefulOptimizer(Optimizer):
    """``state``, ``state_dict``, ``load_state_dict`` and their kin, over the engine of an optimizer."""

    _is_built = False
    _engine: StepEngine
    _state: OptimizerState
    _consolidated: dict[str, Any] | None = None

    @property
    def state(self) -> OptimizerState:
        """This rank's shards of the state, by parameter, as views. Writes change them; make the same on all ranks."""
        return self._state

    @state.setter
    def state(self, entries: Mapping[Tensor, Any]) -> None:
        if self._is_built:
            self._state.replace(entries)
        else:  # torch.optim.Optimizer.__init__
            self._state = OptimizerState(weakref.WeakMethod(self._add_unfrozen_params))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As in torch; ``state["state"]`` is assigned to ``optimizer.state``."""
        super().__setstate__({name: value for name, value in state.items() if name != "state"})
        if "state" in state:
            self.state = state["state"]

    @collective
    def full_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the parameter's whole state: step, exp_avg, exp_avg_sq and, where there is one, master. Collective.

        With ``ema_decay`` also average and n_averaged.

        Returns:
            New tensors of the parameter's shape, float32 (float64 for float64 parameters). ``step`` and ``n_averaged``,
            the number of averages that were made (int64), are 0-dim.

        Raises:
            ValueError: ``parameter`` is frozen since the build, or not a parameter of this optimizer.
            RuntimeError: parameters have the values of their averages (``averaged_parameters``).
        """
        self._engine.averages.refuse("full_state()")
        self._add_unfrozen_params()
        self._engine.gatherer.synchronize()
        param = self._engine.parameters.find(parameter)
        self._engine.refresh_masters([param])
        return whole.of_one(param)

    @collective
    def state_dict(self) -> dict[str, Any]:
        """Return this rank's shard of the state, in torch's form.

        On several data-parallel ranks, tensors are ``FlatShard``: they have the parameter's shape, hold this rank's
        elements only, and share the optimizer's memory and format. torch.distributed.checkpoint saves them, and loads
        them on any number of ranks; pickling one raises TypeError. On one rank they are ordinary tensors, and DTensors
        for DTensor parameters. After
        ``consolidate_state_dict(to)`` and until the next step, rank ``to`` gets the whole state instead.

        Every trainable parameter has an entry, also before the first step, when its step and moments are zeros: torch
        adds entries in the first step. Local; collective if parameters were unfrozen since the last step.
        """
        self._engine.averages.refuse("state_dict()")
        if self._consolidated is None:
            self._add_unfrozen_params()
        self._engine.gatherer.wait_all()
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        if self._consolidated is not None:
            state_dict = shallow_copy(self._consolidated)
        else:
            self._engine.refresh_masters()
            state_dict = local_state_dict(self._engine.parameters, self.param_groups)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    @collective
    def full_state_dict(self, *, all_ranks: bool = False) -> dict[str, Any]:
        """Return the whole state on rank 0, as torch.optim.Adam/AdamW has it, and an empty dict elsewhere. Collective.

        With ``all_ranks=True``, on every rank. Tensors are new, on the CPU, of the parameters' shapes, and float32
        (float64 for float64 parameters) whatever format they are stored in. Parameters with a master also have
        ``master``, and with ``ema_decay`` all have ``average`` and ``n_averaged``: torch's optimizers keep and ignore
        these.
        """
        return self._whole_state_dict("full_state_dict()", to=None if all_ranks else 0) or {}

    @collective
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the whole state on rank ``to`` of the process group, as ZeroRedundancyOptimizer does. Collective.

        ``state_dict()`` returns it there until the next step.
        """
        self._consolidated = self._whole_state_dict("consolidate_state_dict()", to=to)

    def _whole_state_dict(self, call: str, *, to: int | None) -> dict[str, Any] | None:
        self._engine.averages.refuse(call)
        self._add_unfrozen_params()
        self._engine.gatherer.synchronize()
        self._engine.refresh_masters()
        return whole_state_dict(self._engine.parameters, self.param_groups, self._engine.transport, to=to)

    @collective
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's own ``state_dict()``, or its shard of a whole one of torch.optim.Adam/AdamW.

        Also loads the hyperparameters of the param groups. As in torch, except that one that is a tensor here stays the
        same tensor and gets the value: captured CUDA graphs read it. Load the model before or after it: masters in
        ``state_dict`` are exact either way; without any, the parameters at the next step are the masters. Without
        averages in it, as from torch's AdamW, the weights are the averages until the next step. Local, but all ranks
        must call it; collective if parameters were unfrozen since the last step.

        Raises:
            ValueError: ``state_dict`` does not fit this optimizer, or has state of a parameter that is frozen here.
                Nothing has been changed.
            RuntimeError: parameters have the values of their averages (``averaged_parameters``).
        """
        self._engine.averages.refuse("load_state_dict()")
        self._add_unfrozen_params()
        self._engine.gatherer.wait_all()
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        for group in state_dict["param_groups"]:
            arguments.check_group({key: value for key, value in group.items() if key != "params"}, self.defaults)
        load_local(self.param_groups, self._engine.parameters, state_dict)
        self._state_was_loaded(parameters=False)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _state_was_loaded(self, *, parameters: bool) -> None:
        self._consolidated = None
        self._engine.state_was_loaded(parameters=parameters)

    def _add_unfrozen_params(self, *, between_steps: bool = True) -> None:
        """Add the parameters that were frozen before and are trainable now. Collective if there are any.

        Args:
            between_steps: raise RuntimeError if backward has begun an update that ``step`` has not completed.
        """
        if between_steps:
            self._engine.check_between_steps()
        self._state.take_replaced()
        self._state.bind(self._engine.add_unfrozen_params())
