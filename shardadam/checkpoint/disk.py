# SPDX-License-Identifier: Apache-2.0
"""Calls to the file system with a time limit: a disk that hangs is an error on the rank that meets it. Local.

Note: calls that do not return
    A system call on a file system that hangs (a network mount whose server is gone) cannot be interrupted. So within
    ``disk_time_limit`` a daemon thread makes the calls, one after another, and the caller waits. If one does not
    return in time, the caller raises and abandons the thread. The call may still go on much later, so it must use no
    memory that anything else then uses.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any, TypeVar

_R = TypeVar("_R")
_log = logging.getLogger("shardadam")


class DiskThread:
    """Makes calls to the file system in a thread of its own.

    Args:
        limit_s: how long one call may take, in seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._abandoned = ""
        self._doing, self._since = "starting", time.monotonic()

    def call(self, what: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Return ``function(*arguments)``.

        Raises:
            TimeoutError: it has not returned within the limit, or an earlier one has not.
        """
        if self._abandoned:
            raise self._error()
        if self._thread is None:
            name = threading.current_thread().name
            name = name if name.startswith("shardadam.") else "shardadam.disk"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
        call = _Call(function, arguments)
        self._doing, self._since = what, time.monotonic()
        self._calls.put(call)
        try:
            self._wait(call)
        except BaseException:  # Ctrl-C
            if not call.ended.wait(0.5):
                self._abandoned = self._abandoned or f"{what} was interrupted"
            raise
        self._since = time.monotonic()
        if call.error is not None:
            raise call.error
        return call.result

    def _wait(self, call: _Call) -> None:
        log_after_s = self.limit_s / 4
        while True:
            seconds = time.monotonic() - self._since
            if call.ended.wait(max(0.0, min(log_after_s, self.limit_s, 3600.0) - seconds)):
                return
            seconds = time.monotonic() - self._since
            if seconds >= self.limit_s:
                self._abandoned = (
                    f"{self._doing} has not returned for {self.limit_s:g} s, so the disk hangs or is very slow. Check "
                    "it, or raise timeout_s"
                )
                raise self._error()
            if seconds >= log_after_s:
                _log.warning("%s has not returned for %.0f s.", self._doing, seconds)
                log_after_s *= 2

    def _error(self) -> TimeoutError:
        error = TimeoutError(self._abandoned)
        error.strerror = self._abandoned
        return error

    def status(self) -> str | None:
        """Return what is being done, or None if nothing has advanced for longer than the limit."""
        seconds = time.monotonic() - self._since
        return f"{self._doing}, for {seconds:.0f} s" if seconds <= self.limit_s else None

    def close(self) -> None:
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call.result = call.function(*call.arguments)
            except BaseException as error:
                call.error = error
            call.ended.set()
            del call


class _Call:
    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments
        self.ended = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


_thread: ContextVar[DiskThread | None] = ContextVar("shardadam.disk", default=None)


@contextmanager
def disk_time_limit(timeout_s: float) -> Iterator[DiskThread]:
    """Context manager: calls of ``on_disk`` in the block, in this thread, raise if one takes twice ``timeout_s``."""
    thread = DiskThread(2 * timeout_s)
    token = _thread.set(thread)
    try:
        yield thread
    finally:
        _thread.reset(token)
        thread.close()


def on_disk(what: str, function: Callable[..., _R], *arguments: Any) -> _R:
    """Return ``function(*arguments)``, which calls the file system; within the time limit if there is one.

    Args:
        what: the call, for messages, such as ``writing /a/b``.

    Raises:
        TimeoutError: it has not returned within the limit.
    """
    thread = _thread.get()
    return function(*arguments) if thread is None else thread.call(what, function, arguments)
