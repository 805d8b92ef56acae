# SPDX-License-Identifier: Apache-2.0
"""Handles SIGTERM: all ranks stop after the same step, in time to save a checkpoint.

torchrun sends SIGTERM to its workers in two cases. If it was itself asked to stop, it kills them after 30 seconds. If a
worker has died and all are to restart, nothing can be saved, and the others exit at once.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from types import FrameType, TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist

LIMIT_S = 25  # for the rest of the step and the checkpoint; torchrun kills after 30 s
REPEATED_S = 2.0  # a signal to a process group reaches a worker twice: directly, and through torchrun


class Preemption:
    """Context manager: on SIGTERM, `requested` returns True on all ranks at the same step; the process does not end.

    Collective: all ranks must enter it. A second SIGTERM, or `LIMIT_S` after the first, ends the process.
    """

    def __init__(self) -> None:
        self.received_at: float | None = None
        self.group: dist.ProcessGroup | None = None
        self.siblings: dict[int, int] = {}  # processes of the same torchrun agent, by rank

    def __enter__(self) -> Preemption:
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo")  # on the CPU, so that no rank waits for a GPU
            everybody: list = [None] * dist.get_world_size()
            dist.all_gather_object(everybody, (socket.gethostname(), os.getppid(), os.getpid()), group=self.group)
            agent = everybody[dist.get_rank()][:2]
            self.siblings = {rank: pid for rank, (*parent, pid) in enumerate(everybody) if tuple(parent) == agent}
        signal.signal(signal.SIGALRM, lambda *_: end(f"not finished {LIMIT_S} s after SIGTERM"))
        signal.signal(signal.SIGTERM, self.receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # A rank that failed after SIGTERM may hang on its way out, waiting for dead ranks.
        signal.alarm(3 if error is not None and self.received_at is not None else 0)

    def receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received_at is None:
            for rank, pid in self.siblings.items():
                if has_ended(pid):
                    end(f"rank {rank} (process {pid}) has ended")
            self.received_at = now
            signal.alarm(LIMIT_S)
        elif now - self.received_at > REPEATED_S:
            end("a second SIGTERM")

    def requested(self) -> bool:
        """Whether any rank has received SIGTERM. Collective: all ranks must call it."""
        received = torch.tensor(self.received_at is not None, dtype=torch.int32)
        if self.group is not None:
            dist.all_reduce(received, op=dist.ReduceOp.MAX, group=self.group)
        if received and self.received_at is None:  # this rank's own SIGTERM may still come
            signal.alarm(LIMIT_S)
        return bool(received)


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def end(why: str) -> NoReturn:
    """Exits from a signal handler. An interrupted save leaves no checkpoint."""
    os.write(2, f"SIGTERM: process {os.getpid()} exits without saving a checkpoint: {why}\n".encode())
    os._exit(128 + signal.SIGTERM)
