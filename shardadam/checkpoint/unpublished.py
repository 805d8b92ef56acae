# SPDX-License-Identifier: Apache-2.0
"""A checkpoint while it is written: a directory ``.saving-NAME.TOKEN``. Tells saves that go on from what crashes left.

Note: whose save it is, and whether it goes on
    Each save has a token, so two jobs that save into one directory never write into the same files. The token names
    the process that saves (rank 0): its id, its start, and the machine whose process ids those are. On this machine, a
    save whose process has ended is known to be dead at once. Of a process elsewhere only signs of life are seen: it
    touches the file ``alive`` once a second. If the file changes while it is watched, the save goes on. If it has not
    changed for minutes either, by the clock of the file system, the save is dead.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

from shardadam.checkpoint.disk import on_disk
from shardadam.checkpoint.files import CheckpointError

SAVING, DELETING = ".saving-", ".deleting-"
ALIVE = "alive"
BEAT_S = 1.0
WATCH_S = 5.0
"""How long to watch for a sign of life. Longer than a file system may keep it from other machines."""
RECENT_S = 30.0
"""How new a sign of life of a process of this machine must be to be believed without a further one."""
DEAD_S = 300.0
"""How long a save on another machine must have shown no sign of life before what it wrote is removed."""
_TRIES = 3

_TOKEN = re.compile(r"(\d+)-(\d+)-([0-9a-f]{8})-[0-9a-f]{8}")
_going_on: set[str] = set()
"""Tokens of the saves of this process that go on."""


@dataclass(slots=True)
class Unpublished:
    """A checkpoint that rank 0 of this job writes. ``path``: where it lies until it is published."""

    directory: Path
    name: str
    token: str = field(default_factory=lambda: _new_token())
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def path(self) -> Path:
        return self.directory / f"{SAVING}{self.name}.{self.token}"

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "token": self.token}

    def create(self) -> None:
        """Creates the directory, and shows signs of life until ``end`` is called, or this process ends."""
        _going_on.add(self.token)
        try:
            on_disk(f"creating {self.path}", self._create)
        except BaseException:
            self.discard()
            raise
        threading.Thread(target=self._show_life, name="shardadam.alive", daemon=True).start()

    def _create(self) -> None:
        self.path.mkdir()
        (self.path / ALIVE).write_text(f"process {os.getpid()} on {socket.gethostname()}")

    def end(self) -> None:
        """Shows no more signs of life."""
        self._ended.set()
        _going_on.discard(self.token)
        with suppress(OSError):
            on_disk(f"removing {self.path / ALIVE}", (self.path / ALIVE).unlink)

    def discard(self) -> None:
        """Removes the directory. If that fails, the next save does it."""
        self.end()
        with suppress(OSError):
            on_disk(f"removing {self.path}", shutil.rmtree, self.path, True)

    def _show_life(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):  # the next write finds out what is wrong
                os.utime(self.path / ALIVE)


def create_alone(directory: Path, name: str) -> Unpublished:
    """Creates an empty, unpublished checkpoint while no other job saves into ``directory``.

    Renames what dead saves have left to ``.deleting-NAME.TOKEN``; touches nothing of a save that goes on.

    Raises:
        CheckpointError: another job saves into the directory.
    """
    for attempt in range(_TRIES):
        if attempt > 0:
            time.sleep(random.uniform(0.0, 0.5))
        other, silent = _other_saves(directory, known=())
        if other is not None:
            break
        mine = Unpublished(directory, name)
        mine.create()
        try:
            other, _ = _other_saves(directory, known=(mine.path, *silent))
            if other is None:
                _set_long_silent_aside(silent, mine)
                return mine
        except BaseException:
            mine.discard()
            raise
        # Two jobs that begin at the same moment see each other: both withdraw, and try again at different moments.
        mine.discard()
    assert other is not None
    writer = on_disk(f"reading {other / ALIVE}", _writer_of, other)
    raise CheckpointError(
        f"another job saves into {directory}: {writer}. Two jobs must not save into one directory. End one of them, or "
        "give each a directory of its own."
    )


def _other_saves(directory: Path, *, known: Collection[Path]) -> tuple[Path | None, dict[Path, int]]:
    """Looks for other saves than the ``known`` ones; sets those aside whose processes have ended.

    Returns:
        One that goes on, or None; those that show no sign of life while they are watched, and their last sign.
    """
    found = on_disk(f"looking into {directory}", lambda: list(directory.glob(f"{SAVING}*")))
    silent = _signs_of(path for path in found if path not in known)
    for path, sign in list(silent.items()):
        gone = _is_gone(path)
        if gone:
            _set_aside(path)
            del silent[path]
        elif gone is False and abs(time.time() - sign / 1e9) < RECENT_S:
            return path, {}
    until = time.monotonic() + WATCH_S
    while silent and time.monotonic() < until:
        time.sleep(0.02)
        before, silent = silent, _signs_of(silent)
        for path, sign in silent.items():
            if sign != before[path]:
                return path, {}
    return None, silent


def _signs_of(paths: Iterable[Path]) -> dict[Path, int]:
    """Returns the last signs of life of saves, without those that have been published, or given up."""
    signs = ((path, on_disk(f"reading {path / ALIVE}", _last_sign, path)) for path in paths)
    return {path: sign for path, sign in signs if sign is not None}


def _set_long_silent_aside(silent: Mapping[Path, int], mine: Unpublished) -> None:
    if silent:
        now = _signs_of([mine.path])[mine.path]
        for path, sign in silent.items():
            if now - sign > DEAD_S * 1e9 and _is_gone(path) is None:
                _set_aside(path)


def _writer_of(path: Path) -> str:
    name = path.name.removeprefix(SAVING).partition(".")[0]
    with suppress(OSError, ValueError), _open_alive(path) as file:
        writer = file.read(200).decode()
        if writer.isprintable():
            return f"{writer} is writing {name}"
    return f"{name} is being written"


def _open_alive(path: Path) -> BinaryIO:
    # A network file system asks its server when a file is opened.
    descriptor = os.open(path / ALIVE, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    return open(descriptor, "rb")


def _last_sign(path: Path) -> int | None:
    """Returns when a save last showed a sign of life, in nanoseconds, or None if it is not there any more."""
    with suppress(OSError), _open_alive(path) as file:
        return os.fstat(file.fileno()).st_mtime_ns
    with suppress(OSError):
        return os.lstat(path).st_mtime_ns
    return None


def _set_aside(path: Path) -> None:
    with suppress(OSError):  # another job has done it, or it stays
        on_disk(f"renaming {path}", os.rename, path, path.with_name(DELETING + path.name.removeprefix(SAVING)))


# Processes


def _new_token() -> str:
    return f"{os.getpid()}-{_started(os.getpid()) or 0}-{_machine()}-{random.SystemRandom().getrandbits(32):08x}"


def _is_gone(path: Path) -> bool | None:
    """Returns whether the process that wrote it has ended, or has ended that save; None if that is unknown."""
    token = path.name.rpartition(".")[2]
    match = _TOKEN.fullmatch(token)
    if match is None or match[3] != _machine():
        return None
    pid, started = int(match[1]), int(match[2])
    if pid == os.getpid() and started == (_started(pid) or 0):
        return token not in _going_on
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # it is another user's
        return False
    return _started(pid) not in (started, None)


def _started(pid: int) -> int | None:
    """Returns when a process has started, in ticks since the machine has; -1 if it has ended; None if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return -1 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


@cache
def _machine() -> str:
    """Returns a name of the machine, or container, in which process ids are those of this process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        ids = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot, ids = "", uuid.uuid4().hex
    return f"{zlib.crc32((boot + ids).encode()):08x}"
