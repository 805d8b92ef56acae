# SPDX-License-Identifier: Apache-2.0
"""Logs the status of all ranks when transfers on a CUDA stream hang.

The host does not wait for these transfers, so it cannot raise an error when a rank is missing. NCCL ends the process
after its timeout; the log message comes before that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shardadam.ranks import desync

_SHARE = 0.8  # of the backend's timeout: log before the backend ends the process
_log = logging.getLogger("shardadam")


class Watchdog:
    """A thread that checks that the device catches up with the host.

    Note: the device counts
        The thread must not call CUDA: that would invalidate a CUDA graph capture of the user's. So the stream itself
        counts, and copies its count to pinned host memory.

    Note: one stream
        Build it, and call ``expect_progress``, with the watched stream as the current one, to which its memory belongs.

    Args:
        device: of the watched stream.
        limit_s: the backend's timeout, in seconds.
        report: returns the status of all ranks, for the log message.
        compare: logs it if ranks have started different transfers; returns whether they have.
    """

    def __init__(
        self, device: torch.device, limit_s: float, report: Callable[[], str], compare: Callable[[], bool]
    ) -> None:
        self._limit_s = limit_s
        self._report = report
        self._compare = compare
        self._on_device = torch.zeros((), dtype=torch.int64, device=device)
        self._on_host: Tensor = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu")
        self._expected = 0  # the count once the device has done all work that was enqueued
        self._done = threading.Event()
        threading.Thread(target=self._watch, name="shardadam.watchdog", daemon=True).start()

    def expect_progress(self) -> None:
        """Expect the current stream to complete all work that it holds now, within the limit."""
        # A replayed CUDA graph counts on the device only, so its count may be ahead of the host's.
        if not (self._on_device.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._expected = max(self._expected, int(self._on_host)) + 1
        self._on_device.add_(1)
        self._on_host.copy_(self._on_device, non_blocking=True)

    def close(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        last_count, progress_at = 0, time.monotonic()
        compare_at = progress_at + desync.COMPARE_S
        has_logged = False
        while not self._done.wait(min(1.0, self._limit_s / 20)):
            now, count = time.monotonic(), int(self._on_host)
            if count != last_count or count >= self._expected:
                last_count, progress_at, has_logged = count, now, False
                compare_at = now + desync.COMPARE_S
            elif now > compare_at and not has_logged:
                has_logged = self._compare()
                compare_at = now + desync.COMPARE_S
            elif now - progress_at > _SHARE * self._limit_s and not has_logged:
                has_logged = True
                _log.error(
                    "The transfers of a step are not complete after %.0f s; the backend ends this process after %.0f s "
                    "(the timeout of init_process_group).\n%s",
                    now - progress_at,
                    self._limit_s,
                    self._report(),
                )
