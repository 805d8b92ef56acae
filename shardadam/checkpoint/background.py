# SPDX-License-Identifier: Apache-2.0
"""Saves in the background: a copy of a part in memory of the CPU, and the thread that writes it.

At most one runs in a process: ``save`` and ``load`` begin with ``wait_for_background_save``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from shardadam.checkpoint.files import CheckpointError
from shardadam.checkpoint.part import Part

_running: tuple[threading.Thread, Future[Path]] | None = None
_copies: dict[tuple[str, int], Tensor] = {}
"""The copies of the last part, by key and start; reused, because a copy into mapped memory is twice as fast."""


@torch.no_grad()
def copied_to_cpu(part: Part) -> Part:
    """Returns ``part`` with all tensors copied. The next call overwrites the copies."""
    writes, used = [], set()
    for write in part.writes:
        flat, key = write.read(), (write.key, write.start)
        copy = _copies.get(key)
        if copy is None or (copy.dtype, copy.shape) != (flat.dtype, flat.shape):
            copy = _copies[key] = torch.empty_like(flat, device="cpu")
        copy.copy_(flat)
        used.add(key)
        writes.append(replace(write, read=copy.detach))
    for key in _copies.keys() - used:
        del _copies[key]
    return replace(part, writes=writes)


def start_background_save(work: Callable[[], Path]) -> Future[Path]:
    """Runs ``work`` in a thread; returns the future of its result."""
    global _running
    future: Future[Path] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="shardadam.save")
    _running = (thread, future)
    thread.start()
    return future


def wait_for_background_save() -> None:
    """Waits until no save runs in the background.

    Raises:
        CheckpointError: the last one failed. Raised once.
    """
    global _running
    if _running is not None:
        thread, future = _running
        thread.join()
        _running = None
        error = future.exception()
        if error is not None:
            raise CheckpointError(f"The previous save, in the background, failed: {error}") from error
