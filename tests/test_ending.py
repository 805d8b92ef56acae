# SPDX-License-Identifier: Apache-2.0
"""A rank of a launch script that fails ends at once, with its own traceback and status, although
``destroy_process_group`` would hang, as it can on NCCL, and Gloo aborts at exit without it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DEADLINE_S = 100.0

SCRIPT = """
import atexit, os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
sys.path.insert(0, "launch")
from rendezvous import destroyed_on_success
from shardadam import ShardedAdamW

fails, store, rank = sys.argv[1] == "fails", sys.argv[2], int(sys.argv[3])
destroy = dist.destroy_process_group
def destroy_as_nccl():
    print("destroys the process group")
    if fails:
        time.sleep(1000)
    destroy()
dist.destroy_process_group = destroy_as_nccl

dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=30))
with destroyed_on_success():
    atexit.register(print, "an exit handler runs")
    model = torch.nn.Linear(4, 2)
    optimizer = ShardedAdamW(model.parameters())
    for step in range(3):
        model(torch.ones(1, 4)).sum().backward()
        if fails and step == 1 and rank == 1:
            raise ArithmeticError("this rank has found a loss of NaN")
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.scripts
@pytest.mark.parametrize("how", ["fails", "succeeds"])
def test_a_rank_that_fails_ends_with_its_own_traceback_and_status(how: str, tmp_path: Path) -> None:
    """In ``finally``, ``destroy_process_group`` waited for the other ranks."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, how, str(tmp_path / "store"), str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=DEADLINE_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    status = int(how == "fails")
    assert [rank.returncode for rank in ranks] == [status, status], outputs
    for out, errors in outputs:
        assert ("destroys the process group" in out) == (how == "succeeds")
        assert "an exit handler runs" in out
        assert "terminate called" not in errors
    (_, errors), (_, errors_of_failed) = outputs
    if how == "fails":
        assert "Traceback" in errors_of_failed and "this rank has found a loss of NaN" in errors_of_failed
        assert "RankDesyncError" in errors and "rank 1: has ended" in errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (SystemExit(), 0),
        (SystemExit(0), 0),
        (SystemExit(7), 7),
        (SystemExit("a message"), 1),
        (KeyboardInterrupt(), 130),
        (ValueError(), 1),
    ],
)
def test_a_block_that_raises_ends_with_pythons_status(
    error: BaseException | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    rendezvous = importlib.import_module("rendezvous")
    handlers: list[Callable[[], None]] = []
    calls: list[Any] = []
    monkeypatch.setattr(rendezvous.atexit, "register", handlers.append)
    monkeypatch.setattr(rendezvous.os, "_exit", calls.append)
    monkeypatch.setattr(rendezvous.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(rendezvous.dist, "destroy_process_group", lambda: calls.append("destroyed"))
    with suppress(BaseException), rendezvous.destroyed_on_success():
        if error is not None:
            raise error
    for handler in handlers:
        handler()
    assert calls == ([status] if status else ["destroyed"])


def test_a_process_without_a_process_group_ends_as_its_caller_decides() -> None:
    """A caller of a launch script's ``run`` that had handled its error ended, at its exit, with the error's status."""
    code = """
import sys
sys.path.insert(0, "launch")
from rendezvous import destroyed_on_success

try:
    with destroyed_on_success():
        sys.exit(2)
except SystemExit:
    print("handled")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr
