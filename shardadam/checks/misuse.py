# SPDX-License-Identifier: Apache-2.0
"""Warnings about mistakes that raise no error but make training wrong or useless, each given once; and one error.

Runs on the host between steps, never during backward. Must not talk to other ranks, wait for the device, or stop
training.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardadam.checks.torch_patches import check_before_clipping
from shardadam.engine.reduction import Reducer
from shardadam.engine.reduction.base import reducer_of

_MAX_SKIPPED_STEPS = 10


class MisuseWarnings:
    """Checks the steps of one optimizer. Local: ranks may get different warnings."""

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._skipped_in_a_row = 0

    def check_stats(self, used: Tensor, used_here: Sequence[bool], found_inf: bool) -> None:
        """Warn about a step without gradients, and about many skipped steps in a row.

        Args:
            used: for each parameter, whether any rank has had a gradient since the last step; 1-D, bool, on the CPU.
            used_here: the same for this rank alone.
            found_inf: whether a gradient was infinite or NaN on any rank.
        """
        if not bool(used.any()):
            self._warn_once(
                "step(): no parameter has had a gradient on any rank since the last step, so nothing is updated. "
                "Expected a backward through the optimizer's parameters before each step. Check that the model was not "
                "copied, and its parameters were not replaced, after the optimizer was built."
            )
        elif not any(used_here):
            self._warn_once(
                "step(): this rank has had no gradient since the last step, and other ranks have, so it counts as "
                "zeros in the average. Expected a backward on every rank before each step. If its batch was not "
                "empty, check that this rank does not call step() more often than others, or skip a backward."
            )
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if found_inf else 0
        if self._skipped_in_a_row == _MAX_SKIPPED_STEPS:
            self._warn_once(
                f"step(): the last {_MAX_SKIPPED_STEPS} steps were not taken, because in each of them a gradient was "
                "infinite or NaN on some rank (optimizer.skipped_steps counts them). Expected finite gradients. Check "
                "the loss and the inputs for NaN and infinity."
            )

    def _warn_once(self, text: str) -> None:
        if text not in self._given:
            self._given.add(text)
            warnings.warn(text, stacklevel=_stacklevel())


_has_warned_of_clipping = False


def warn_about_torch_clipping() -> None:
    """Warn, once per process, when ``torch.nn.utils.clip_grad_norm_`` clips gradients that this package averages.

    It would find ``p.grad`` None, or this rank's own gradient, and raise nothing.
    """
    check_before_clipping(_check_clipped)


def _check_clipped(parameters: Sequence[Tensor]) -> None:
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


def refuse_torchs_grad_scaler(attributes: dict[str, Any]) -> None:
    """Raise RuntimeError if a GradScaler of torch has set attributes of an optimizer, around the step; remove them."""
    if "grad_scale" in attributes:
        del attributes["grad_scale"], attributes["found_inf"]
        raise RuntimeError(
            "Found a torch.amp.GradScaler, expected a shardadam.GradScaler: torch.amp.GradScaler cannot see gradients "
            "that are not averaged yet, and ranks would skip different steps. Use shardadam.GradScaler; it takes the "
            "same arguments."
        )


def _stacklevel() -> int:
    """Return the level that makes a warning point at the caller's line, outside of this package and of torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("shardadam", "torch"):
        level, frame = level + 1, frame.f_back
    return level
