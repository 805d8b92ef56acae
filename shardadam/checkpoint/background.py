# SPDX-License-Identifier: Apache-2.0
"""Saves in the background: a copy of a part in memory of the CPU, and the thread that writes it.

At most one runs in a process: ``save`` and ``load`` begin with ``wait_for_background_save``. A failure is raised once:
by its future, or else by the next ``save`` or ``load``, or else told when the process ends.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing.util
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.files import CheckpointError
from shardadam.checkpoint.part import Part
from shardadam.engine.snapshot import Snapshot


class BackgroundSave(Future[Path]):
    """The future of a save. Knows whether its failure has been told: ``result`` or ``exception`` has handed it out."""

    def __init__(self) -> None:
        super().__init__()
        self.is_told = False

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        self.is_told |= error is not None
        return error

    def result(self, timeout: float | None = None) -> Path:
        self.exception(timeout)
        return super().result()


_running: tuple[threading.Thread, BackgroundSave] | None = None
"""The last save, until the next ``save`` or ``load`` has waited for it."""
_log = logging.getLogger("shardadam")

_copies: dict[tuple[str, int], Tensor] = {}
"""The copies of the last part, by key and start; reused, because a copy into mapped memory is twice as fast."""
_snapshot = Snapshot()
"""Makes some of them."""


@torch.inference_mode(False)
@torch.no_grad()
def copied_to_cpu(part: Part) -> tuple[Part, Snapshot]:
    """Returns ``part`` with all tensors replaced by copies on the CPU, and the ``Snapshot`` that still has to fill the
    copies of state that only the optimizer writes.

    The next call overwrites the copies.
    """
    global _snapshot
    _snapshot.finish()  # its thread has, if it could be started
    snapshot = Snapshot()
    writes, used, held = [], set(), set()
    for write in part.writes:
        flat, key = write.read(), (write.key, write.start)
        copy = _copies.get(key)
        if copy is None or (copy.dtype, copy.shape) != (flat.dtype, flat.shape):
            copy = _copies[key] = torch.empty_like(flat, device="cpu")
        if write.held_in is None:
            copy.copy_(flat)
        else:
            snapshot.add(flat, copy)
            held.add(write.held_in)
        used.add(key)
        writes.append(replace(write, read=copy.detach, held_in=None))
    for key in _copies.keys() - used:
        del _copies[key]
    _snapshot = snapshot  # before any update can make its copies
    for arena in held:
        arena.snapshot = snapshot
    return replace(part, writes=writes), snapshot


def start_background_save(work: Callable[[], Path]) -> BackgroundSave:
    """Runs ``work`` in a thread; returns the future of its result."""
    global _running
    _report_at_exit()
    save = BackgroundSave()
    save.set_running_or_notify_cancel()

    def run() -> None:
        try:
            save.set_result(work())
        except BaseException as error:
            _log.error("A save in the background failed: %s", error)
            save.set_exception(error)

    thread = threading.Thread(target=run, name="shardadam.save")
    thread.start()
    _running = (thread, save)
    return save


def wait_for_background_save() -> dict[str, Any]:
    """Waits until no save runs in the background.

    Returns:
        How the last one failed, for the other ranks and for ``raise_failure``.
    """
    if _running is None:
        return {}
    thread, save = _running
    _snapshot.finish()  # a signal's handler may have interrupted this thread in it
    thread.join()
    error = _error_of(save)
    return {} if error is None else {"failed": str(error), "is_told": save.is_told}


def raise_failure(answers: Sequence[Mapping[str, Any]]) -> None:
    """Raises the failure of the last save in the background, unless it has been told on some rank.

    The same on all ranks: otherwise those that know of the failure would wait for those that do not.

    Args:
        answers: what ``wait_for_background_save`` returned on all ranks, in rank order.

    Raises:
        CheckpointError: the save failed. Raised once.
    """
    global _running
    last, _running = _running, None
    failures = [answer["failed"] for answer in answers if "failed" in answer]
    if failures and not any(answer.get("is_told") for answer in answers):
        error = None if last is None else _error_of(last[1])
        raise CheckpointError(f"The previous save, in the background, failed: {error or failures[0]}") from error


def _error_of(save: BackgroundSave) -> BaseException | None:
    """Returns how a save that has ended failed, or None."""
    return Future.exception(save)


# At exit

EXIT_STATUS = 120
"""The status with which Python ends if it cannot flush a standard stream; see sys.exit."""


@cache
def _report_at_exit() -> None:
    """Makes this process say at its end that the last save has failed, and end with a status that is not 0."""
    if multiprocessing.parent_process() is None:
        atexit.register(_fail_at_exit)
    else:  # a process of multiprocessing runs no atexit handlers
        multiprocessing.util.Finalize(None, _fail_at_exit_of_child, exitpriority=-1000)


def _forget_in_child() -> None:
    """A child has not the thread that saves, and its parent tells the failure."""
    global _running
    _running = None
    _report_at_exit.cache_clear()  # multiprocessing clears what is registered


os.register_at_fork(after_in_child=_forget_in_child)


def _untold() -> str | None:
    """Returns what to say of the last save if nobody has been told its failure, or None. Once."""
    global _running
    if _running is None:
        return None
    (thread, save), _running = _running, None
    if thread.is_alive():  # the wait for it was interrupted
        return "This process ends while a save in the background goes on: its checkpoint is not complete."
    error = _error_of(save)
    if error is None or save.is_told:
        return None
    return f"The last save, in the background, failed, and nothing has asked for its result: {error}"


def _fail_at_exit() -> None:
    # Python has joined the thread before it runs atexit handlers.
    message = _untold()
    if message is not None and sys.stderr is not None:
        _log.error("%s Exit status: %d.", message, EXIT_STATUS)
        sys.stderr = _Unflushable(sys.stderr)


def _fail_at_exit_of_child() -> None:
    if _running is not None:
        _running[0].join()
    message = _untold()
    if message is not None:
        _log.error("%s Exit status: 1.", message)
        raise SystemExit(1)


class _Unflushable:
    """A stream that cannot be flushed at the very end, and otherwise is ``stream``.

    An atexit handler cannot choose the exit status, and ``os._exit`` would skip the handlers of others. If the last
    flush of a standard stream fails, the status is 120.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def flush(self) -> None:
        self._stream.flush()
        if sys.is_finalizing():
            raise OSError("the last save has failed")
