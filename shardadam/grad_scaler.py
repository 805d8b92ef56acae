# SPDX-License-Identifier: Apache-2.0
"""Loss scaling for float16: torch's GradScaler, with the gradient shards of all ranks in place of ``p.grad``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardadam.optimizer import ShardedAdam

_SMALLEST_SCALE = 2.0**-24


class GradScaler(torch.amp.GradScaler):
    """A drop-in for torch.amp.GradScaler: the same arguments, methods and state.

    With an optimizer of this package, ``unscale_`` and ``step`` are collective: all ranks must call them. All ranks
    take or skip the same steps and keep equal scales. The update removes the scale as it reads the gradients, in
    float32, so float16 parameters are supported. ``step`` never waits for the device: the update itself decides there
    whether it writes. Other optimizers behave as with torch's GradScaler.

    With ``gradient_sync`` "step" and "external", ``unscale_`` also divides ``p.grad`` in place, as in torch, and raises
    on float16 gradients, as in torch; ``step`` without ``unscale_`` supports them.
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
        """Call ``optimizer.step()`` with unscaled gradients; skip the update, on all ranks, if any is not finite.

        Collective: all ranks must call it.

        Raises:
            RuntimeError: a closure was passed, or ``update`` was not called since the last ``step``.
        """
        if not self._enabled or not isinstance(optimizer, ShardedAdam):
            return super().step(optimizer, *args, **kwargs)
        if any(value is not None for value in (*args, *kwargs.values())):
            raise RuntimeError(
                "GradScaler.step: found a closure, expected none: loss scaling does not support closures. Run backward "
                "first, then call step(optimizer)."
            )
        self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        stage = torch.amp.grad_scaler.OptState
        if state["stage"] is stage.STEPPED:
            raise RuntimeError("step() has already been called since the last update(). Call update() after each step.")
        if state["stage"] is stage.READY:
            assert self._scale is not None
            inverse = self._scale.double().reciprocal().float()  # as in unscale_
            found_inf = torch.zeros((), device=self._scale.device)
            state["found_inf_per_device"] = self._unscale_grads_(optimizer, inverse, found_inf, True)
        optimizer.step()
        state["stage"] = stage.STEPPED
        return None

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Adjust the scale, as in torch.

        Raises:
            RuntimeError: on every rank, when the scale has fallen below 2^-24, so that every step is skipped. On GPUs,
                only every 128th call checks this, as it waits for the device.
        """
        super().update(new_scale)
        if not self._enabled or self._scale is None:
            return
        self._updates += 1
        if self._scale.device.type == "cpu" or self._updates % 128 == 0:
            scale = float(self._scale)
            if not scale >= _SMALLEST_SCALE:
                raise RuntimeError(
                    f"The loss scale has fallen to {scale:g}, expected {_SMALLEST_SCALE:g} or more: gradients are "
                    "infinite or NaN at every scale, so every step is skipped. Look for a NaN in the loss and the "
                    "inputs, lower the learning rate, and restart from the last checkpoint."
                )
