# SPDX-License-Identifier: Apache-2.0
"""All patches of torch's functions, and why each is needed.

A patch is applied once per process, calls the original with the same arguments, and is left out if torch no longer has
the function. It must not change a result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor


def check_before_clipping(check: Callable[[str, list[Tensor]], None]) -> None:
    """Make the functions of ``torch.nn.utils`` that clip or measure gradients call ``check(name, tensors)`` first.

    ``tensors`` is the function's first argument, as a list. A function that another of them calls is not checked again.
    torch has no hook for this. Scripts may have imported a function by name already, so the patch replaces what its
    ``torch.no_grad`` wrapper calls.
    """
    is_inside = False

    def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def check_and_call(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside
            if is_inside:
                return function(tensors, *args, **kwargs)
            if isinstance(tensors, GeneratorType):
                listed = list(tensors)
                tensors = (one for one in listed)  # torch warns about empty generators
            else:
                listed = tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            check(name, listed)
            is_inside = True
            try:
                return function(tensors, *args, **kwargs)
            finally:
                is_inside = False

        return check_and_call

    for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"):
        wrapper = getattr(torch.nn.utils, name, None)
        original = getattr(wrapper, "__wrapped__", None)
        for cell in getattr(wrapper, "__closure__", None) or ():
            if original is not None and cell.cell_contents is original:
                cell.cell_contents = checked(name, original)
