# SPDX-License-Identifier: Apache-2.0
"""A hang of transfers on a CUDA stream is logged once, before the backend's timeout.

On the CPU, a count that comes late or never stands for the stream.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shardadam.ranks import desync
from shardadam.transport.watchdog import Watchdog

pytestmark = pytest.mark.quiet

LIMIT_S = 0.5


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    watchdog = Watchdog(torch.device("cpu"), LIMIT_S, lambda: "rank 1: has ended", lambda: False)
    yield watchdog
    watchdog.close()


def hang(watchdog: Any) -> None:
    """Do what the host does for a step whose transfers hang: the device's count stays behind."""
    watchdog._expected += 1


def count_logged(caplog: pytest.LogCaptureFixture) -> int:
    return sum("are not complete after" in record.message for record in caplog.records)


def test_a_hang_is_logged_once_and_before_the_timeout(watchdog: Watchdog, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "shardadam"):
        watchdog.expect_progress()
        hang(watchdog)
        start = time.monotonic()
        while not count_logged(caplog):
            assert time.monotonic() - start < 10
            time.sleep(0.01)
        assert time.monotonic() - start > 0.7 * LIMIT_S
        time.sleep(2 * LIMIT_S)
    assert count_logged(caplog) == 1
    message = caplog.records[0].message
    assert "ends this process after 0 s" in message and "rank 1: has ended" in message


def test_neither_complete_transfers_nor_pauses_between_steps_are_logged(
    watchdog: Watchdog, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "shardadam"):
        for pause in (0.1, 0.1, 2 * LIMIT_S, 0.1):
            watchdog.expect_progress()
            time.sleep(pause)
    assert count_logged(caplog) == 0


def test_a_hang_after_replays_of_a_cuda_graph_is_logged(watchdog: Any, caplog: pytest.LogCaptureFixture) -> None:
    watchdog.expect_progress()
    watchdog._on_device.add_(5)
    watchdog._on_host.copy_(watchdog._on_device)
    with caplog.at_level(logging.ERROR, "shardadam"):
        time.sleep(2 * LIMIT_S)
        assert count_logged(caplog) == 0
        watchdog.expect_progress()
        hang(watchdog)
        time.sleep(3 * LIMIT_S)
    assert count_logged(caplog) == 1


def test_ranks_compare_their_transfers_long_before_the_timeout(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(desync, "COMPARE_S", 0.1)
    compared: list[float] = []

    def compare() -> bool:
        compared.append(time.monotonic())
        return len(compared) == 2

    watchdog = Watchdog(torch.device("cpu"), 20 * LIMIT_S, lambda: "", compare)
    try:
        watchdog.expect_progress()
        time.sleep(2 * LIMIT_S)
        assert not compared
        hang(watchdog)
        with caplog.at_level(logging.ERROR, "shardadam"):
            time.sleep(4 * LIMIT_S)
        assert len(compared) == 2  # until a difference is found, and logged
        assert count_logged(caplog) == 0
    finally:
        watchdog.close()


def test_close_ends_the_thread() -> None:
    before = set(threading.enumerate())
    watchdog = Watchdog(torch.device("cpu"), LIMIT_S, lambda: "", lambda: False)
    (thread,) = set(threading.enumerate()) - before
    assert thread.is_alive()
    watchdog.close()
    thread.join(10)
    assert not thread.is_alive()
