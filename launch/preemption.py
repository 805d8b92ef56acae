# SPDX-License-Identifier: Apache-2.0
"""SIGTERM as a request: all ranks finish the same step, and there is time for a checkpoint.

torchrun sends SIGTERM to its workers for two reasons: it has been told to end itself, and then gives them 30 seconds;
or one of them has died and the others are to start again. Then nothing can be saved, and a rank ends at once.
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

LIMIT_S = 25  # for the rest of the step and the checkpoint; after 30 s torchrun kills
REPEATED_S = 2.0  # who signals a whole process group reaches a worker twice, by way of torchrun too


class Preemption:
    """Inside `with`, SIGTERM does not end the process but is told by `agreed`, at the same step on all ranks.

    Collective. A second SIGTERM, or `LIMIT_S` after the first, ends the process all the same.
    """

    def __init__(self) -> None:
        self.told_at: float | None = None
        self.group: dist.ProcessGroup | None = None
        self.siblings: dict[int, int] = {}  # processes that the same agent has started, by rank

    def __enter__(self) -> Preemption:
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo")  # on the CPU: a GPU is not waited for
            everybody: list = [None] * dist.get_world_size()
            dist.all_gather_object(everybody, (socket.gethostname(), os.getppid(), os.getpid()), group=self.group)
            agent = everybody[dist.get_rank()][:2]
            self.siblings = {rank: pid for rank, (*parent, pid) in enumerate(everybody) if tuple(parent) == agent}
        signal.signal(signal.SIGALRM, lambda *_: end(f"not done {LIMIT_S} s after SIGTERM"))
        signal.signal(signal.SIGTERM, self.told)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # A rank that failed may wait for dead ones on its way out, and SIGTERM has already come.
        signal.alarm(3 if error is not None and self.told_at is not None else 0)

    def told(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.told_at is None:
            for rank, pid in self.siblings.items():
                if has_ended(pid):
                    end(f"rank {rank} (process {pid}) has ended before")
            self.told_at = now
            signal.alarm(LIMIT_S)
        elif now - self.told_at > REPEATED_S:
            end("a second SIGTERM")

    def agreed(self) -> bool:
        """Collective: whether any rank has been told to end."""
        told = torch.tensor(self.told_at is not None, dtype=torch.int32)
        if self.group is not None:
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self.group)
        if told and self.told_at is None:  # this rank's own SIGTERM may still come
            signal.alarm(LIMIT_S)
        return bool(told)


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def end(why: str) -> NoReturn:
    """From a signal handler, whatever this rank is in the middle of: a save that is not whole does not count."""
    os.write(2, f"SIGTERM ends process {os.getpid()} at once, without another checkpoint: {why}\n".encode())
    os._exit(128 + signal.SIGTERM)
