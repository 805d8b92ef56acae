# SPDX-License-Identifier: Apache-2.0
"""When ranks look together at what all of them must know before they write, and what becomes of one that is about to do
something else than the others.

Note: hosts that run ahead
    On the CPU a survey is read at once, and raises before anything is written. The host of a GPU must not wait for the
    device: there the device itself does not take a step of which ranks disagree, as if a gradient were infinite, and
    the host reads the survey when it wants the next one, on all ranks at the same point. By then the device has long
    been there, or else the host is a whole step ahead of it and may wait.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from shardadam import agreement
from shardadam.agreement import Claim
from shardadam.clipping import Reading, Survey, survey
from shardadam.misuse import Watch
from shardadam.reduction import Reducer
from shardadam.tracing import span
from shardadam.transport import Transport

ALIKE = "Call the same methods in the same order on every rank, and change param groups (schedulers) alike."


class Surveyor:
    """``rounds``: how many the reducer had run at the last survey. ``refusal``: why the optimizer must not go on."""

    def __init__(self, transport: Transport, reducer: Reducer, watch: Watch) -> None:
        self.rounds = 0
        self.refusal: str | None = None
        self._transport = transport
        self._reducer = reducer
        self._watch = watch
        self._last: Survey | None = None
        self._runs_ahead = False  # the host
        # What it has yet to read of the survey.
        self._reading: Reading | None = None
        self._claims: list[Claim] | None = None
        self._used_here: list[bool] | None = None

    def look(self, claims: Callable[[], list[Claim]], *, with_norm: bool, device: torch.device) -> Survey:
        """A survey of the rounds that are closed, made anew where the last one is of others. Collective.

        Args:
            claims: what ranks must be alike in.

        Raises:
            ValueError: on every rank, where ranks are not alike, or were not at the survey before.
            RuntimeError: this rank's reducer has found something wrong.
        """
        rounds = self._reducer.rounds
        if self._last is not None and rounds == self.rounds and (self._last.norm is not None or not with_norm):
            return self._last
        is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if not is_captured:
            self._read()
        mine = None if is_captured or self._transport.control is None else claims()
        with span("survey"):
            seen = survey(
                self._reducer.gauges(with_squares=with_norm),
                self._reducer.used,
                transport=self._transport,
                with_norm=with_norm,
                device=device,
                fingerprint=None if mine is None else zlib.crc32(repr(mine).encode()),
            )
        self._reading, self._claims = None if is_captured else seen.reading(), mine
        self._runs_ahead = host_runs_ahead(device)
        if not self._runs_ahead:
            self._compare("Nothing has been written.")
        if self._reducer.complaint is not None:
            raise RuntimeError(self._reducer.complaint)
        self._last, self.rounds = seen, rounds
        return seen

    def watch_step(self) -> None:
        """The last survey is that of a step which is about to be taken."""
        if self._reading is not None:
            self._used_here = list(self._reducer.used)
            if not self._runs_ahead:
                self._warn()

    def forget(self) -> None:
        """There are other gradients from now on."""
        self._last = None

    def _read(self) -> None:
        """What has not been read of the survey before. Collective."""
        try:
            self._compare("No rank has taken that step.")
        except BaseException:
            # Where they were in different calls, one's gradients may have been gathered into another's parameters.
            self.refusal = "ranks have disagreed, and what they have sent each other since is not known"
            raise
        self._warn()

    def _compare(self, consequence: str) -> None:
        claims, self._claims = self._claims, None
        if claims is not None and self._reading is not None and not self._reading.agrees:
            agreement.require(claims, self._transport.control, remedy=f"{ALIKE} {consequence}")

    def _warn(self) -> None:
        used_here, self._used_here = self._used_here, None
        if used_here is not None and self._reading is not None:
            self._watch.look_at_survey(self._reading.used, used_here, self._reading.found_inf)
            self._reading = None


def host_runs_ahead(device: torch.device) -> bool:
    return device.type != "cpu"
