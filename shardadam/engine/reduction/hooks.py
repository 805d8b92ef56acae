# SPDX-License-Identifier: Apache-2.0
"""The autograd hooks that call a reducer when a parameter's gradient is in ``p.grad``.

They run once for each gradient of each backward, in one thread for each device, and must be cheap.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor

from shardadam.engine.storage import ShardedParam


class HookedReducer(Protocol):
    """``on_gradient(index)``: the gradient of the param with that index is complete for this backward."""

    is_superseded: bool

    def on_gradient(self, index: int) -> None: ...


class GradientHooks:
    """The hooks of one reducer. They do not keep it alive, and do nothing once it is deleted or superseded."""

    def __init__(self, reducer: HookedReducer) -> None:
        self._reducer = weakref.ref(reducer)
        self._handles: list[Any] = []

    def register(self, params: Iterable[ShardedParam]) -> None:
        for param in params:
            hook = _hook(self._reducer, param.index)
            self._handles.append(param.parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _hook(reducer: weakref.ref[HookedReducer], index: int) -> Callable[[Tensor], None]:
    process = os.getpid()

    def on_gradient(_: Tensor) -> None:
        live = reducer()
        if live is None or live.is_superseded:
            return
        if os.getpid() != process:
            raise RuntimeError(
                "backward runs in a forked child of the process that built the optimizer, and would write into its "
                "parent's memory. Build the model and the optimizer in the child."
            )
        live.on_gradient(index)

    return on_gradient
