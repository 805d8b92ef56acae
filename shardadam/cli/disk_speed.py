# SPDX-License-Identifier: Apache-2.0
"""How fast a disk moves offloaded state: measured in the way that ``DiskOffload`` reads and writes, or given."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from shardadam.cli.errors import CommandError
from shardadam.offload import DiskOffload
from shardadam.offload.files import StateFile, aligned, memory_of
from shardadam.offload.regions import whole_blocks

MOST_BYTES = 2**30
"""The largest file that ``measure`` writes."""

_SECONDS = 1.5
"""Of each of the three measurements, about."""


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Bytes a second.

    Args:
        directory: that was measured; None if ``both`` is given.
        read, write: alone; None if not measured.
        both: read and written together, while both go on.
    """

    both: float
    directory: Path | None = None
    read: float | None = None
    write: float | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """What it costs to read and write the state once in every step.

    Args:
        nbytes: state of one rank.
        ranks: number of ranks that share the disk.
        step_seconds: of a step with the state in memory; None if not known.
    """

    speed: DiskSpeed
    nbytes: int
    ranks: int
    step_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """For the state of all ranks, read and written."""
        return 2 * self.nbytes * self.ranks / self.speed.both

    @property
    def slowdowns(self) -> tuple[float, float] | None:
        """How many times as long a step takes: if all of it is hidden behind moving the state, and if none is."""
        if self.step_seconds is None:
            return None
        return max(1.0, self.seconds / self.step_seconds), 1 + self.seconds / self.step_seconds


def measure(directory: Path, block_bytes: int) -> DiskSpeed:
    """Returns the speed of sequential reads and writes in ``directory``, in a few seconds. Leaves no file behind.

    Args:
        block_bytes: of each read and write.

    Raises:
        CommandError: there is no such directory, or no room.
    """
    try:
        DiskOffload(directory).check()
        block = whole_blocks(block_bytes)
        count = min(MOST_BYTES, shutil.disk_usage(directory).free // 2) // block
        if count < 2:
            raise CommandError(
                f"--measure-disk {directory}: found no room for a file of {4 * block:,} bytes. Make room."
            )
        file = StateFile(directory, count * block)
    except (ValueError, OSError) as error:
        raise CommandError(f"--measure-disk {directory}: {error}") from error
    buffers = [aligned(block, pinned=False) for _ in range(2)]
    into, content = (memory_of(buffer) for buffer in buffers)
    content[:] = os.urandom(block)  # some disks compress

    def write(index: int) -> None:
        file.write(content, index * block)
        if not file.is_direct:
            file.flush(index * block, block)

    def read(index: int) -> None:
        file.read(into, index * block)

    written, write_seconds = _timed(write, range(count))  # what is allocated but not written is not on the disk
    done, read_seconds = _timed(read, range(written))
    half = max(1, written // 2)
    with ThreadPoolExecutor(2) as pool:
        begin = time.perf_counter()
        parts = [pool.submit(_timed, write, cycle(range(half))), pool.submit(_timed, read, cycle(range(half, written)))]
        moved = sum(part.result()[0] for part in parts)
        both_seconds = time.perf_counter() - begin
    return DiskSpeed(
        both=moved * block / both_seconds,
        directory=directory,
        read=done * block / read_seconds,
        write=written * block / write_seconds,
    )


def _timed(move: Callable[[int], None], indices: Iterable[int]) -> tuple[int, float]:
    """Moves blocks for about ``_SECONDS``; returns their number, and the seconds."""
    begin, done = time.perf_counter(), 0
    for index in indices:
        move(index)
        done += 1
        if time.perf_counter() - begin >= _SECONDS:
            break
    return done, time.perf_counter() - begin
