# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM while ranks are at something together: they act when it is done, and not in the middle of it."""

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


class interrupts_held:
    """The handlers that Python has for SIGINT and SIGTERM run when what is inside is over.

    A second signal is not held back: inside may wait for a rank that does not come. Handlers of the system (the default
    for SIGTERM, which ends the process) act at once as ever, and so do all of them outside the main thread.
    """

    __slots__ = ("_handlers", "_held")
    _is_holding = False

    def __enter__(self) -> None:
        self._handlers: dict[int, Callable[..., Any]] | None = None
        if interrupts_held._is_holding or threading.get_ident() != _MAIN:
            return
        self._held: list[tuple[int, FrameType | None]] = []
        self._handlers = {}
        interrupts_held._is_holding = True
        for number in _NUMBERS:
            handler = _signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                _signal.signal(number, self._hold)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handlers is None:
            return
        for number, handler in self._handlers.items():
            _signal.signal(number, handler)
        interrupts_held._is_holding = False
        if len(self._held) == 1:
            number, frame = self._held[0]
            self._handlers[number](number, frame)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._held.append((number, frame))
        if len(self._held) > 1:
            assert self._handlers is not None
            self._handlers[number](number, frame)
