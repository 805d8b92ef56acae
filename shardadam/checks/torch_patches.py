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


def check_before_swapping(check: Callable[[list[Tensor]], None]) -> None:
    """Make ``torch.utils.swap_tensors`` call ``check(tensors)`` before it swaps two tensors.

    ``module.to`` calls it, too, if ``torch.__future__.set_swap_module_params_on_conversion(True)`` is set. It refuses
    tensors that others refer to weakly, as this package does, with a message that does not say who refers to them.
    """
    module: Any = torch.utils
    swap: Callable[..., Any] | None = getattr(module, "swap_tensors", None)
    if swap is None or hasattr(swap, "_checked_by_shardadam"):
        return

    @wraps(swap)
    def check_and_swap(t1: Any, t2: Any) -> Any:
        check([t1, t2])
        return swap(t1, t2)

    check_and_swap._checked_by_shardadam = True  # type: ignore[attr-defined]
    module.swap_tensors = check_and_swap
