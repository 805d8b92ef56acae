# SPDX-License-Identifier: Apache-2.0
"""Desync reports: which call every rank is in, and at which line of the user's script.

A rank that waits in vain asks for a report; a thread of every rank answers, whatever its main thread is doing. Uses the
store only, and takes no part in training.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import socket
import sys
import sysconfig
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from shardadam.ranks import transfer_log
from shardadam.ranks.store import StoreClient, default_store

COMPARE_S = 10.0
"""How long ranks wait before they compare the transfers that they have started."""

_PERIOD_S = 0.25
_REPORT_S = 2.0
_ANSWER_S = 3.0  # of the store
_JOIN_S = 5.0
_CALL = re.compile(r"\b(in|after) call (\d+) of (\w+)\(\)")
_OF_LOOP = ("step", "zero_grad", "clip_grad_norm_")
_UNEVEN = (
    " If {} raised no error but had fewer batches, give all ranks equally many (drop_last=True in DataLoader and "
    "DistributedSampler), or train under torch.distributed.algorithms.join.Join([optimizer])."
)
_MOST_NAMED = 16
_LIBRARIES = tuple(
    str(Path(folder).resolve()) + os.sep
    for folder in (Path(__file__).parent.parent, Path(torch.__file__).parent, sysconfig.get_path("stdlib"))
)
_KNOWN = "Status of the ranks:"
_ENDED = "has ended"
_LEFT = "has ended, or left the process group,"
_QUESTION = "?"
_SILENT = "does not answer: it has ended, is stopped, or cannot be reached"
_ABSENT = "has not come to build its optimizer, or has ended"
_log = logging.getLogger("shardadam")


class RankDesyncError(RuntimeError):
    """A rank has ended, has raised, or makes other calls than this one; the message gives the status of all ranks.

    The call that was running on this rank is not complete, and training cannot continue: restart from the last
    checkpoint.
    """


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """The process of a rank.

    Args:
        pid_namespace: equal for two processes that see each other's process ids; empty where the system has none.
    """

    host: str
    pid: int
    pid_namespace: str

    @staticmethod
    def here() -> ProcessInfo:
        return ProcessInfo(socket.gethostname(), os.getpid(), _pid_namespace())

    def has_ended(self) -> bool:
        """Return whether the process is known to have ended; False if it is not visible to this process."""
        if not self.pid_namespace or self.pid_namespace != _pid_namespace():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in "ZX"


def _pid_namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


class DesyncReporter:
    """Asks the ranks of the default process group for their status, and answers when another rank asks.

    Attributes:
        processes: by rank, of the ranks that have built an optimizer together with this one.

    Note: status requests
        A request is a number in the store. A thread of every rank checks for a new number four times a second (less
        often with thousands of ranks) and writes its status under a key of its own. It has its own connection, as the
        main thread may block the default one. A rank that fails writes why in place of a request; its answers tell it
        that the others have read that, even if its process then ends and takes the store with it.

    Args:
        store: must not share the connection of the default store.
        rank: this one.
    """

    def __init__(self, store: StoreClient, rank: int, world_size: int) -> None:
        self.processes: dict[int, ProcessInfo] = {}
        self._rank = rank
        self._failures: dict[int, str] = {}  # by rank: why it has failed, as it has announced
        self._store: StoreClient | None = store
        try:
            store.connect()
        except dist.DistError:
            self._store = None
            return
        _answer_in_background(store, rank, _PERIOD_S * max(1.0, world_size / 1000), self._failures)

    def add_processes(self, processes: Mapping[int, ProcessInfo]) -> None:
        """Add processes that are alive now, by rank."""
        self.processes.update(processes)
        for rank in processes:
            self._failures.pop(rank, None)

    def announce(self, failure: str) -> None:
        """Tell the other ranks why this one fails; wait up to 2 s until those in ``processes`` have read it."""
        store = self._store
        if store is not None:
            with suppress(RuntimeError):  # dist.DistError is one
                store.run_with_limit(lambda: self._status_of(list(self.processes), store, f"{self._rank} {failure}"))

    def report(self, ranks: Sequence[int]) -> str:
        """Return the status of ``ranks``, one line each, silent ranks first. Takes up to 2 s if one does not answer."""
        store = self._store
        if store is None:
            return self._unknown(ranks, "the store of the process group cannot be cloned")
        try:
            answers = store.run_with_limit(lambda: self._status_of(ranks, store))
        except RuntimeError:  # dist.DistError is one
            return self._unknown(
                ranks,
                "cannot reach the store of the process group; the process that hosts it (rank 0, or torchrun's agent) "
                "has ended, or its host is cut off",
            )
        status = {rank: answer.text for rank, answer in answers.items()}
        missing = {rank: _SILENT if rank in self.processes else _ABSENT for rank in ranks}
        status = {**status, **self._ends_of(rank for rank in ranks if status.get(rank, _ENDED) == _ENDED)}
        status = {**missing, **status, **{rank: text for rank, text in self._failures.items() if rank in missing}}
        silent = [rank for rank in ranks if rank in self._failures or status[rank] in (_SILENT, _ABSENT, _ENDED)]
        left = [rank for rank in ranks if status[rank].startswith(_LEFT)]
        shown = sorted(status, key=lambda rank: (rank not in silent, rank not in left, rank != self._rank, rank))
        lines = [f"  {self._name(rank)}: {status[rank]}" for rank in shown[:_MOST_NAMED]]
        if len(shown) > _MOST_NAMED:
            lines.append(f"  and {len(shown) - _MOST_NAMED} more")
        remedy = (
            "Check the logs of the silent ranks first."
            if silent or left
            else "All ranks must make the same calls in the same order; compare where they are in your script."
        )
        if hint := _called_apart(list(status.values())):
            remedy += f" If they show no error: {hint}" if silent or left else f" {hint}"
        own, others = status[self._rank], [rank for rank in ranks if rank != self._rank]
        if done := [rank for rank in others if _may_be_done(status[rank], own)]:
            remedy += _UNEVEN.format(", ".join(map(self._name, done)))
        return "\n".join([_KNOWN, *lines, remedy])

    def difference(self, ranks: Sequence[int]) -> str | None:
        """Return which of ``ranks`` has started a different transfer than this one, and what; None if none is known.

        Takes up to 2 s if a rank does not answer.
        """
        store = self._store
        if store is None:
            return None
        try:
            answers = store.run_with_limit(lambda: self._status_of(ranks, store))
        except RuntimeError:  # dist.DistError is one
            return None
        for rank, answer in answers.items():
            found = transfer_log.difference(answers[self._rank].started, answer.started)
            if found is not None:
                return f"{self._name(rank)} has started {found[1]}, but {self._name(self._rank)} {found[0]}"
        return None

    def _ends_of(self, ranks: Iterable[int]) -> dict[int, str]:
        """Return what ``ranks`` have left behind when they left their process group, by rank."""
        store, ends = self._store, {}
        with suppress(RuntimeError):
            for rank in ranks:
                if store is not None and store.check([f"left/{rank}"]):
                    ends[rank] = store.get(f"left/{rank}")
        return ends

    def _unknown(self, ranks: Sequence[int], why: str) -> str:
        names = ", ".join(self._name(rank) for rank in ranks[:_MOST_NAMED])
        failures = [f"  {self._name(rank)}: {self._failures[rank]}" for rank in ranks if rank in self._failures]
        return "\n".join([f"Status of the ranks unknown: {why}. The ranks are: {names}.", *failures])

    def _name(self, rank: int) -> str:
        hosts = {process.host for process in self.processes.values()}
        host = f" on {self.processes[rank].host}" if len(hosts) > 1 and rank in self.processes else ""
        return f"rank {rank}{host}{' (this one)' if rank == self._rank else ''}"

    def _status_of(self, ranks: Sequence[int], store: StoreClient, text: str = _QUESTION) -> dict[int, _Answer]:
        """Write the request ``text``; return the status by rank, without ranks that have not answered in time."""
        status = {self._rank: _Answer(_calls.describe(), transfer_log.started())}
        request = store.add("requests", 1)
        store.set(f"request/{request}", text)
        deadline = time.monotonic() + _REPORT_S
        while True:
            for rank in ranks:
                if rank in status:
                    continue
                if (answer := _answer_of(store, rank, request)) is not None:
                    status[rank] = answer
                elif rank in self.processes and self.processes[rank].has_ended():
                    status[rank] = _Answer(_ENDED, {})
            if all(rank in status for rank in ranks) or time.monotonic() > deadline:
                return status
            time.sleep(0.05)


def _called_apart(statuses: Sequence[str]) -> str:
    """Return what to do about a method in which only some ranks are, if no training loop calls it in each step."""
    calls = [_CALL.search(status) for status in statuses]
    methods = {found[3] if found and found[1] == "in" else "" for found in calls}
    apart = {name for name in methods if name and name not in _OF_LOOP and not name[0].isupper()}
    if not apart or methods == apart:
        return ""
    return f"{min(apart)}() is collective: call it on all ranks, not under `if rank == 0`."


def _may_be_done(other: str, own: str) -> bool:
    """Return whether the statuses fit a rank that has left its training loop, for which this one waits in ``step()``
    or in a backward between two steps.
    """
    theirs, mine = _CALL.search(other), _CALL.search(own)
    if theirs is None or mine is None or mine[3] not in _OF_LOOP or theirs[3][0].isupper():
        return False  # a class: it is being built
    if theirs[3] not in _OF_LOOP:
        return True  # a call of an evaluation, for example
    return theirs[1] == "after" and int(theirs[2]) <= int(mine[2])


class _Answer(NamedTuple):
    """To a status request: where the rank is, and which transfers it has started."""

    text: str
    started: transfer_log.Started


def _answer_of(store: StoreClient, rank: int, request: int) -> _Answer | None:
    key = f"status/{rank}"
    if not store.check([key]):
        return None
    number, _, answer = store.get(key).partition(" ")
    return _Answer(*json.loads(answer)) if int(number) >= request else None


# This rank

_reporters: weakref.WeakKeyDictionary[dist.ProcessGroup, DesyncReporter] = weakref.WeakKeyDictionary()
"""By the default group of their time."""


def register(processes: Mapping[int, ProcessInfo]) -> None:
    """Make this rank answer status requests from now on. Local; torch.distributed must be initialised.

    Args:
        processes: of some ranks, alive now, by rank.
    """
    world: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    if world not in _reporters:
        store = StoreClient(default_store("desync"), answer_s=_ANSWER_S, may_share_connection=False)
        _reporters[world] = DesyncReporter(store, dist.get_rank(), dist.get_world_size())
    _reporters[world].add_processes(processes)


@contextmanager
def announcing_failure(what: str) -> Iterator[None]:
    """Context manager: if the block raises, tell the other ranks why, as they may wait for this one. Local.

    Their next report quotes the error, even if this process has ended and hosted the store.

    Args:
        what: says what this rank could not do, such as ``could not build its optimizer``.
    """
    try:
        yield
    except RankDesyncError:  # the others have the same one, or caused it
        raise
    except Exception as error:
        world = dist.group.WORLD if dist.is_initialized() else None
        if world is not None and world in _reporters:
            _reporters[world].announce(f"{what}: {type(error).__name__}: {error}")
        raise


def desync_error(what: str, error: RuntimeError, ranks: Sequence[int]) -> RankDesyncError:
    """Return the error to raise after a failed transfer, with the status of ``ranks``. Local.

    Args:
        what: what failed; begins the message.
        error: of the backend.
    """
    how = re.sub(r"\[[^\]]*/gloo/[^\]]*\] ", "", str(error))  # paths in Gloo's sources
    limit = " (the limit is the timeout of init_process_group)" if "imed out" in how else ""
    return RankDesyncError(f"{what} failed: {how}{limit}\n{report(ranks)}")


def report(ranks: Sequence[int]) -> str:
    """Return the status of ``ranks``, one line each. Takes up to 2 s if a rank does not answer. Local."""
    world = dist.group.WORLD if dist.is_initialized() else None
    if world is None:
        return "Status of the ranks unknown: torch.distributed is no longer initialised."
    if world not in _reporters:
        return f"Status of the ranks unknown: this rank has built no optimizer yet. The ranks are: {list(ranks)}."
    return _reporters[world].report(ranks)


def known_status(ranks: Sequence[int]) -> str:
    """Return ``report`` on a line of its own, to be appended to a message; nothing if it is unknown. Local."""
    text = report(ranks)
    return f"\n{text}" if text.startswith(_KNOWN) else ""


def log_difference(ranks: Sequence[int]) -> bool:
    """Log an error if one of ``ranks`` has started a different transfer than this one; return whether it is so. Local.

    For ranks that wait where they cannot raise. Takes up to 4 s if a rank does not answer. Only the first two of
    ``ranks`` compare theirs with those of all, as every request is answered by every rank.
    """
    world = dist.group.WORLD if dist.is_initialized() and dist.get_rank() in ranks[:2] else None
    found = None if world is None or world not in _reporters else _reporters[world].difference(ranks)
    if found is not None:
        _log.error(
            "%s: they have made different calls, or different numbers of backward passes, and wait for each other "
            "until the timeout of the process group.\n%s",
            found,
            report(ranks),
        )
    return found is not None


class _CallLog:
    """Which of the calls that all ranks must make the main thread of this process is in, or made last.

    Counts the calls of each optimizer apart, and names the optimizer if the process has built several: by its place
    in the order in which they were built.
    """

    def __init__(self) -> None:
        self._open: list[tuple[str, float]] = []  # call, start
        self._last: tuple[str, float] | None = None  # call, end
        self._built: Counter[str] = Counter()
        self._counts: weakref.WeakKeyDictionary[object, Counter[str]] = weakref.WeakKeyDictionary()
        self._numbers: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    @contextmanager
    def in_call(self, call: str, optimizer: object, *, builds: bool = False) -> Iterator[None]:
        if builds:
            self._built[call] += 1
            self._numbers[optimizer] = self._built.total()
            text = f"call {self._built[call]} of {call}()"
        else:
            counts = self._counts.setdefault(optimizer, Counter())
            counts[call] += 1
            text = f"call {counts[call]} of {call}()"
            if self._built.total() > 1 and optimizer in self._numbers:
                text += f" of optimizer {self._numbers[optimizer]} of {self._built.total()}"
        self._open.append((text, time.monotonic()))
        try:
            yield
        finally:
            text, _ = self._open.pop()
            self._last = (text, time.monotonic())

    def describe(self) -> str:
        line = _line_in_users_code()
        at = f", at {line}" if line else ""
        now = time.monotonic()
        for call, start in self._open[:1]:  # a copy, as the main thread may end the call meanwhile
            return f"in {call} for {now - start:.1f} s{at}"
        if self._last is None:
            return f"has not called the optimizer yet{at}"
        call, end = self._last
        return f"{now - end:.1f} s after {call}{at}"

    def describe_end(self) -> str:
        """Return what to say of this rank once it has left the process group or ended."""
        return _LEFT if self._last is None else f"{_LEFT} after {self._last[0]}"


_calls = _CallLog()


def in_call(call: str, optimizer: object, *, builds: bool = False) -> AbstractContextManager[None]:
    """Return a context manager that marks its block as a call that all ranks must make; status reports name it.

    Args:
        call: name of the method, or of the class.
        optimizer: whose method it is; counted apart from those of others.
        builds: whether the call builds ``optimizer``.
    """
    return _calls.in_call(call, optimizer, builds=builds)


def _line_in_users_code() -> str | None:
    """Return the innermost frame of the main thread that is not in a library, such as ``train.py:57 in main``."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(("<", *_LIBRARIES)) and "site-packages" not in path:
            return f"{os.path.basename(path)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return None


# The thread

_threads: list[tuple[threading.Thread, threading.Event]] = []


def _answer_in_background(store: StoreClient, rank: int, period_s: float, failures: dict[int, str]) -> None:
    """Start a thread that answers requests, and writes what ranks announce to ``failures``."""
    done = threading.Event()

    def answer() -> None:
        seen = 0
        while not done.wait(period_s) and dist.is_initialized():
            try:
                before = seen
                while store.check([f"request/{seen + 1}"]):
                    seen += 1
                    text = store.get(f"request/{seen}")
                    if text != _QUESTION:
                        failed, _, failure = text.partition(" ")
                        failures[int(failed)] = failure
                if seen > before:
                    answer = _Answer(_calls.describe(), transfer_log.started())
                    store.set(f"status/{rank}", f"{seen} {json.dumps(answer)}")
            except RuntimeError:
                return  # the store has ended
        with suppress(RuntimeError):
            store.set(f"left/{rank}", _calls.describe_end())

    thread = threading.Thread(target=answer, name="shardadam.ranks.desync", daemon=True)
    _threads.append((thread, done))
    thread.start()


@atexit.register
def _stop_threads() -> None:
    """Wait for the threads, as Python aborts if it exits during a request to the store."""
    for _, done in _threads:
        done.set()
    for thread, _ in _threads:
        thread.join(timeout=_JOIN_S)
