# SPDX-License-Identifier: Apache-2.0
"""All patches of torch's functions, and why each is needed.

A patch is applied once per process, calls the original with the same arguments, and is left out if torch no longer has
the function. It must not change a result.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache, wraps
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn


def check_before_clipping(check: Callable[[str, list[Tensor]], None]) -> None:
    """Make the functions of ``torch.nn.utils`` that clip or measure gradients call ``check(name, tensors)`` first.

    ``tensors`` is the function's first argument, as a list. A function that another of them calls is not checked again.
    torch has no hook for this. Scripts may have imported a function by name already, so the patch replaces what its
    ``torch.no_grad`` wrapper calls.
    """
    is_inside = False

    def checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        keyword = next(iter(inspect.signature(function).parameters))

        @wraps(function)
        def check_and_call(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside
            if is_inside or not (args or keyword in kwargs):
                return function(*args, **kwargs)
            tensors, *rest = args or (kwargs.pop(keyword),)
            if isinstance(tensors, GeneratorType):
                listed = list(tensors)
                tensors = (one for one in listed)  # torch warns about empty generators
            else:
                listed = tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            check(name, listed)
            is_inside = True
            try:
                return function(tensors, *rest, **kwargs)
            finally:
                is_inside = False

        return check_and_call

    for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"):
        wrapper = getattr(torch.nn.utils, name, None)
        original = getattr(wrapper, "__wrapped__", None)
        for cell in getattr(wrapper, "__closure__", None) or ():
            if original is not None and cell.cell_contents is original:
                cell.cell_contents = checked(name, original)


@cache
def check_before_zero_grad(check: Callable[[nn.Module], None]) -> None:
    """Make ``nn.Module.zero_grad`` call ``check(module)`` first, except in compiled code. torch has no hook."""
    module: Any = nn.Module
    zero_grad = module.zero_grad

    @wraps(zero_grad)
    def check_and_call(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not torch.compiler.is_compiling():
            check(self)
        zero_grad(self, *args, **kwargs)

    module.zero_grad = check_and_call


@cache
def call_before_parameters_are_read(call: Callable[[], None]) -> None:
    """Make ``nn.Module.parameters()``, ``named_parameters()`` and ``to()``, and copying and pickling a parameter, run
    ``call()``.

    torch has no hook for this. Weights are averaged, copied, converted and saved through these methods
    (``AveragedModel``, ``copy.deepcopy``, ``model.cpu()``, ``torch.save(model)``). ``nn.Module.zero_grad`` reads no
    parameter; compiled code is left alone.
    """
    module: Any = nn.Module
    parameter: Any = nn.Parameter
    named_parameters, apply, deepcopy, reduce = (
        nn.Module.named_parameters,
        module._apply,
        parameter.__deepcopy__,
        parameter.__reduce_ex__,
    )
    zero_grad = inspect.unwrap(nn.Module.zero_grad).__code__

    @wraps(named_parameters)
    def call_and_name(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        if not torch.compiler.is_compiling():
            caller = sys._getframe(1).f_back
            if caller is None or caller.f_code is not zero_grad:
                call()
        return named_parameters(self, *args, **kwargs)

    @wraps(apply)
    def call_and_apply(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call()
        return apply(self, *args, **kwargs)

    @wraps(deepcopy)
    def call_and_copy(self: Any, memo: dict[int, Any]) -> Any:
        call()
        return deepcopy(self, memo)

    @wraps(reduce)
    def call_and_reduce(self: Any, protocol: int) -> Any:
        call()
        return reduce(self, protocol)

    module.named_parameters = call_and_name
    module._apply = call_and_apply
    parameter.__deepcopy__ = call_and_copy
    parameter.__reduce_ex__ = call_and_reduce


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
