# SPDX-License-Identifier: Apache-2.0
"""What would train wrong, or not at all, without a word: said once, as a warning. Never stops training."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import TensorWeakRef

from shardadam.engine.reduction import Reducer
from shardadam.engine.reduction.base import reducer_of
from shardadam.engine.storage import ShardedParam

_PATIENCE_STEPS = 10


class MisuseWarnings:
    """Of one optimizer's steps. Local: what it says may differ between ranks."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._skipped = 0  # in a row
        self._watched: Tensor | None = None  # a parameter that had a gradient after the last step
        self._handle: Any = None  # of the hook on it
        self._left: tuple[TensorWeakRef, int] | None = (
            None  # that gradient and its version, as long as nobody clears it
        )
        self._was_added_to = False

    def check_stats(self, used: Tensor, used_here: Sequence[bool], found_inf: bool) -> None:
        """``used`` and ``found_inf``: over all ranks, as a survey has them; on the CPU."""
        if not bool(used.any()):
            self._say(
                "step(): no parameter has had a gradient on any rank since the last step, so nothing is updated. Is "
                "the model that ran backward the one whose parameters the optimizer was given, and not a copy of it, "
                "or one whose parameters were replaced since?"
            )
        elif not any(used_here):
            self._say(
                "step(): this rank has had no gradient since the last step, and other ranks have, so that it counts as "
                "zeros in their averages. If its batch was not empty: has it called step() once more than they, or "
                "left out a backward?"
            )
        self._skipped = self._skipped + 1 if found_inf else 0
        if self._skipped == _PATIENCE_STEPS:
            self._say(
                f"step(): the last {_PATIENCE_STEPS} steps were not taken, as a gradient was infinite or NaN on some "
                "rank in each (optimizer.skipped_steps). The model does not train; look at the loss and the inputs."
            )

    def before_update(self) -> None:
        if self._was_added_to:
            self._say(
                "step(): the gradients of the step before are still in p.grad, and backward has added to them. Call "
                "optimizer.zero_grad() after every step."
            )

    def after_update(self, params: Sequence[ShardedParam]) -> None:
        """Finds out, whenever backward reaches a parameter that has a gradient now, whether nobody has cleared it.
        Later, one more micro-batch would look the same.
        """
        self._was_added_to, self._left = False, None
        for param in params:
            parameter = param.parameter
            if parameter.grad is not None and parameter.requires_grad:
                if parameter is not self._watched:
                    self.remove_hook()
                    self._watched = parameter
                    hook = _accumulation_hook(weakref.ref(self))
                    self._handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._left = TensorWeakRef(parameter.grad), parameter.grad._version
                return

    def remove_hook(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def on_accumulation(self, parameter: Tensor) -> None:
        if self._left is None or parameter.grad is None:
            return
        left, version = self._left
        # Zeroing in place counts as a change, as adding does; and a new gradient is another tensor.
        self._was_added_to = left() is parameter.grad and parameter.grad._version == version + 1
        self._left = (left, version + 1) if self._was_added_to else None

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=_stacklevel())


def _accumulation_hook(watch: weakref.ref[MisuseWarnings]) -> Callable[[Tensor], None]:
    """A hook that does not keep the watch alive."""

    def on_accumulation(parameter: Tensor) -> None:
        live = watch()
        if live is not None:
            live.on_accumulation(parameter)

    return on_accumulation


def _stacklevel() -> int:
    """So that the warning points to the first line that is neither this package's nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("shardadam", "torch"):
        level, frame = level + 1, frame.f_back
    return level


# torch.nn.utils.clip_grad_norm_


def warn_of_torchs_clipping() -> None:
    """Warns once where torch clips the gradients that an optimizer of this package averages.

    Note: why by replacing a function of torch's
        It sees only that ``p.grad`` is None, or this rank's own gradient, and says nothing; nobody else learns that it
        was called. The function it hands the parameters on to is replaced by one that looks at them first, so that
        whoever has imported ``clip_grad_norm_`` before is warned, too.
    """
    module: Any = torch.nn.utils.clip_grad
    scale: Callable[..., Any] | None = getattr(module, "_clip_grads_with_norm_", None)
    if scale is None or hasattr(scale, "_shardadam_watches"):
        return

    @wraps(scale)
    def watched(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        _look_at_clipped(parameters)
        return scale(parameters, *args, **kwargs)

    watched._shardadam_watches = True  # type: ignore[attr-defined]
    module._clip_grads_with_norm_ = watched


_has_warned_of_clipping = False


def _look_at_clipped(parameters: Sequence[Tensor]) -> None:
    global _has_warned_of_clipping
    if _has_warned_of_clipping:
        return
    for parameter in parameters:
        reducer: Reducer | None = reducer_of(parameter)
        if reducer is not None and (why := reducer.why_not_to_clip(parameter)) is not None:
            _has_warned_of_clipping = True
            warnings.warn(
                f"torch.nn.utils.clip_grad_norm_: {why} Call optimizer.clip_grad_norm_(max_norm), or build the "
                "optimizer with max_grad_norm.",
                stacklevel=_stacklevel(),
            )
            return


# A plain optimizer over the same parameters


_ours: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_seen: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
"""Others, and how many of ours and of their own groups there have been when they were looked at."""
_told: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_built = 0


def watch_other_optimizers(ours: Optimizer) -> None:
    """Warns once of each torch optimizer that steps parameters whose gradients go to ``ours``."""
    global _built
    _built += 1
    _watch_steps()
    _ours.add(ours)


@cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_look_at_step)


def _look_at_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or optimizer in _ours or optimizer in _told:
        return
    state = _built + len(optimizer.param_groups)
    if _seen.get(optimizer) == state:
        return
    _seen[optimizer] = state
    held = [*vars(optimizer).values()]
    for value in vars(optimizer).values():
        held += value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else []
    if any(isinstance(one, Optimizer) and one in _ours for one in held):
        return  # it wraps one of ours, and steps that
    wrapped = {id(group) for one in _ours for group in one.param_groups}  # by something that it wraps
    groups = [group for group in optimizer.param_groups if id(group) not in wrapped]
    parameters = [parameter for group in groups for parameter in group["params"]]
    shared = sum(reducer_of(parameter) is not None for parameter in parameters)
    if shared:
        _told.add(optimizer)
        warnings.warn(
            f"{type(optimizer).__name__}.step(): {shared} of its {len(parameters)} parameters belong to an optimizer "
            "of shardadam, too, which has gradients and master weights of its own, so that one undoes what the other "
            "does. Give each parameter to one of the two, and drop the one that is not used any more.",
            stacklevel=_stacklevel(),
        )
