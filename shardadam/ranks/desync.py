# SPDX-License-Identifier: Apache-2.0
"""Where does every rank stand? Asked when one of them does not come, and answered by a thread of each, whatever the
main one is doing: in which collective call it is, or where in the user's code. Nothing here takes part in training.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import sys
import sysconfig
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

_PERIOD_S = 0.25
_PATIENCE_S = 2.0
_STORE_TIMEOUT_S = 5.0
_MOST_NAMED = 16
_LIBRARIES = tuple(
    str(Path(folder).resolve()) + os.sep
    for folder in (Path(__file__).parent, Path(torch.__file__).parent, sysconfig.get_path("stdlib"))
)


class RankDesyncError(RuntimeError):
    """A rank has ended, has raised, or makes other calls than this one; the message says which and where all stand.

    What was under way on this rank is not complete, and the ranks cannot go on together: start again, from the last
    checkpoint.
    """


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """Where a rank runs. ``world``: equal for two processes that see each other's numbers."""

    host: str
    pid: int
    world: str

    @staticmethod
    def here() -> ProcessInfo:
        return ProcessInfo(socket.gethostname(), os.getpid(), _pid_world())

    def has_ended(self) -> bool:
        """Whether it is known to have: it ran beside this process, and does not any more."""
        if not self.world or self.world != _pid_world():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in "ZX"


def _pid_world() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


class DesyncReporter:
    """All ranks of the default process group, of which reports are asked for some.

    Note: a question and its answers
        A question is a number in the store that the ranks met by at the beginning; every rank answers the newest,
        under a key of its own. A thread looks for questions four times a second (less often where there are thousands
        of ranks). It has a connection of its own: the main thread may block the other.
    """

    def __init__(self, store: dist.distributed_c10d.Store, rank: int, world_size: int) -> None:
        self.processes: dict[int, ProcessInfo] = {}  # by rank, as far as they are known
        self._rank = rank
        self._store = clone_of(store)
        if self._store is None:
            return
        self._store.set_timeout(timedelta(seconds=_STORE_TIMEOUT_S))
        _answer_in_background(self._store, rank, _PERIOD_S * max(1.0, world_size / 1000))

    def report(self, ranks: Sequence[int]) -> str:
        # In a thread, as a store whose host is cut off may keep a question for ever.
        answer: list[dict[int, str] | None] = []
        thread = threading.Thread(target=lambda: answer.append(self._ask(ranks)), daemon=True)
        thread.start()
        thread.join(_PATIENCE_S + 1)
        told = answer[0] if answer else None
        if told is None:
            why = (
                "the store by which they met cannot be asked from a thread of its own"
                if self._store is None
                else "the store by which they met cannot be reached; the process that holds it (rank 0, or torchrun's "
                "agent there) has ended, or its host is cut off"
            )
            who = ", ".join(self._name(rank) for rank in ranks[:_MOST_NAMED])
            return f"Where the ranks stand is not known: {why}. They are: {who}."
        silent = [rank for rank in ranks if told.setdefault(rank, _SILENT) in (_SILENT, _ENDED)]
        shown = sorted(told, key=lambda rank: (rank not in silent, rank != self._rank, rank))
        lines = [f"  {self._name(rank)}: {told[rank]}" for rank in shown[:_MOST_NAMED]]
        if len(shown) > _MOST_NAMED:
            lines.append(f"  and {len(shown) - _MOST_NAMED} more")
        remedy = (
            "See their own output: what ended or keeps them comes first."
            if silent
            else "All ranks must make the same calls in the same order; see what made them part."
        )
        return "\n".join(["Where the ranks stand:", *lines, remedy])

    def _name(self, rank: int) -> str:
        hosts = {process.host for process in self.processes.values()}
        host = f" on {self.processes[rank].host}" if len(hosts) > 1 and rank in self.processes else ""
        return f"rank {rank}{host}{' (this one)' if rank == self._rank else ''}"

    def _ask(self, ranks: Sequence[int]) -> dict[int, str] | None:
        """What they answer, and which have ended; None where there is no way to ask."""
        if self._store is None:
            return None
        told = {self._rank: _progress.describe()}
        try:
            question = self._store.add("questions", 1)
            self._store.set(f"question/{question}", "?")
            deadline = time.monotonic() + _PATIENCE_S
            while True:
                for rank in ranks:
                    if rank in told:
                        continue
                    if (text := _answer_of(self._store, rank, question)) is not None:
                        told[rank] = text
                    elif rank in self.processes and self.processes[rank].has_ended():
                        told[rank] = _ENDED
                if len(told) == len(ranks) or time.monotonic() > deadline:
                    return told
                time.sleep(0.05)
        except RuntimeError:  # dist.DistError is one
            return None


def clone_of(store: dist.distributed_c10d.Store) -> dist.distributed_c10d.Store | None:
    """The same by a connection of its own; None where it is of a kind that cannot be cloned."""
    try:
        clone: dist.distributed_c10d.Store = store.clone()  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        return None
    return clone


_ENDED = "has ended"
_SILENT = "does not answer: it has ended, is stopped, or cannot be reached"


def _answer_of(store: dist.distributed_c10d.Store, rank: int, question: int) -> str | None:
    key = f"answer/{rank}"
    if not store.check([key]):
        return None
    number, _, text = bytes(store.get(key)).decode().partition(" ")
    return text if int(number) >= question else None


# This rank

_worlds: weakref.WeakKeyDictionary[dist.ProcessGroup, DesyncReporter] = weakref.WeakKeyDictionary()


def register(processes: Mapping[int, ProcessInfo]) -> None:
    """From now on this rank answers. Local; torch.distributed is initialised.

    Args:
        processes: where some of the ranks run.
    """
    world: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    if world not in _worlds:
        # torch tells the store to nobody but its own modules.
        everybodys = dist.distributed_c10d._get_default_store()
        store = dist.distributed_c10d.PrefixStore("shardadam/desync", everybodys)
        _worlds[world] = DesyncReporter(store, dist.get_rank(), dist.get_world_size())
    _worlds[world].processes.update(processes)


def desync_error(what: str, error: RuntimeError, group: dist.ProcessGroup) -> RankDesyncError:
    """The error to raise where a transfer in ``group`` has failed; asks its ranks where they stand. Local.

    Args:
        what: what failed.
        error: of the backend.
    """
    how = re.sub(r"\[[^\]]*/gloo/[^\]]*\] ", "", str(error))  # processes in its sources
    limit = " (the limit is the timeout of init_process_group)" if "imed out" in how else ""
    return RankDesyncError(f"{what} has failed: {how}{limit}\n{report(dist.get_process_group_ranks(group))}")


def report(ranks: Sequence[int]) -> str:
    """Where ``ranks`` stand, in a line for each. Takes up to two seconds where one does not answer. Local."""
    world = dist.group.WORLD if dist.is_initialized() else None
    if world is None or world not in _worlds:
        return "Where the ranks stand is not known: torch.distributed is not initialised any more."
    return _worlds[world].report(ranks)


class _Progress:
    """Where the main thread of this process stands."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, int, float]] = []  # that it is in: name, how-manieth, since when
        self._last: tuple[str, int, float] | None = None  # that it has completed
        self._counts: Counter[str] = Counter()

    @contextmanager
    def in_call(self, call: str) -> Iterator[None]:
        self._counts[call] += 1
        self._calls.append((call, self._counts[call], time.monotonic()))
        try:
            yield
        finally:
            name, number, _ = self._calls.pop()
            self._last = (name, number, time.monotonic())

    def describe(self) -> str:
        place = _place_in_users_code()
        where = f", at {place}" if place else ""
        now = time.monotonic()
        if self._calls:
            name, number, since = self._calls[0]
            return f"in call {number} of {name}() for {now - since:.1f} s{where}"
        if self._last is None:
            return f"has made no call that all ranks must make{where}"
        name, number, since = self._last
        return f"after call {number} of {name}(), which was {now - since:.1f} s ago{where}"


_progress = _Progress()


def in_call(call: str) -> AbstractContextManager[None]:
    """What is inside is a call that all ranks must make; this rank is known to be in it."""
    return _progress.in_call(call)


def _place_in_users_code() -> str | None:
    """``train.py:57 in main``: where the main thread is, or from where it has called libraries."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(("<", *_LIBRARIES)) and "site-packages" not in path:
            return f"{os.path.basename(path)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return None


# The thread

_threads: list[tuple[threading.Thread, threading.Event]] = []


def _answer_in_background(store: dist.distributed_c10d.Store, rank: int, period_s: float) -> None:
    done = threading.Event()

    def answer() -> None:
        seen = 0
        while not done.wait(period_s) and dist.is_initialized():
            try:
                before = seen
                while store.check([f"question/{seen + 1}"]):
                    seen += 1
                if seen > before:
                    store.set(f"answer/{rank}", f"{seen} {_progress.describe()}")
            except RuntimeError:
                return  # the store has ended, and soon this process will

    thread = threading.Thread(target=answer, name="shardadam.ranks.desync", daemon=True)
    _threads.append((thread, done))
    thread.start()


@atexit.register
def _stop_threads() -> None:
    """One that is in the middle of a request would abort the interpreter's end."""
    for _, done in _threads:
        done.set()
    for thread, _ in _threads:
        thread.join(timeout=_STORE_TIMEOUT_S)
