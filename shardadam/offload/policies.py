# SPDX-License-Identifier: Apache-2.0
"""Where users may keep the state: the classes that they pass as ``offload``. Data only."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class DiskOffload:
    """Keep moments, masters and averages in files; at most two buckets of them are in memory.

    In a step, a thread reads the next bucket's state while this one is updated, and another writes the one before. The
    files bypass the page cache where the file system can (``O_DIRECT``); elsewhere its pages are given back. Results
    are those of state in memory, bit for bit.

    The files have no names: ranks and jobs may share a directory, nothing is left behind when a process ends or is
    killed, and ``df`` shows their size but ``ls`` does not. They are no checkpoint: save one with ``shardadam.save``.

    Args:
        directory: on a local disk of this host, with room for this rank's state, which is allocated at once. May differ
            between ranks, and may be the same for all.
    """

    directory: str | os.PathLike[str] = field(repr=False)  # ranks compare their options by repr
    kind: ClassVar[str] = "disk"

    def check(self) -> None:
        """Raise ValueError if this host has no such directory, or cannot keep state in files."""
        if sys.platform != "linux":
            raise ValueError(f"offload: found DiskOffload on {sys.platform}, expected Linux. Use offload=None.")
        path = Path(self.directory)
        if not path.is_dir():
            raise ValueError(
                f"offload: found no directory {str(path)!r} on this host, expected one. Create it first (mkdir -p), on "
                "each host."
            )
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(
                f"offload: this process may not write to {str(path)!r}, expected a directory that it may write to."
            )


@dataclass(frozen=True, slots=True)
class HostOffload:
    """Keep moments, masters and averages in pinned host memory; two buckets of them are on the GPU.

    In a step, the next bucket's state is copied to the GPU while this one is updated, and the one before back, on
    streams of their own; the host does not wait. Results are those of state on the GPU, bit for bit.
    """

    kind: ClassVar[str] = "host"

    def check(self) -> None:
        """Raise nothing: every host has memory."""


Offload = DiskOffload | HostOffload


def check_offload(offload: object) -> None:
    """Raise TypeError or ValueError unless ``offload`` is None, or can be used on this host."""
    if offload is None:
        return
    if not isinstance(offload, (DiskOffload, HostOffload)):
        raise TypeError(f"offload: found {offload!r}, expected None, HostOffload() or DiskOffload(directory)")
    offload.check()
