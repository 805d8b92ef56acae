# SPDX-License-Identifier: Apache-2.0
"""All patches of torch's private functions, and why each is needed.

A patch is applied once per process, calls the original with the same arguments, and is left out if torch no longer has
the function. It must not change a result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def check_before_clipping(check: Callable[[list[Tensor]], None]) -> None:
    """Make ``torch.nn.utils.clip_grad_norm_`` call ``check(parameters)`` before it scales their gradients.

    torch has no hook for this. Scripts may have imported the public function by name already, so the patch replaces
    ``_clip_grads_with_norm_``, which it calls.
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
