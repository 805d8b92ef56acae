# SPDX-License-Identifier: Apache-2.0
"""Loss scaling for float16: torch's GradScaler, told by the gradient shards of all ranks instead of ``p.grad``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardadam.optimizer import ShardedAdam

_SMALLEST_SCALE = 2.0**-24


class GradScaler(torch.amp.GradScaler):
    """A drop-in for torch.amp.GradScaler: the same arguments, methods and state.

    For an optimizer of this package, ``unscale_`` and ``step`` are collective: all ranks find the same gradients finite
    or not, take or skip the same steps, and keep equal scales. The scale is taken out of the gradients where the
    update reads them, in float32, so float16 parameters are supported. ``step`` never waits for the device: the update
    itself decides whether it writes. Other optimizers are treated as torch does.

    With ``gradient_sync`` "step" and "external", ``unscale_`` also divides ``p.grad`` in place, as in torch, and
    refuses float16 gradients for it; ``step`` without it serves them.
    """

    _updates = 0

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if not isinstance(optimizer, ShardedAdam):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        found = optimizer._unscale(inv_scale, in_place=not allow_fp16).to(found_inf.device)
        return {found.device: found}

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """``optimizer.step()`` with the gradients unscaled; skipped, on all ranks, if one of them is not finite."""
        if not self._enabled or not isinstance(optimizer, ShardedAdam):
            return super().step(optimizer, *args, **kwargs)
        if any(value is not None for value in (*args, *kwargs.values())):
            raise RuntimeError(
                "GradScaler.step: found a closure, which loss scaling does not support. Run backward before, and call "
                "step(optimizer) alone."
            )
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        stage = torch.amp.grad_scaler.OptState
        if state["stage"] is stage.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if state["stage"] is stage.READY:
            assert self._scale is not None
            inverse = self._scale.double().reciprocal().float()  # as in unscale_
            found_inf = torch.zeros((), device=self._scale.device)
            state["found_inf_per_device"] = self._unscale_grads_(optimizer, inverse, found_inf, True)
        optimizer.step()
        state["stage"] = stage.STEPPED
        return None

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Adjusts the scale, as in torch.

        Raises:
            RuntimeError: on every rank, when the scale has collapsed: gradients are infinite or NaN whatever it is, and
                no step is taken any more. On GPUs it is looked at in one update of 128, as that waits for the device.
        """
        super().update(new_scale)
        if not self._enabled or self._scale is None:
            return
        self._updates += 1
        if self._scale.device.type == "cpu" or self._updates % 128 == 0:
            scale = float(self._scale)
            if not scale >= _SMALLEST_SCALE:
                raise RuntimeError(
                    f"The loss scale has fallen to {scale:g}: gradients are infinite or NaN in every step, whatever "
                    "the scale, and no step is taken. Look for a NaN in the loss and the inputs, lower the learning "
                    "rate, and go on from the last checkpoint."
                )
