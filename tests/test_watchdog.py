# SPDX-License-Identifier: Apache-2.0
"""Transfers on a device's stream that do not come to an end are told of before the backend's timeout, once each time.

On the CPU a "stream" here is a count that comes late, or not at all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shardadam.transport.watchdog import Watchdog

LIMIT_S = 0.5


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watching = Watchdog(torch.device("cpu"), LIMIT_S, lambda: "rank 1: has ended")
    yield watching
    watching.close()


def start_without_an_end(watchdog: Any) -> None:
    """What the host does for a step whose transfers hang: the count on the device stays behind."""
    watchdog._started += 1


def told(caplog: pytest.LogCaptureFixture) -> int:
    return sum("have not come to an end" in record.message for record in caplog.records)


def test_what_does_not_end_is_told_once_and_before_the_timeout(
    watchdog: Watchdog, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "shardadam"):
        watchdog.started()
        start_without_an_end(watchdog)
        start = time.monotonic()
        while not told(caplog):
            assert time.monotonic() - start < 10
            time.sleep(0.01)
        assert time.monotonic() - start > 0.7 * LIMIT_S
        time.sleep(2 * LIMIT_S)
    assert told(caplog) == 1
    assert "gives up after 0 s" in caplog.records[0].message and "rank 1: has ended" in caplog.records[0].message


def test_what_ends_is_not_told_nor_is_a_pause_between_steps(
    watchdog: Watchdog, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "shardadam"):
        for pause in (0.1, 0.1, 2 * LIMIT_S, 0.1):
            watchdog.started()
            time.sleep(pause)
    assert told(caplog) == 0


def test_replays_that_only_the_device_counts_hide_nothing_that_comes_after(
    watchdog: Any, caplog: pytest.LogCaptureFixture
) -> None:
    watchdog.started()
    watchdog._on_device.add_(5)
    watchdog._on_host.copy_(watchdog._on_device)
    with caplog.at_level(logging.ERROR, "shardadam"):
        time.sleep(2 * LIMIT_S)
        assert told(caplog) == 0
        watchdog.started()
        start_without_an_end(watchdog)
        time.sleep(3 * LIMIT_S)
    assert told(caplog) == 1


def test_its_thread_ends_with_it() -> None:
    before = set(threading.enumerate())
    watching = Watchdog(torch.device("cpu"), LIMIT_S, lambda: "")
    (thread,) = set(threading.enumerate()) - before
    assert thread.is_alive()
    watching.close()
    thread.join(10)
    assert not thread.is_alive()
