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
        self._lock = threading.Lock()
        self._process = os.getpid()

    def add(self, source: Tensor, target: Tensor) -> None:
        """Add a copy of ``source`` to ``target``, which have the same dtype and shape: 1-D."""
        pieces = cut(0, source.numel(), ITEM_BYTES // source.element_size())
        self._pieces += [(source[start:stop], target[start:stop]) for start, stop in pieces]

    def finish(self) -> None:
        """Return when all copies are made, or cannot be. Local; raises nothing of theirs."""
        while self._pieces and os.getpid() == self._process:  # a child needs no copies, and has not the other threads
            with self._lock, torch.no_grad():
                if self._pieces:
                    self._copy_last()

    def _copy_last(self) -> None:
        source, target = self._pieces[-1]
        try:
            target.copy_(source)
        except Exception as error:
            self.error = error
            self._pieces.clear()
        else:
            self._pieces.pop()  # now, so that an interrupted copy is made again
