# SPDX-License-Identifier: Apache-2.0
"""Defers Ctrl-C and SIGTERM until a call that other ranks take part in is complete."""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_signal: Any = importlib.import_module("_signal")  # signal.py wraps it in enums; this is four times as fast

_NUMBERS = (int(signal.SIGINT), int(signal.SIGTERM))
_MAIN = threading.main_thread().ident


class defer_signals:
    """Context manager: Python's handlers of SIGINT and SIGTERM run when the block is complete.

    A second signal is not deferred, as the block may wait for a rank that has ended. If it interrupts the call, the
    optimizer refuses to step until a checkpoint is loaded. Does nothing outside the main thread, in a nested block, and
    for signals without a handler in Python (SIGTERM by default, which ends the process at once).
    """

    __slots__ = ("_deferred", "_handlers")
    _is_active = False

    def __enter__(self) -> None:
        self._handlers: dict[int, Callable[..., Any]] | None = None
        if defer_signals._is_active or threading.get_ident() != _MAIN:
            return
        self._deferred: list[tuple[int, FrameType | None]] = []
        self._handlers = {}
        defer_signals._is_active = True
        for number in _NUMBERS:
            handler = _signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                _signal.signal(number, self._defer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handlers is None:
            return
        for number, handler in self._handlers.items():
            _signal.signal(number, handler)
        defer_signals._is_active = False
        if len(self._deferred) == 1:
            number, frame = self._deferred[0]
            self._handlers[number](number, frame)

    def _defer(self, number: int, frame: FrameType | None) -> None:
        self._deferred.append((number, frame))
        if len(self._deferred) > 1:
            assert self._handlers is not None
            self._handlers[number](number, frame)
