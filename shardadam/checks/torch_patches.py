# SPDX-License-Identifier: Apache-2.0
"""Every replacement of a private function of torch, and why there is no other way.

A replacement is installed once a process, calls what it replaces with the same arguments, and is left out where torch
no longer has the function. It must not change a result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def check_before_clipping(check: Callable[[list[Tensor]], None]) -> None:
    """Makes ``torch.nn.utils.clip_grad_norm_`` call ``check(parameters)`` before it scales their gradients.

    torch has no hook there. Its public function is imported by name before this package is, so the private one that
    it calls, ``_clip_grads_with_norm_``, is replaced.
    """
    module: Any = torch.nn.utils.clip_grad
    scale: Callable[..., Any] | None = getattr(module, "_clip_grads_with_norm_", None)
    if scale is None or hasattr(scale, "_checked_by_shardadam"):
        return

    @wraps(scale)
    def check_and_scale(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        check(parameters)
        return scale(parameters, *args, **kwargs)

    check_and_scale._checked_by_shardadam = True  # type: ignore[attr-defined]
    module._clip_grads_with_norm_ = check_and_scale
