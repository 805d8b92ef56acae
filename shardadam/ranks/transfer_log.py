# SPDX-License-Identifier: Apache-2.0
"""The last transfers that this rank has started in each process group, to tell a rank that has started different ones.

All ranks of a group must start the same transfers in the same order. Gloo and NCCL do not check it: such ranks wait for
each other until the timeout of the group.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping, Sequence

import torch.distributed as dist

_KEPT = 32

Started = Mapping[str, Sequence[tuple[int, str, int]]]
"""By the name of the group: number of the transfer, operation, bytes."""


class TransferLog:
    """The last transfers of a group. The main thread adds to it; other threads may read it."""

    def __init__(self) -> None:
        self._count = 0
        self._last: deque[tuple[int, str, int]] = deque(maxlen=_KEPT)

    def add(self, operation: str, nbytes: int) -> None:
        """Note that this rank starts a transfer, such as an ``all-gather``, of ``nbytes``."""
        self._count += 1
        self._last.append((self._count, operation, nbytes))

    def last(self) -> list[tuple[int, str, int]]:
        return list(self._last)


_logs: weakref.WeakKeyDictionary[dist.ProcessGroup, TransferLog] = weakref.WeakKeyDictionary()


def log_of(group: dist.ProcessGroup) -> TransferLog:
    """Return the log of a group, which goes on if another optimizer uses the group. Local."""
    return _logs.setdefault(group, TransferLog())


def started() -> Started:
    """Return the last transfers that this rank has started. Local, from any thread.

    Iterating over ``_logs`` would raise while the main thread builds an optimizer; ``keyrefs`` copies its keys at once.
    """
    groups = [group for ref in _logs.keyrefs() if (group := ref()) is not None]
    return {group.group_name: log_of(group).last() for group in groups}


def difference(mine: Started, theirs: Started) -> tuple[str, str] | None:
    """Return the first transfer that two ranks have started differently, as each describes it; None if none is known.

    If one has started more than the other, the other may follow.
    """
    for name, own in mine.items():
        others = {number: (operation, nbytes) for number, operation, nbytes in theirs.get(name, ())}
        for number, operation, nbytes in own:
            other = others.get(number, (operation, nbytes))
            if tuple(other) != (operation, nbytes):
                return _described(operation, nbytes), _described(*other)
    return None


def with_article(operation: str) -> str:
    """Return an operation as it stands in a sentence: ``an all-reduce``, ``a reduce-scatter``."""
    return f"{'an' if operation[0] == 'a' else 'a'} {operation}"


def _described(operation: str, nbytes: int) -> str:
    return f"{with_article(operation)} of {nbytes:,} bytes"
