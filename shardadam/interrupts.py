# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM while ranks are at something together: they act when it is done, and not in the middle of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_is_holding = False


@contextmanager
def interrupts_held() -> Iterator[None]:
    """The handlers that Python has for SIGINT and SIGTERM run when what is inside is over.

    A second signal is not held back: inside may wait for a rank that does not come. Handlers of the system (the default
    for SIGTERM, which ends the process) act at once as ever, and so do all of them outside the main thread.
    """
    global _is_holding
    if _is_holding or threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    held: list[tuple[int, FrameType | None]] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append((number, frame))
        if len(held) > 1:
            run(number, frame)

    def run(number: int, frame: FrameType | None) -> None:
        handler = handlers[signal.Signals(number)]
        assert callable(handler)
        handler(number, frame)

    mine = [number for number, handler in handlers.items() if callable(handler)]
    try:
        _is_holding = True
        for number in mine:
            signal.signal(number, hold)
        yield
    finally:
        for number in mine:
            signal.signal(number, handlers[number])
        _is_holding = False
        if len(held) == 1:
            run(*held[0])
