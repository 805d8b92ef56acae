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
        self._unchecked: list[tuple[ShardedParam, Any]] = []  # whose hooks may not be the last of their parameter

    def register(self, params: Iterable[ShardedParam]) -> None:
        process = os.getpid()
        for param in params:
            hook = _hook(self._reducer, param.index, process)
            handle = param.parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._handles.append(handle)
            self._unchecked.append((param, handle))

    def put_last(self, running: int) -> bool:
        """Make these hooks run after others that the first forward has registered: some of transformers' all-reduce a
        gradient over tensor-parallel ranks. Cheap after the first call.

        Args:
            running: index of the param whose hooks are running, which cannot be changed now.

        Returns:
            Whether a hook that may change the gradient of that one is still to run.
        """
        if not self._unchecked:
            return False
        left = []
        for param, handle in self._unchecked:
            hooks: dict[int, Any] = param.parameter._post_accumulate_grad_hooks or {}
            if not _has_later(hooks, handle.id):
                continue
            if param.index == running:
                left.append((param, handle))
            else:
                hooks[handle.id] = hooks.pop(handle.id)
        self._unchecked = left
        return bool(left)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._unchecked.clear()


def _has_later(hooks: dict[int, Any], mine: int) -> bool:
    """Return whether hooks of others come after ``mine``."""
    if mine not in hooks:
        return False
    later = list(hooks)[list(hooks).index(mine) + 1 :]
    return any(not getattr(hooks[key], "__module__", "").startswith("shardadam.") for key in later)


def _hook(reducer: weakref.ref[HookedReducer], index: int, process: int) -> Callable[[Tensor], None]:
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
