# SPDX-License-Identifier: Apache-2.0
"""Over Gloo, ranks that have started different transfers log it long before the timeout of the process group."""

from __future__ import annotations

import logging
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from shardadam import ShardedAdamW
from shardadam.ranks import desync
from shardadam.ranks.transfer_log import Started, TransferLog, difference
from tests.parity import build_parameters, quadratic
from tests.ranks import ranks_of

GATHER, SUM = "all-gather", "reduce-scatter"


def started(*transfers: tuple[int, str, int]) -> Started:
    return {"a": transfers}


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (started(), started((1, SUM, 8)), None),
        (started((1, SUM, 8)), {}, None),
        (started((1, SUM, 8)), {"b": [(1, GATHER, 8)]}, None),
        (started((1, SUM, 8), (2, GATHER, 8)), started((1, SUM, 8)), None),
        (started((1, SUM, 8), (2, GATHER, 8)), started((2, GATHER, 8), (3, SUM, 8)), None),
        (started((1, SUM, 8), (2, SUM, 8)), started((1, SUM, 8), (2, GATHER, 8)), (SUM, 8, GATHER, 8)),
        (started((1, SUM, 8)), started((1, SUM, 1200)), (SUM, 8, SUM, 1200)),
    ],
)
def test_only_transfers_of_one_number_are_compared(
    mine: Started, theirs: Started, expected: tuple[str, int, str, int] | None
) -> None:
    found = difference(mine, theirs)
    if expected is None:
        assert found is None
    else:
        articles = {GATHER: "an all-gather", SUM: "a reduce-scatter"}
        operation, nbytes, other, other_nbytes = expected
        assert found == (f"{articles[operation]} of {nbytes:,} bytes", f"{articles[other]} of {other_nbytes:,} bytes")


def test_the_log_keeps_the_last_transfers_with_their_numbers() -> None:
    log = TransferLog()
    for nbytes in range(100):
        log.add(SUM, nbytes)
    assert log.last()[-2:] == [(99, SUM, 98), (100, SUM, 99)]
    assert len(log.last()) < 100


def gather_alone(rank: int, pipe: Connection) -> None:
    """Rank 1 asks for the state, rank 0 goes on. Sends what it logs."""
    desync.COMPARE_S = 0.3
    handler = logging.Handler()
    handler.emit = lambda record: pipe.send(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardadam").addHandler(handler)
    parameters = build_parameters()
    optimizer = ShardedAdamW(parameters, lr=1e-2, transport="collective")
    for step in range(2):
        quadratic(parameters, rank, step).backward()
        optimizer.step()
        time.sleep(1.0 * (rank == 1))  # rank 0 waits and compares; nothing is wrong
    if rank == 1:
        optimizer.full_state_dict()
    else:
        quadratic(parameters, rank, 3).backward()
        optimizer.step()


@pytest.mark.quiet
def test_over_gloo_a_call_on_one_rank_is_logged_long_before_the_timeout(tmp_path: Path) -> None:
    with ranks_of(2, tmp_path / "store", gather_alone, timeout_s=600) as ranks:
        message = ranks.hear(0)
        assert not ranks.pipes[0].poll(1.0)  # it logs once
    assert message.startswith("rank 1 has started an all-gather of ")
    assert "but rank 0 (this one) a reduce-scatter of " in message
    assert "have made different calls" in message
    assert "rank 1: in call 1 of full_state_dict()" in message
    assert "full_state_dict() is collective: call it on all ranks" in message
