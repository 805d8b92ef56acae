# SPDX-License-Identifier: Apache-2.0
"""What runs on a device's stream blocks no host that could raise an error when a rank does not come; the backend ends
the process when its timeout is over. A while before that, a thread says where the ranks stand.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

_SHARE = 0.8  # of the backend's timeout: the report must be there before that is over
_log = logging.getLogger("shardadam")


class Watchdog:
    """
    Note: who counts
        The thread must not ask the device: a capture that the user runs meanwhile would be broken off. So the stream
        itself counts, and copies its count to where the host can read it.

    Args:
        limit_s: the backend's timeout, in seconds.
        report: tells where the ranks stand.
    """

    def __init__(self, device: torch.device, limit_s: float, report: Callable[[], str]) -> None:
        self._limit_s = limit_s
        self._report = report
        self._on_device = torch.zeros((), dtype=torch.int64, device=device)
        self._on_host: Tensor = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._started = 0  # how far the count on the device will come
        self._done = threading.Event()
        threading.Thread(target=self._watch, name="shardadam.watchdog", daemon=True).start()

    def started(self) -> None:
        """What the current stream holds now is to come to an end. A replay of a CUDA graph counts on the device alone,
        which is no reason for an alarm.
        """
        if not (self._on_device.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._started = max(self._started, int(self._on_host)) + 1
        self._on_device.add_(1)
        self._on_host.copy_(self._on_device, non_blocking=True)

    def close(self) -> None:
        self._done.set()

    def _watch(self) -> None:
        ended, since = 0, time.monotonic()
        has_told = False
        while not self._done.wait(min(1.0, self._limit_s / 20)):
            now, count = time.monotonic(), int(self._on_host)
            if count != ended or count >= self._started:
                ended, since, has_told = count, now, False
            elif now - since > _SHARE * self._limit_s and not has_told:
                has_told = True
                _log.error(
                    "The transfers of a step have not come to an end for %.0f s; the backend gives up after %.0f s "
                    "(the timeout of init_process_group).\n%s",
                    now - since,
                    self._limit_s,
                    self._report(),
                )
