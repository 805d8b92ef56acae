# SPDX-License-Identifier: Apache-2.0
"""What would train wrong, or not at all, without a word: said once, as a warning. Never stops training."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from shardadam.buckets import Member
from shardadam.reduction import Reducer
from shardadam.reduction.base import reducer_of

_PATIENCE_STEPS = 10


class Watch:
    """Of one optimizer's steps. Local: what it says may differ between ranks."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._skipped = 0  # in a row
        self._after_step: tuple[Tensor, Tensor, int] | None = None  # a parameter, its gradient, and that's version

    def before_update(
        self, members: Sequence[Member], used: Tensor, used_here: Sequence[bool], found_inf: Tensor
    ) -> None:
        """``used`` and ``found_inf``: over all ranks, as the survey has them; on the CPU."""
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
        if self._after_step is not None:
            parameter, gradient, version = self._after_step
            # Zeroing in place would count as one more change, and a new gradient is another tensor.
            if parameter.grad is gradient and gradient._version == version + 1:
                self._say(
                    "step(): the gradients of the step before are still in p.grad, and backward has added to them. "
                    "Call optimizer.zero_grad() after every step."
                )
        self._skipped = self._skipped + 1 if bool(found_inf) else 0
        if self._skipped == _PATIENCE_STEPS:
            self._say(
                f"step(): the last {_PATIENCE_STEPS} steps were not taken, as a gradient was infinite or NaN on some "
                "rank in each (optimizer.skipped_steps). The model does not train; look at the loss and the inputs."
            )

    def after_update(self, members: Sequence[Member]) -> None:
        self._after_step = None
        for member in members:
            gradient = member.parameter.grad
            if gradient is not None:
                self._after_step = (member.parameter, gradient, gradient._version)
                return

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, stacklevel=_stacklevel())


def _stacklevel() -> int:
    """So that the warning points to the first line that is neither this package's nor torch's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("shardadam", "torch"):
        level, frame = level + 1, frame.f_back
    return level


# torch.nn.utils.clip_grad_norm_


def watch_clipping() -> None:
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
