# SPDX-License-Identifier: Apache-2.0
"""One small all-reduce before each step checks that all ranks are about to do the same thing.

It sums a float64 block: the squared norm, a non-finite flag, a fingerprint of what the rank is about to do, and for
each parameter whether it had a gradient. The block is computed, reduced and used on the device.

Note: equal fingerprints
    The block holds the sums of f and of f^2 over N ranks. f and f^2 are integers below 2^17 and 2^34, and exact in
    float64. N sum(f^2) equals sum(f)^2 if and only if all f are equal (Cauchy-Schwarz); both fit into 63 bits for up to
    2^14 ranks.

Note: hosts that run ahead
    On the CPU the host reads the block at once, and a disagreement raises before anything is written. The host of a GPU
    must not wait for the device. There the device skips a step on which ranks disagree, as it skips one with an
    infinite gradient. The host reads the block in a later step, at the same point on all ranks: by then the device has
    usually passed it; if not, the host is a whole step ahead and may wait.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shardadam.checks.misuse import MisuseWarnings
from shardadam.engine.profiling import record
from shardadam.engine.reduction import Reducer
from shardadam.ranks import agreement
from shardadam.ranks.agreement import Claim
from shardadam.sums.stats import GradStats, are_finite, sum_of_squares
from shardadam.sums.to_device import send
from shardadam.transport import Transport
from shardadam.transport.streams import is_capturing

_FINGERPRINT_BITS = 17
_HEADER = 4  # norm^2, non-finite, sum of f, sum of f^2; one element per parameter follows
_MOST_UNREAD = 16
ALIKE = "Call the same methods in the same order on every rank, and change param groups (schedulers) alike."


@dataclass(slots=True)
class Poison:
    """Why an optimizer must not step until a whole checkpoint is loaded: ``reason``; None if it may step."""

    reason: str | None = None

    def check(self, call: str) -> None:
        """Raise RuntimeError if there is a reason. ``call``: a verb that says what the user wanted, for the message."""
        if self.reason is not None:
            raise RuntimeError(
                f"The optimizer cannot {call}: {self.reason}. Load a whole checkpoint into it, on all ranks."
            )


class GlobalGradStats:
    """Statistics of the gradients of all ranks.

    Attributes:
        norm: 2-norm of all averaged gradients, 0-dim float64; None if it was not requested.
        found_inf: 1 if a gradient is infinite or NaN, or if fingerprints differ, else 0; 0-dim float32.
        used: which parameters had a gradient on any rank; bool, by ``ShardedParam.index``.
        all_used: the host knows, without reading the device, that all parameters had a gradient.

    Args:
        block: summed over all ranks.
        ranks: number of ranks.
        compares: whether the block holds fingerprints.
    """

    def __init__(self, block: Tensor, ranks: int, *, with_norm: bool, compares: bool, all_used: bool) -> None:
        self._block = block
        self._ranks = ranks
        self.norm = block[0].sqrt() if with_norm else None
        is_skipped = block[1] > 0
        if compares:
            total, squares = block[2:_HEADER].long().unbind()
            is_skipped |= squares * ranks != total * total
        self.found_inf = is_skipped.float()
        self.used = block[_HEADER:] > 0
        self.all_used = all_used

    def host_copy(self) -> HostCopy:
        return HostCopy(self._block, self._ranks)


class HostCopy:
    """A copy of the block on the host. The copy is asynchronous; reading a property waits for it."""

    def __init__(self, block: Tensor, ranks: int) -> None:
        self._ranks = ranks
        self._event: torch.cuda.Event | None = None
        self._block = block
        if block.is_cuda:
            self._block = torch.empty_like(block, device="cpu", pin_memory=True).copy_(block, non_blocking=True)
            self._event = torch.cuda.current_stream(block.device).record_event()

    def _await(self) -> Tensor:
        if self._event is not None:
            if not self._event.query():  # type: ignore[no-untyped-call]
                self._event.synchronize()
            self._event = None
        return self._block

    @property
    def agrees(self) -> bool:
        """Whether all ranks had the same fingerprint."""
        total, squares = map(int, self._await()[2:_HEADER].tolist())
        return self._ranks * squares == total**2

    @property
    def found_inf(self) -> bool:
        return bool(self._await()[1] > 0)

    @property
    def used(self) -> Tensor:
        return self._await()[_HEADER:] > 0


@torch.no_grad()
def all_reduce_stats(
    stats: Sequence[GradStats],
    used: Sequence[bool],
    *,
    transport: Transport,
    with_norm: bool,
    device: torch.device,
    skips: bool = False,
    fingerprint: int | None = None,
) -> GlobalGradStats:
    """Sum the statistics of all ranks. Collective: all ranks must call it.

    Args:
        stats: of this rank's gradient shards.
        used: which parameters had a gradient on this rank.
        skips: make all ranks skip the step, as if a gradient were infinite.
        fingerprint: of what this rank is about to do, from 0 to 2^32; its low 17 bits are compared. None, on all ranks,
            if nothing is compared.
    """
    block = torch.empty(len(used) + _HEADER, dtype=torch.float64, device=device)
    if with_norm:
        block[0] = sum_of_squares(stats, device) / transport.replicas  # every replica adds it
    else:
        block[0] = 0.0
    block[1] = 1.0 if skips else are_finite(stats, device).logical_not()
    # Assigning Python numbers fills; copying a tensor from the host would wait for the device.
    mine = 0 if fingerprint is None else fingerprint % (1 << _FINGERPRINT_BITS)
    block[2], block[3] = mine, mine**2
    all_used = all(used)
    if all_used:
        block[_HEADER:] = 1.0
    else:
        block[_HEADER:] = send(used, block.dtype, device)
    transport.all_reduce(block).wait()
    transport.expect_progress(device)
    ranks = transport.world_size * transport.replicas
    return GlobalGradStats(block, ranks, with_norm=with_norm, compares=fingerprint is not None, all_used=all_used)


class _Unread(NamedTuple):
    """A sync whose block the host has not read.

    Args:
        step: ``StepSync.steps`` at the sync.
        claims: what this rank was about to do; None if not compared.
        local_error: of the reducer at the sync.
    """

    step: int
    host_copy: HostCopy
    claims: list[Claim] | None
    local_error: str | None


class StepSync:
    """Runs the all-reduce, and reads its block on the host as soon as the host may wait for it.

    Attributes:
        steps: number of steps since the optimizer was built.
        rounds: the reducer's ``rounds`` at the last sync.
    """

    def __init__(self, transport: Transport, reducer: Reducer, warnings: MisuseWarnings, poison: Poison) -> None:
        self.steps = 0
        self.rounds = 0
        self._transport = transport
        self._reducer = reducer
        self._warnings = warnings
        self._poison = poison
        self._last: GlobalGradStats | None = None
        self._unread: list[_Unread] = []
        self._host_copy: HostCopy | None = None  # of the last sync, until the warnings have seen it
        self._used_here: list[bool] | None = None  # in the step that followed it

    def sync(self, claims: Callable[[], list[Claim]], *, with_norm: bool, device: torch.device) -> GlobalGradStats:
        """Return the statistics of the closed rounds of all ranks. Collective.

        Skips the all-reduce if there was no round since the last one, and its result has the norm if it is needed.

        Args:
            claims: returns what must be equal on all ranks.

        Raises:
            ValueError: on every rank, if ranks disagree now, or disagreed before the last step.
            RuntimeError: on every rank, if all reducers have the same local error, now or before the last step.
        """
        rounds = self._reducer.rounds
        if self._last is not None and rounds == self.rounds and (self._last.norm is not None or not with_norm):
            return self._last
        is_captured = is_capturing(device)
        if not is_captured:
            self._read(self.steps if len(self._unread) < _MOST_UNREAD else self.steps + 1)
        mine = None if is_captured or self._transport.control is None else claims()
        local_error = self._reducer.local_error
        with record("step_sync"):
            stats = all_reduce_stats(
                self._reducer.grad_stats(with_squares=with_norm),
                self._reducer.used,
                transport=self._transport,
                with_norm=with_norm,
                device=device,
                skips=local_error is not None,
                fingerprint=None if mine is None else zlib.crc32(repr(mine).encode()),
            )
        if not is_captured:
            self._host_copy = stats.host_copy()
            if host_runs_ahead(device):
                self._unread.append(_Unread(self.steps, self._host_copy, mine, local_error))
            else:
                self._compare(self._host_copy, mine, "Nothing has been written.")
        if local_error is not None and not (mine is not None and host_runs_ahead(device)):
            raise RuntimeError(local_error)
        self._last, self.rounds = stats, rounds
        return stats

    def step_begins(self) -> None:
        """Count a step, which uses the result of the last sync."""
        self.steps += 1
        self._used_here = list(self._reducer.used)
        if not self._unread:
            self._warn()

    def forget(self) -> None:
        """Make the next ``sync`` all-reduce: the gradients have been used or discarded."""
        self._last = None

    def read_all(self) -> None:
        """Read every block that the host has not read. Collective.

        Raises:
            ValueError, RuntimeError: as ``sync``.
        """
        self._read(self.steps + 1)

    def state_was_loaded(self) -> None:
        """Drop all unread blocks: the loaded state replaces the results of their steps."""
        self._unread.clear()
        self._host_copy = self._used_here = None

    def _read(self, step: int) -> None:
        """Read the blocks of the syncs before ``step``."""
        while self._unread and self._unread[0].step < step:
            one = self._unread.pop(0)
            try:
                self._compare(one.host_copy, one.claims, "No rank has taken that step.")
            except BaseException:
                # In different calls, one parameter's gradients may have been summed with another's.
                self._poison.reason = "ranks have disagreed, and later transfers may have mixed different tensors"
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
    """Return whether the host must not wait for work that it has enqueued on ``device``."""
    return device.type != "cpu"
