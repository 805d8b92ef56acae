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

from shardadam import agreement
from shardadam.agreement import Claim
from shardadam.clipping import Reading, Survey, survey
from shardadam.misuse import Watch
from shardadam.reduction import Reducer
from shardadam.tracing import span
from shardadam.transport import Transport

_MOST_UNREAD = 16
ALIKE = "Call the same methods in the same order on every rank, and change param groups (schedulers) alike."


class _Unread(NamedTuple):
    """A survey that the host has not read.

    Args:
        step: how many steps had been taken when it was made.
        claims: what this rank was about to do; None: not compared.
        complaint: the reducer's.
    """

    step: int
    reading: Reading
    claims: list[Claim] | None
    complaint: str | None


class Surveyor:
    """``rounds``: how many the reducer had run at the last survey. ``refusal``: why the optimizer must not go on."""

    def __init__(self, transport: Transport, reducer: Reducer, watch: Watch) -> None:
        self.rounds = 0
        self.refusal: str | None = None
        self._transport = transport
        self._reducer = reducer
        self._watch = watch
        self._last: Survey | None = None
        self._steps = 0
        self._unread: list[_Unread] = []
        self._reading: Reading | None = None  # of the last survey, and until its step has been watched
        self._used_here: list[bool] | None = None  # in that step, if it has been taken

    def look(self, claims: Callable[[], list[Claim]], *, with_norm: bool, device: torch.device) -> Survey:
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
        complaint = self._reducer.complaint
        with span("survey"):
            seen = survey(
                self._reducer.gauges(with_squares=with_norm),
                self._reducer.used,
                transport=self._transport,
                with_norm=with_norm,
                device=device,
                refuses=complaint is not None,
                fingerprint=None if mine is None else zlib.crc32(repr(mine).encode()),
            )
        if not is_captured:
            self._reading = seen.reading()
            if host_runs_ahead(device):
                self._unread.append(_Unread(self._steps, self._reading, mine, complaint))
            else:
                self._compare(self._reading, mine, "Nothing has been written.")
        if complaint is not None and not (mine is not None and host_runs_ahead(device)):
            raise RuntimeError(complaint)
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
        self._reading = self._used_here = self.refusal = None

    def _read(self, step: int) -> None:
        """The surveys that were made before that step."""
        while self._unread and self._unread[0].step < step:
            one = self._unread.pop(0)
            try:
                self._compare(one.reading, one.claims, "No rank has taken that step.")
            except BaseException:
                # If they were in different calls, one's gradients may have come into another's parameters.
                self.refusal = "ranks have disagreed, and what they have sent each other since is not known"
                raise
            if one.complaint is not None:
                raise RuntimeError(one.complaint)
        if not self._unread:
            self._warn()

    def _compare(self, reading: Reading, claims: list[Claim] | None, consequence: str) -> None:
        if claims is not None and not reading.agrees:
            agreement.require(claims, self._transport.control, remedy=f"{ALIKE} {consequence}")

    def _warn(self) -> None:
        if self._reading is not None and self._used_here is not None:
            self._watch.look_at_survey(self._reading.used, self._used_here, self._reading.found_inf)
            self._reading = self._used_here = None


def host_runs_ahead(device: torch.device) -> bool:
    return device.type != "cpu"
