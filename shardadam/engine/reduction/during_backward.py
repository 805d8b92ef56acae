# SPDX-License-Identifier: Apache-2.0
"""What reducers share that take gradients out of ``p.grad`` while backward runs (``gradient_sync="backward"``)."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from shardadam.engine.reduction.base import Reducer
from shardadam.engine.reduction.hooks import GradientHooks


class DuringBackward(Reducer):
    """Has hooks on all parameters, once a subclass has registered them in ``add``."""

    takes_gradients = True

    def __init__(self) -> None:
        super().__init__()
        self._hooks = GradientHooks(self)
        self._lock = threading.RLock()  # hooks of parameters on two devices run in two threads
        self._is_synchronizing = True  # False in no_sync
        self._has_local = False  # p.grad has gradients from no_sync that have not been taken

    @abstractmethod
    def on_gradient(self, index: int) -> None:
        """Take the gradient of the param with that index, which is complete for this backward."""

    def remove_hooks(self) -> None:
        super().remove_hooks()
        self._hooks.remove()

    def why_not_in_grad(self, parameter: Tensor) -> str | None:
        if parameter.grad is None and any(self.used):
            return "the gradients have been reduced and freed during backward, so that it finds none."
        return None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.close_open_round()
        before, self._is_synchronizing = self._is_synchronizing, False
        try:
            yield
        finally:
            self._is_synchronizing = before
            self._has_local = True

    def reset(self) -> None:
        super().reset()
        self._has_local = False
