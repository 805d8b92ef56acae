# SPDX-License-Identifier: Apache-2.0
"""Warnings about mistakes that raise no error but make training wrong or useless, each given once; and two errors.

Runs on the host between steps, never during backward. Must not talk to other ranks, wait for the device, or stop
training.
"""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from shardadam.checks.torch_patches import check_before_clipping, check_before_swapping, check_before_zero_grad
from shardadam.engine.outside import is_averaged
from shardadam.engine.reduction import Reducer
from shardadam.engine.reduction.base import parameters_of_gradients, reducer_of
from shardadam.engine.storage import ShardedParam

_MAX_SKIPPED_STEPS = 10
_MAX_IDLE_STEPS = 3


class MisuseWarnings:
    """Checks the steps of one optimizer. Local: the first rank warns of what all ranks find, each rank of its own.

    Attributes:
        has_no_batches: this rank has joined (torch.distributed.algorithms.Join), and takes steps without gradients.
        outside: parameters of the user's model that the optimizer does not have, by name.

    Args:
        params: of the optimizer; may grow.
        reducer: knows whether this is the first rank.
    """

    def __init__(self, params: Sequence[ShardedParam], reducer: Reducer) -> None:
        self._params = params
        self._reducer = reducer
        self._given: set[str] = set()
        self._to_give: list[str] = []
        self._skipped_in_a_row = 0
        self._idle_steps = torch.zeros(0, dtype=torch.int64, device="cpu")  # in a row without gradient, by param index
        self._steps = 0
        self._next_search = 0  # at which step to search for modules
        self.has_no_batches = False
        self.outside: dict[str, Tensor] = {}
        check_before_swapping(_check_swapped)

    def check_stats(self, used: Tensor, used_here: Sequence[bool], found_inf: bool) -> None:
        """Look for a step without gradients, for parameters that were replaced, and for many skipped steps in a row.

        Args:
            used: for each parameter, whether any rank has had a gradient since the last step; 1-D, bool, on the CPU.
            used_here: the same for this rank alone.
            found_inf: whether a gradient was infinite or NaN on any rank.
        """
        if not bool(used.all()) or self._idle_steps.numel() > 0:
            self._check_replaced(used)
        if used.numel() == 0:
            return  # a part of the model without trainable parameters
        if not bool(used.any()):
            self._all_found(
                "step(): no parameter has had a gradient on any rank since the last step, so nothing is updated. "
                "Expected a backward through the optimizer's parameters before each step. Check that the model was not "
                "copied, and its parameters were not replaced, after the optimizer was built."
            )
        elif not any(used_here) and not self.has_no_batches:
            self._found(
                "step(): this rank has had no gradient since the last step, and other ranks have, so it counts as "
                "zeros in the average. Expected a backward on every rank before each step. If its batch was not "
                "empty, check that this rank does not call step() more often than others, or skip a backward."
            )
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if found_inf else 0
        if self._skipped_in_a_row == _MAX_SKIPPED_STEPS:
            self._all_found(
                f"step(): the last {_MAX_SKIPPED_STEPS} steps were not taken, because in each of them a gradient was "
                "infinite or NaN on some rank (optimizer.skipped_steps counts them). Expected finite gradients. Check "
                "the loss and the inputs for NaN and infinity."
            )

    def check_norms(self, has_gradients: bool) -> None:
        """Warn about a ``gradient_norms()`` that finds no gradients of any rank."""
        if not has_gradients:
            self._all_found(
                "gradient_norms(): no parameter has a gradient on any rank, so there are no norms. Expected a call "
                "between backward and step(), which uses the gradients up."
            )
            self.give()

    def _check_replaced(self, used: Tensor) -> None:
        """Warn about parameters that have had no gradient for some steps, and that the model does not hold any more.

        The model is what holds others of this optimizer that have gradients, and parameters that nobody trains. A
        layer that was replaced may live on in a variable; then the model must have one of the same name, or shape.
        Searches all live modules; if it finds nothing, the next search is after twice as many steps.
        """
        before = self._idle_steps.new_zeros(used.numel())
        before[: self._idle_steps.numel()] = self._idle_steps
        self._idle_steps = (before + 1) * used.logical_not()
        self._steps += 1
        idle = (self._idle_steps >= _MAX_IDLE_STEPS).nonzero().flatten().tolist()
        if not idle or self._steps < self._next_search:
            return
        self._next_search = 2 * self._steps
        modules = _live_modules()
        everywhere = {id(p) for module in modules for p in module._parameters.values()}
        working = {id(self._params[i].parameter) for i in (self._idle_steps == 0).nonzero().flatten().tolist()}
        models = [model for model in _models(modules) if any(id(p) in working for p in model.values())]
        held = {id(p) for model in models for p in model.values()}
        new = {
            name: p
            for model in models
            for name, p in model.items()
            if p.requires_grad and reducer_of(p) is None and not is_averaged(p)
        }
        left = [
            param.name
            for param in (self._params[i] for i in idle)
            if id(param.parameter) not in held
            and (id(param.parameter) not in everywhere or any(_may_replace(param, *one) for one in new.items()))
        ]
        if not left or not new:
            return
        self._found(
            f"Parameters that the model does not hold, and without a gradient in the last {_MAX_IDLE_STEPS} steps: "
            f"{_some(left)}. They were probably replaced in the model after the optimizer was built. The model has "
            f"{_some(sorted(new))} instead, which this optimizer does not have. Replace layers and resize embeddings "
            "before building the optimizer, or add the new parameters with add_param_group."
        )

    def _all_found(self, text: str) -> None:
        if self._reducer.is_first_rank:
            self._found(text)

    def _found(self, text: str) -> None:
        if text not in self._given:
            self._given.add(text)
            self._to_give.append(text)

    def give(self) -> None:
        """Give the warnings that were found. After a step: where warnings are errors, one rank alone may raise here."""
        warn_about_outside(self.outside)
        while self._to_give:
            warnings.warn(self._to_give.pop(0), stacklevel=_stacklevel())


def refuse_torchs_grad_scaler(attributes: dict[str, Any]) -> None:
    """Raise RuntimeError if a GradScaler of torch has set attributes of an optimizer, around the step; remove them."""
    if "grad_scale" in attributes:
        del attributes["grad_scale"], attributes["found_inf"]
        raise RuntimeError(
            "Found a torch.amp.GradScaler, expected a shardadam.GradScaler: torch.amp.GradScaler cannot see gradients "
            "that are not averaged yet, and ranks would skip different steps. Use shardadam.GradScaler; it takes the "
            "same arguments."
        )


_CLIP_NORM = "Call optimizer.clip_grad_norm_(max_norm), or build the optimizer with max_grad_norm."
_INSTEAD = {
    "clip_grad_norm_": _CLIP_NORM,
    "clip_grads_with_norm_": _CLIP_NORM,
    "clip_grad_value_": "Call optimizer.clip_grad_value_(clip_value).",
    "get_total_norm": (
        "optimizer.clip_grad_norm_(max_norm) returns the norm of the averaged gradients; with an infinite max_norm, it "
        "clips nothing."
    ),
}
_warned: set[str] = set()


def watch_torch(reducer: Reducer) -> None:
    """Warn, once per process, when torch is used in a way that goes wrong beside an optimizer with this reducer.

    A function of ``torch.nn.utils`` that clips gradients which this package averages would find ``p.grad`` None, or
    this rank's own gradient. ``model.zero_grad()`` does not discard gradients that were taken out of ``p.grad``.
    Another optimizer may step with gradients that nobody has averaged.
    """
    if not reducer.keeps_gradients:
        check_before_clipping(_check_clipped)
    if reducer.takes_gradients:
        check_before_zero_grad(_check_zero_grad)
    if reducer.averages:
        _watch_other_optimizers()


def _check_clipped(function: str, tensors: Sequence[Tensor]) -> None:
    """Warn if ``function`` does not see averaged gradients.

    All ranks must clip, so the first of them warns. One rank alone may measure.

    Args:
        tensors: its first argument: parameters; for ``get_total_norm``, gradients.
    """
    if function in _warned:
        return
    for parameter in parameters_of_gradients(tensors) if function == "get_total_norm" else tensors:
        reducer: Reducer | None = reducer_of(parameter)
        if reducer is not None and (why := reducer.why_not_in_grad(parameter)) is not None:
            _warned.add(function)
            if function != "get_total_norm" and parameter.grad is None:
                why += " It clips nothing: unless the optimizer clips, training goes on unclipped."
            if function == "get_total_norm" or reducer.is_first_rank:
                warnings.warn(f"torch.nn.utils.{function}: {why} {_INSTEAD[function]}", stacklevel=_stacklevel())
            return


def _check_zero_grad(module: nn.Module) -> None:
    """Warn if ``module.zero_grad()`` comes between a backward and its step: gradients that were taken stay."""
    if "zero_grad" in _warned:
        return
    parameters = [p for one in module.modules() for p in one._parameters.values() if p is not None]
    for reducer in {reducer_of(p): None for p in parameters}:
        if reducer is not None and reducer.has_taken(parameters):
            _warned.add("zero_grad")
            if reducer.updates_in_backward:
                why = (
                    'update="backward" has used the gradients already, so that nothing discards them. Call step() '
                    'after each backward, or build the optimizer with update="step" to drop batches.'
                )
            else:
                why = (
                    "the gradients have been taken out of p.grad during backward, so that it does not discard them, "
                    "and the next step uses them. Call optimizer.zero_grad(), on all ranks."
                )
            warnings.warn(f"{type(module).__name__}.zero_grad(): {why}", stacklevel=_stacklevel())
            return


@cache
def _watch_other_optimizers() -> None:
    register_optimizer_step_pre_hook(_check_other_optimizer)


_checked_optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_averaged_by_ddp: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The parameters that a search has found in DistributedDataParallel."""


def _check_other_optimizer(optimizer: Optimizer, *_: Any) -> None:
    """Look at the first step of an optimizer with gradients, if it has parameters of a model of which this package
    reduces others.
    """
    if "outside" in _warned or optimizer in _checked_optimizers:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(reducer_of(p) is not None for p in parameters):
        _checked_optimizers.add(optimizer)  # one of this package, or one over the same parameters
    elif any(p.grad is not None for p in parameters):
        _checked_optimizers.add(optimizer)
        warn_about_outside(_siblings(parameters), by=type(optimizer).__name__)


def warn_about_outside(named: Mapping[str, Tensor], *, by: str = "the code that trains them") -> None:
    """Warn, once per process, if any of the parameters has a gradient that nobody has averaged over ranks.

    Args:
        named: parameters of a model that this optimizer does not have, by name.
        by: who trains them, for the message.
    """
    left = {name: p for name, p in named.items() if p.requires_grad and p.grad is not None and not _has_averages(p)}
    if not left or "outside" in _warned:
        return
    for parameter in _in_ddp(_live_modules()):
        _averaged_by_ddp[parameter] = True
    names = [name for name, p in left.items() if p not in _averaged_by_ddp]
    if not names:
        return
    _warned.add("outside")
    warnings.warn(
        f"{_some(names)}: parameters of the model that this optimizer does not have, and as far as it knows, nothing "
        f"averages their gradients over ranks. So {by} writes different values on each rank. Call "
        "optimizer.average_gradients(parameters) with them after each backward, on all ranks; or freeze them "
        "(requires_grad=False) if nothing trains them. If your own code averages them, nothing is wrong.",
        stacklevel=_stacklevel(),
    )


def _has_averages(parameter: Tensor) -> bool:
    """Return whether somebody averages the gradients of ``parameter``: this package, the user's call, DDP or FSDP."""
    return (
        reducer_of(parameter) is not None
        or is_averaged(parameter)
        or parameter in _averaged_by_ddp
        or is_traceable_wrapper_subclass(parameter)
        or hasattr(parameter, "_is_flat_param")
    )


def _siblings(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return those of ``parameters`` that are in a model of which this package reduces other parameters, by name.

    Searches all live modules, so it is slow: about 0.1 s.
    """
    wanted = {id(p) for p in parameters}
    found: dict[str, Tensor] = {}
    for named in _models(_live_modules()):
        reducers = {reducer_of(p) for p in named.values()}
        if any(reducer is not None and reducer.averages for reducer in reducers):
            found |= {name: p for name, p in named.items() if id(p) in wanted}
    return found


def _may_replace(param: ShardedParam, name: str, parameter: Tensor) -> bool:
    """Return whether a parameter of the model may stand where ``param`` stood: by its name, else by its shape."""
    if param.name.startswith("param_groups["):
        return parameter.dim() == len(param.shape) and parameter.shape[1:] == param.shape[1:]
    return f".{name}".endswith(f".{param.name}")


def _models(modules: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    """Return the parameters, by name, of each module that is not part of another one."""
    children = {id(child) for module in modules for child in module._modules.values()}
    return [dict(nn.Module.named_parameters(module)) for module in modules if id(module) not in children]


def _in_ddp(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the parameters whose gradients DistributedDataParallel averages."""
    wrapped = [module for module in modules if isinstance(module, DistributedDataParallel)]
    return [
        parameter
        for one in wrapped
        for name, parameter in nn.Module.named_parameters(one.module)
        if name not in one.parameters_to_ignore
    ]


def _live_modules() -> list[nn.Module]:
    return [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]


def _some(names: Sequence[str]) -> str:
    """Return a text of the first three names, and the number of the others."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} others" if len(names) > 3 else "")


def _check_swapped(tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError for parameters that an optimizer of this package trains."""
    for tensor in tensors:
        reducer: Reducer | None = reducer_of(tensor)
        if reducer is not None and not reducer.is_superseded:
            raise RuntimeError(
                f"swap_tensors: found a parameter of shape {tuple(tensor.shape)} that a ShardedAdam or ShardedAdamW "
                "trains: its hooks and its place in the flat buffer would go to the other tensor. Swap tensors, or "
                "call module.to(...) under torch.__future__.set_swap_module_params_on_conversion, before building the "
                "optimizer. To change values only, write to the parameter: p.data.copy_(...)."
            )


def _stacklevel() -> int:
    """Return the level that makes a warning point at the caller's line, outside of this package and of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("shardadam", "torch"):
        level, frame = level + 1, frame.f_back
    return level
