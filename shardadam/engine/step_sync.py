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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from shardadam.transport import Job, Transport
from shardadam.transport.streams import is_capturing

_FINGERPRINT_BITS = 17
_HEADER = 4  # norm^2, non-finite, sum of f, sum of f^2; one element per parameter follows
_PARTS_HEADER = 5  # the same of all parts of the model, and how many data-parallel groups have different fingerprints
_MOST_UNREAD = 16
_WRITTEN = "Backward has updated parameters already."
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
        left_out: with ``update="backward"``, the number of shards of all ranks that stay as they are; 0-dim float64.
        used: which parameters had a gradient on any rank; bool, by ``ShardedParam.index``.
        all_used: the host knows, without reading the device, that all parameters had a gradient.

    Args:
        block: summed over all ranks.
        ranks: number of ranks.
        compares: whether the block holds fingerprints.
        parts: what the ranks with other parts of the model have found; None without model parallelism.
    """

    def __init__(
        self,
        block: Tensor,
        ranks: int,
        *,
        with_norm: bool,
        compares: bool,
        all_used: bool,
        parts: PartStats | None = None,
    ) -> None:
        self._block = block
        self._ranks = ranks
        self._parts = parts
        head = block if parts is None else parts.block
        self.norm = head[0].sqrt() if with_norm else None
        self.left_out = head[1]
        is_skipped = head[1] > 0
        if parts is None:
            if compares:
                is_skipped |= _differ(block[2:_HEADER], ranks)
        else:
            is_skipped |= head[_PARTS_HEADER - 1] > 0
            if compares:
                is_skipped |= _differ(head[2:_HEADER], parts.ranks)
        self.found_inf = is_skipped.float()
        self.used = block[_HEADER:] > 0
        self.all_used = all_used

    def host_copy(self) -> HostCopy:
        return HostCopy(self._block, self._ranks, self._parts)

    def skip_if(self, found_inf: Tensor) -> None:
        """Also make the step skip if ``found_inf``, 0-dim, is not 0."""
        self.found_inf = torch.maximum(self.found_inf, found_inf.to(self.found_inf))


class PartStats(NamedTuple):
    """Sums over all parts of the model: norm^2, non-finite, f and f^2 of fingerprints, and in how many data-parallel
    groups fingerprints differ.

    Args:
        ranks: of the job.
    """

    block: Tensor
    ranks: int


def _differ(fingerprints: Tensor, ranks: int) -> Tensor:
    """Return whether ranks had different fingerprints f: sum(f) and sum(f^2), float64, on any device."""
    total, squares = fingerprints.long().unbind()
    return squares * ranks != total * total


class HostCopy:
    """A copy of the block on the host. The copy is asynchronous; reading a property waits for it."""

    def __init__(self, block: Tensor, ranks: int, parts: PartStats | None) -> None:
        self._ranks = ranks
        self._event: torch.cuda.Event | None = None
        self._ranks_of_job = ranks if parts is None else parts.ranks
        self._parts_numel = 0 if parts is None else parts.block.numel()
        if parts is not None:
            block = torch.cat([block, parts.block])
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

    def _await_own(self) -> Tensor:
        """Return the block of this part of the model."""
        block = self._await()
        return block[: block.numel() - self._parts_numel]

    @property
    def agrees(self) -> bool:
        """Whether all ranks of the job had the same fingerprints."""
        if bool(_differ(self._await_own()[2:_HEADER], self._ranks)):
            return False
        if self._parts_numel == 0:
            return True
        parts = self._await()[-self._parts_numel :]
        return not bool(_differ(parts[2:_HEADER], self._ranks_of_job)) and not bool(parts[-1] > 0)

    @property
    def found_inf(self) -> bool:
        block = self._await()
        return bool(block[1 if self._parts_numel == 0 else -self._parts_numel + 1] > 0)

    @property
    def used(self) -> Tensor:
        return self._await_own()[_HEADER:] > 0


@torch.no_grad()
def all_reduce_stats(
    stats: Sequence[GradStats],
    used: Sequence[bool],
    *,
    transport: Transport,
    with_norm: bool,
    device: torch.device,
    skips: bool = False,
    left_out: Tensor | None = None,
    fingerprint: int | None = None,
    own_groups: Sequence[tuple[Transport, slice]] = (),
    job: Job | None = None,
    job_fingerprint: int = 0,
) -> GlobalGradStats:
    """Sum the statistics of all ranks. Collective: all ranks must call it.

    Args:
        stats: of this rank's gradient shards.
        used: which parameters had a gradient on this rank.
        skips: make all ranks skip the step, as if a gradient were infinite.
        left_out: the number of this rank's shards that stay as they are, as their gradients are not finite; None: one
            gradient that is not finite makes all ranks skip the step.
        fingerprint: of what this rank is about to do, from 0 to 2^32; its low 17 bits are compared. None, on all ranks,
            if nothing is compared.
        own_groups: param indices whose use is summed over a transport of their own (experts).
        job: None without model parallelism.
        job_fingerprint: as ``fingerprint``, of what all ranks of the job are about to do.
    """
    block = torch.empty(len(used) + _HEADER, dtype=torch.float64, device=device)
    if with_norm:
        block[0] = sum_of_squares(stats, device)
    else:
        block[0] = 0.0
    if left_out is not None:
        block[1] = left_out
    else:
        block[1] = 1.0 if skips else are_finite(stats, device).logical_not()
    # Assigning Python numbers fills; copying a tensor from the host would wait for the device.
    _write_fingerprint_(block[2:_HEADER], 0 if fingerprint is None else fingerprint)
    all_used = all(used)
    if all_used:
        block[_HEADER:] = 1.0
    else:
        block[_HEADER:] = send(used, block.dtype, device)
    own_used = [block[_HEADER:][indices].clone() for _, indices in own_groups]
    transport.all_reduce(block).wait()
    for (own, indices), used_here in zip(own_groups, own_used, strict=True):
        own.all_reduce(used_here).wait()
        block[_HEADER:][indices] = used_here
    ranks = transport.world_size * transport.replicas
    compares = fingerprint is not None
    parts = None
    if job is not None and job.is_parallel:
        parts = PartStats(torch.zeros(_PARTS_HEADER, dtype=block.dtype, device=device), job.world_size)
        parts.block[:2] = block[:2]
        # Every rank of a data-parallel group adds the same, but to another sum.
        _write_fingerprint_(parts.block[2:_HEADER], job_fingerprint, times=ranks)
        if compares:
            parts.block[_PARTS_HEADER - 1] = _differ(block[2:_HEADER], ranks)
        job.sum_parts_(parts.block)
        job.expect_progress(device)
    transport.expect_progress(device)
    return GlobalGradStats(block, ranks, with_norm=with_norm, compares=compares, all_used=all_used, parts=parts)


def _write_fingerprint_(target: Tensor, fingerprint: int, *, times: int = 1) -> None:
    mine = fingerprint % (1 << _FINGERPRINT_BITS)
    target[0], target[1] = times * mine, times * mine**2


class Claims(NamedTuple):
    """What must be equal: on the ranks of the optimizer's process group, and on all ranks of the job."""

    of_group: list[Claim]
    of_job: list[Claim]


class _Unread(NamedTuple):
    """A sync whose block the host has not read.

    Args:
        step: ``StepSync.steps`` at the sync.
        claims: what this rank was about to do; None if not compared.
        local_error: of the reducer at the sync.
    """

    step: int
    host_copy: HostCopy
    claims: Claims | None
    local_error: str | None


class StepSync:
    """Runs the all-reduce, and reads its block on the host as soon as the host may wait for it.

    Attributes:
        steps: number of steps since the optimizer was built.
        rounds: the reducer's ``rounds`` at the last sync.

    Args:
        writes_before: gradients have updated parameters before the sync.
    """

    def __init__(
        self,
        transport: Transport,
        job: Job,
        reducer: Reducer,
        warnings: MisuseWarnings,
        poison: Poison,
        *,
        writes_before: bool = False,
    ) -> None:
        self.steps = 0
        self.rounds = 0
        self._transport = transport
        self._job = job
        self._reducer = reducer
        self._warnings = warnings
        self._poison = poison
        self._writes_before = writes_before
        self._last: GlobalGradStats | None = None
        self._skips: Tensor | None = None  # not 0: another optimizer's gradients were not finite
        self._unread: list[_Unread] = []
        self._host_copy: HostCopy | None = None  # of the last sync, until the warnings have seen it
        self._used_here: list[bool] | None = None  # in the step that followed it

    def sync(
        self,
        claims: Callable[[], Claims],
        *,
        with_norm: bool,
        device: torch.device,
        own_groups: Sequence[tuple[Transport, slice]] = (),
        left_out: Callable[[torch.device], Tensor] | None = None,
    ) -> GlobalGradStats:
        """Return the statistics of the closed rounds of all ranks. Collective over the job.

        Skips the all-reduce if there was no round since the last one, and its result has the norm if it is needed;
        never with model parallelism, as this rank does not know whether there was a round on other parts.

        Args:
            claims: returns what must be equal on all ranks.
            own_groups: as in ``all_reduce_stats``.
            left_out: returns the same as in ``all_reduce_stats``, on a device.

        Raises:
            ValueError: on every rank, if ranks disagree now, or disagreed before the last step.
            RuntimeError: on every rank, if all reducers have the same local error, now or before the last step.
        """
        rounds = self._reducer.rounds
        if self._last is not None and rounds == self.rounds and (self._last.norm is not None or not with_norm):
            if not self._job.is_parallel:
                return self._last
            with_norm = self._last.norm is not None
        is_captured = is_capturing(device)
        if not is_captured:
            self._read(self.steps if len(self._unread) < _MOST_UNREAD else self.steps + 1)
        mine = None if is_captured or self._job.control is None else claims()
        local_error = self._reducer.local_error
        with record("step_sync"):
            of_gradients = self._reducer.grad_stats(with_squares=with_norm)
            stats = all_reduce_stats(
                of_gradients,
                self._reducer.used,
                transport=self._transport,
                with_norm=with_norm,
                device=device,
                skips=local_error is not None,
                left_out=None if left_out is None else left_out(device),
                fingerprint=None if mine is None else _fingerprint(mine.of_group),
                own_groups=own_groups,
                job=self._job,
                job_fingerprint=0 if mine is None else _fingerprint(mine.of_job),
            )
        if not is_captured:
            self._host_copy = stats.host_copy()
            if host_runs_ahead(device):
                self._unread.append(_Unread(self.steps, self._host_copy, mine, local_error))
            else:
                with self._poisoned_if_written():
                    self._compare(
                        self._host_copy, mine, _WRITTEN if self._writes_before else "Nothing has been written."
                    )
        if local_error is not None and not (mine is not None and host_runs_ahead(device)):
            with self._poisoned_if_written():
                raise RuntimeError(local_error)
        if self._skips is not None:
            stats.skip_if(self._skips)
        self._last, self.rounds = stats, rounds
        return stats

    @contextmanager
    def _poisoned_if_written(self) -> Iterator[None]:
        """Context manager for checks before a step that raise: the parameters may have been updated already."""
        try:
            yield
        except Exception:
            if self._writes_before:
                self._poison.reason = 'a step was refused that update="backward" had begun'
            raise

    def step_begins(self) -> None:
        """Count a step, which uses the result of the last sync."""
        self.steps += 1
        self._used_here = list(self._reducer.used)
        if not self._unread:
            self._warn()

    def skip_if(self, found_inf: Tensor) -> None:
        """Make the next step skip if ``found_inf`` is not 0."""
        self._skips = found_inf
        if self._last is not None:
            self._last.skip_if(found_inf)

    def forget(self) -> None:
        """Make the next ``sync`` all-reduce: the gradients have changed."""
        self._last = None

    def start_anew(self) -> None:
        """Forget all about the gradients, which have been used or discarded."""
        self._last = self._skips = None

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
                self._compare(
                    one.host_copy, one.claims, _WRITTEN if self._writes_before else "No rank has taken that step."
                )
            except BaseException:
                # In different calls, one parameter's gradients may have been summed with another's.
                self._poison.reason = "ranks have disagreed, and later transfers may have mixed different tensors"
                raise
            if one.local_error is not None:
                with self._poisoned_if_written():
                    raise RuntimeError(one.local_error)
        if not self._unread:
            self._warn()

    def _compare(self, host_copy: HostCopy, claims: Claims | None, consequence: str) -> None:
        if claims is None or host_copy.agrees:
            return
        remedy = f"{ALIKE} {consequence}"
        found: Exception | None = None
        try:
            agreement.require(claims.of_group, self._transport.control, remedy=remedy)
        except ValueError as error:
            found = error
        if self._job.is_parallel:
            # Ranks with other parts of the model may be in order among themselves, and must not go on, either.
            verdict = Claim("the data-parallel ranks of a part:", "", "in order" if found is None else str(found))
            try:
                agreement.require([*claims.of_job, verdict], self._job.control, remedy=remedy)
            except ValueError as error:
                found = found or error
        if found is not None:
            raise found

    def _warn(self) -> None:
        if self._host_copy is not None and self._used_here is not None:
            self._warnings.check_stats(self._host_copy.used, self._used_here, self._host_copy.found_inf)
            self._host_copy = self._used_here = None


def _fingerprint(claims: list[Claim]) -> int:
    return zlib.crc32(repr(claims).encode())


def host_runs_ahead(device: torch.device) -> bool:
    """Return whether the host must not wait for work that it has enqueued on ``device``."""
    return device.type != "cpu"
