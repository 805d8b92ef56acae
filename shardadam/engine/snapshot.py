# SPDX-License-Identifier: Apache-2.0
"""Copies of the optimizer's state that are made after a call has returned, and before anything writes that state.

Note: held state
    A thread makes the copies while forward and backward run. Whatever may write the state of an arena calls ``finish``
    of its ``Snapshot`` first, which makes the copies that are missing: ``Updater.update``, and ``FlatArena.state``,
    through which all others get it. They wait for the copy of one piece at most, never for the thread or for a disk.
"""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor

from shardadam.layout import ITEM_BYTES, cut


class Snapshot:
    """Copies to be made, piece by piece, by whatever threads call ``finish``.

    Attributes:
        error: why copies are missing; None if all are made, or can be.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._pieces: list[tuple[Tensor, Tensor]] = []
        self._lock = threading.RLock()  # a signal's handler may interrupt `finish`, and call it
        self._process = os.getpid()

    def add(self, source: Tensor, target: Tensor) -> None:
        """Add a copy of ``source`` to ``target``, which have the same dtype and shape: 1-D."""
        pieces = cut(0, source.numel(), ITEM_BYTES // source.element_size())
        self._pieces += [(source[start:stop], target[start:stop]) for start, stop in pieces]

    def finish(self) -> None:
        """Make the missing copies, or wait for the one that another thread is making. Local.

        A copy that fails sets ``error``; nothing is raised.
        """
        while self._pieces and os.getpid() == self._process:  # a child needs no copies, and has not the other threads
            if self._lock.acquire(timeout=0.1):  # not for ever: the thread that has it may be interrupted, and finish
                try:
                    self._copy_last()
                finally:
                    self._lock.release()

    @torch.no_grad()
    def _copy_last(self) -> None:
        for piece in self._pieces[-1:]:  # none if a signal's handler, or another thread, has made the copies
            source, target = piece
            try:
                target.copy_(source)
            except Exception as error:
                self.error = error.with_traceback(None)  # whose frames hold tensors
                self._pieces.clear()
                return
            if self._pieces and self._pieces[-1] is piece:
                self._pieces.pop()  # now, so that an interrupted copy is made again
