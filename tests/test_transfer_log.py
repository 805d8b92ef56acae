# SPDX-License-Identifier: Apache-2.0
"""Over Gloo, ranks that have started different transfers log it long before the timeout of the process group."""

from __future__ import annotations

import logging
import time
import weakref
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from shardadam import ShardedAdamW
from shardadam.ranks import desync, transfer_log
from shardadam.ranks.transfer_log import Started, TransferLog, difference
from shardadam.transport import NcclTransport, ReduceScatter, _connect_collective, nccl
from shardadam.transport.base import Staging
from shardadam.transport.gloo import GlooTransport
from shardadam.transport.groups import comm_groups
from tests.parity import build_parameters, quadratic
from tests.ranks import on_ranks, ranks_of

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


class Group:
    group_name = "a"


def test_logs_are_read_while_others_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error ended the thread that answers status requests, while the main thread built an optimizer."""
    groups = [Group() for _ in range(2)]

    class Interrupted(weakref.WeakKeyDictionary[Any, TransferLog]):
        def items(self) -> Any:
            for pair in super().items():
                yield pair
                transfer_log.log_of(groups[1])  # type: ignore[arg-type]

    monkeypatch.setattr(transfer_log, "_logs", Interrupted())
    transfer_log.log_of(groups[0]).add(SUM, 8)  # type: ignore[arg-type]
    assert transfer_log.started() == {"a": [(1, SUM, 8)]}


@dataclass
class Unfinished:
    """A Work of a backend whose Works are futures: it knows no time limit."""

    limits: list[Any] = field(default_factory=list)

    def is_completed(self) -> bool:
        return bool(self.limits)

    def wait(self, limit: timedelta | None = None) -> None:
        self.limits.append(limit)


def limits_of_waits(backend: str) -> list[Any]:
    transport = _connect_collective(comm_groups(None))  # type: ignore[arg-type]
    assert isinstance(transport, GlooTransport)
    transport._backends = {"cpu": backend}
    work = Unfinished()
    with mock.patch.object(dist, "all_reduce", return_value=work):
        transport.all_reduce(torch.ones(2)).wait()
    transport.close(clean=False)
    return work.limits


@pytest.mark.parametrize(("backend", "expected"), [("gloo", [timedelta(seconds=desync.COMPARE_S)]), ("mpi", [None])])
def test_only_works_of_gloo_are_waited_for_with_a_limit(backend: str, expected: list[Any]) -> None:
    """Works that are futures refuse a limit: ranks asked each other without pause. Others end their transfer."""
    assert on_ranks(2, limits_of_waits, backend) == [expected] * 2


def test_nccl_notes_every_transfer_that_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    transport: Any = object.__new__(NcclTransport)
    transport._log, transport._group, transport._exact_sums = TransferLog(), None, False
    transport.rank, transport.world_size = 0, 2
    transport._streams = mock.MagicMock()
    for module, names in ((nccl, ("_all_gather", "_reduce_scatter", "OnStream")), (dist, ("all_reduce", "broadcast"))):
        for name in names:
            monkeypatch.setattr(module, name, mock.Mock())
    staging = Staging(torch.ones(6), None)
    transport.reduce_scatter(ReduceScatter(staging, 4, torch.zeros(2), scale=1.0, accumulate=False))
    transport.all_gather(torch.ones(8))
    transport.all_reduce(torch.ones(3))
    transport.broadcast(torch.ones(5))
    assert transport._log.last() == [(1, SUM, 16), (2, GATHER, 32), (3, "all-reduce", 12), (4, "broadcast", 20)]


def asks_others() -> bool:
    desync.register({})
    with mock.patch.object(desync.DesyncReporter, "difference", return_value="a difference"):
        return desync.log_difference([0, 1, 2])


def test_two_ranks_of_a_group_ask_the_others() -> None:
    """All of them did, and each request is answered by all."""
    assert on_ranks(3, asks_others) == [True, True, False]


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
