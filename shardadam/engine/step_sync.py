# SPDX-License-Identifier: Apache-2.0
"""When ranks look together at what all of them must know before they write, and what becomes of one that is about to do
something else than the others.

Note: hosts that run ahead
    On the CPU a survey is read at once, and raises before anything is written. The host of a GPU must not wait for the
    device: there the device itself does not take a step of which ranks disagree, as if a gradient were infinite, and
    the host reads a survey when it wants one in a later step, on all ranks at the same point. By then the device has
    long been there, or else the host is a whole step ahead of it and may wait.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from shardadam.checks.misuse import MisuseWarnings
from shardadam.engine.clipping import GlobalGradStats, HostCopy, all_reduce_stats
from shardadam.engine.profiling import record
from shardadam.engine.reduction import Reducer
from shardadam.ranks import agreement
from shardadam.ranks.agreement import Claim
from shardadam.transport import Transport

_MOST_UNREAD = 16
ALIKE = "Call the same methods in the same order on every rank, and change param groups (schedulers) alike."


class _UnreadStats(NamedTuple):
    """A survey that the host has not read.

    Args:
        step: how many steps had been taken when it was made.
        claims: what this rank was about to do; None: not compared.
        local_error: the reducer's.
    """

    step: int
    host_copy: HostCopy
    claims: list[Claim] | None
    local_error: str | None


class StepSync:
    """``rounds``: how many the reducer had run at the last sync. ``poisoned_by``: why the optimizer must not go on."""

    def __init__(self, transport: Transport, reducer: Reducer, warnings: MisuseWarnings) -> None:
        self.rounds = 0
        self.poisoned_by: str | None = None
        self._transport = transport
        self._reducer = reducer
        self._warnings = warnings
        self._last: GlobalGradStats | None = None
        self._steps = 0
        self._unread: list[_UnreadStats] = []
        self._host_copy: HostCopy | None = None  # of the last survey, and until its step has been watched
        self._used_here: list[bool] | None = None  # in that step, if it has been taken

    def look(self, claims: Callable[[], list[Claim]], *, with_norm: bool, device: torch.device) -> GlobalGradStats:
        """A survey of the rounds that are closed, made anew where the last one is of others. Collective.

        Args:
            claims: what ranks must be alike in.

        Raises:
            ValueError: on every rank, where ranks are not alike, or were not before the last step.
            RuntimeError: the reducers of all ranks have found something wrong, now or before the last step.
        """
        rounds = self._reducer.rounds
        if self._last is not None and rounds == self.rounds and (self._last.norm is not None or not with_norm):
            return self._last
        is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not is_captured:
            self._read(self._steps if len(self._unread) < _MOST_UNREAD else self._steps + 1)
        mine = None if is_captured or self._transport.control is None else claims()
        local_error = self._reducer.local_error
        with record("step_sync"):
            seen = all_reduce_stats(
                self._reducer.grad_stats(with_squares=with_norm),
                self._reducer.used,
                transport=self._transport,
                with_norm=with_norm,
                device=device,
                refuses=local_error is not None,
                fingerprint=None if mine is None else zlib.crc32(repr(mine).encode()),
            )
        if not is_captured:
            self._host_copy = seen.host_copy()
            if host_runs_ahead(device):
                self._unread.append(_UnreadStats(self._steps, self._host_copy, mine, local_error))
            else:
                self._compare(self._host_copy, mine, "Nothing has been written.")
        if local_error is not None and not (mine is not None and host_runs_ahead(device)):
            raise RuntimeError(local_error)
        self._last, self.rounds = seen, rounds
        return seen

    def step_begins(self) -> None:
        """The last survey is that of a step which is taken now."""
        self._steps += 1
        self._used_here = list(self._reducer.used)
        if not self._unread:
            self._warn()

    def forget(self) -> None:
        """There are other gradients from now on."""
        self._last = None

    def read(self) -> None:
        """Reads all that has not been read. Collective.

        Raises:
            ValueError: as ``look``.
        """
        self._read(self._steps + 1)

    def state_was_loaded(self) -> None:
        """What was before does not matter any more."""
        self._unread.clear()
        self._host_copy = self._used_here = self.poisoned_by = None

    def _read(self, step: int) -> None:
        """The surveys that were made before that step."""
        while self._unread and self._unread[0].step < step:
            one = self._unread.pop(0)
            try:
                self._compare(one.host_copy, one.claims, "No rank has taken that step.")
            except BaseException:
                # If they were in different calls, one's gradients may have come into another's parameters.
                self.poisoned_by = "ranks have disagreed, and what they have sent each other since is not known"
                raise
            if one.local_error is not None:
                raise RuntimeError(one.local_error)
        if not self._unread:
            self._warn()

    def _compare(self, host_copy: HostCopy, claims: list[Claim] | None, consequence: str) -> None:
        if claims is not None and not host_copy.agrees:
            agreement.require(claims, self._transport.control, remedy=f"{ALIKE} {consequence}")

    def _warn(self) -> None:
        if self._host_copy is not None and self._used_here is not None:
            self._warnings.check_stats(self._host_copy.used, self._used_here, self._host_copy.found_inf)
            self._host_copy = self._used_here = None


def host_runs_ahead(device: torch.device) -> bool:
    return device.type != "cpu"
