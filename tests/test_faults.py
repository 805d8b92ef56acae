# SPDX-License-Identifier: Apache-2.0
"""If one rank does something else than the others, every rank raises within the process group's timeout; the error
names the rank and its call, and no rank writes an update that the others do not.

Each fault has its own processes, because it leaves unusable process groups behind. The faults of a test run at the same
time, because they mostly wait.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardadam
from shardadam import ShardedAdamW
from tests.parity import build_parameters, quadratic
from tests.ranks import ANSWER_S, ranks_of

pytestmark = pytest.mark.quiet

TIMEOUT_S = 3.0
VICTIM = 1
FAULTY_STEP = 2


@dataclass
class Run:
    """One rank's training."""

    rank: int
    parameters: list[nn.Parameter]
    optimizer: ShardedAdamW
    directory: str

    def backward(self, step: int) -> None:
        quadratic(self.parameters, self.rank, step).backward()

    def finish(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


# Faults: what the victim does instead of an ordinary step


def skips_step(run: Run) -> None:
    run.backward(FAULTY_STEP)
    run.optimizer.zero_grad()


def steps_twice(run: Run) -> None:
    run.backward(FAULTY_STEP)
    run.optimizer.step()
    run.finish()


def runs_backward_twice(run: Run) -> None:
    run.backward(FAULTY_STEP)
    run.backward(FAULTY_STEP)
    run.finish()


def clips(run: Run) -> None:
    run.backward(FAULTY_STEP)
    run.optimizer.clip_grad_norm_(1.0)
    run.finish()


def looks_at_a_gradient(run: Run) -> None:
    run.backward(FAULTY_STEP)
    run.optimizer.full_grad(run.parameters[3])
    run.finish()


def looks_at_state(run: Run) -> None:
    run.backward(FAULTY_STEP)
    run.optimizer.full_state(run.parameters[3])
    run.finish()


def consolidates(run: Run) -> None:
    run.backward(FAULTY_STEP)
    run.optimizer.full_state_dict()
    run.finish()


def has_another_lr(run: Run) -> None:
    run.optimizer.param_groups[0]["lr"] = 0.5
    run.backward(FAULTY_STEP)
    run.finish()


def adds_a_group(run: Run) -> None:
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    run.backward(FAULTY_STEP)
    run.finish()


def broadcasts_buffers(run: Run) -> None:
    run.optimizer.sync_module(nn.BatchNorm1d(3))
    run.backward(FAULTY_STEP)
    run.finish()


def saves(run: Run) -> None:
    shardadam.save(run.directory, step=FAULTY_STEP, optimizer=run.optimizer, timeout_s=2.0)
    run.backward(FAULTY_STEP)
    run.finish()


def raises(run: Run) -> None:
    run.backward(FAULTY_STEP)
    raise ZeroDivisionError("in the user's code")


def ends(run: Run) -> None:
    os._exit(0)


def is_killed(run: Run) -> None:
    run.backward(FAULTY_STEP)
    os.kill(os.getpid(), signal.SIGKILL)


def sleeps(run: Run) -> None:
    run.backward(FAULTY_STEP)
    time.sleep(ANSWER_S)


def stops(run: Run) -> None:
    run.backward(FAULTY_STEP)
    os.kill(os.getpid(), signal.SIGSTOP)


# Patterns of the error on every rank; it also names rank 1
FAULTS: dict[Callable[[Run], None], str] = {
    skips_step: r"rank 1.* zero_grad\(\)",
    steps_twice: r"",  # the others see a rank without a gradient
    runs_backward_twice: r"different numbers of backward passes|rank 1.* step\(\)",
    clips: r"clip_grad_norm_ on rank 1|rank 1.* clip_grad_norm_\(\)",
    looks_at_a_gradient: r"full_grad on rank 1|rank 1.* full_grad\(\)",
    looks_at_state: r"rank 1.* full_state\(\)",
    consolidates: r"rank 1.* full_state_dict\(\)",
    has_another_lr: r"lr 0.01 on ranks? 0.*, 0.5 on rank 1",
    adds_a_group: r"rank 1.* add_param_group\(\)",
    broadcasts_buffers: r"rank 1.* sync_module\(\)",
    saves: r"",  # its save times out before the others raise, so no fixed error
    raises: r"rank 1: has ended",
    ends: r"rank 1: has ended",
    is_killed: r"rank 1: has ended",
    sleeps: r"rank 1: .*test_faults.py:\d+ in sleeps",
    stops: r"rank 1: does not answer",
}
GONE = (raises, ends, is_killed, sleeps, stops)
CALLED_APART = r"(?:full_state|full_state_dict|sync_module|save)\(\)"
AT_ONCE = (consolidates, looks_at_state, broadcasts_buffers)  # over shared memory: ranks announce transfers over Gloo


@dataclass(frozen=True)
class Outcome:
    """How the run of a rank ended."""

    kind: str
    message: str
    seconds: float
    parameters: list[list[float]]
    grew: int  # steps counted since the fault


@dataclass(frozen=True)
class Scenario:
    fault: Callable[[Run], None]
    gradient_sync: str
    transport: str
    directory: str

    def __call__(self, rank: int, pipe: Connection) -> None:
        parameters = build_parameters()
        options = {"bucket_mb": 0.001, "gradient_sync": self.gradient_sync, "transport": self.transport}
        run = Run(rank, parameters, ShardedAdamW(parameters, lr=1e-2, **options), self.directory)
        for step in range(FAULTY_STEP):
            run.backward(step)
            run.finish()
        dist.barrier()
        start = time.monotonic()
        kind = message = ""
        step = FAULTY_STEP
        try:
            for step in range(FAULTY_STEP, FAULTY_STEP + 3):
                if rank == VICTIM and step == FAULTY_STEP:
                    self.fault(run)
                else:
                    run.backward(step)
                    run.finish()
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        values = [p.detach().flatten().tolist() for p in parameters]
        pipe.send(Outcome(kind, message, time.monotonic() - start, values, step - FAULTY_STEP))
        if self.fault is raises and rank == VICTIM:
            os._exit(1)  # end as a script would
        time.sleep(ANSWER_S)


def is_noticed_by(fault: Callable[[Run], None], gradient_sync: str, rank: int) -> bool:
    """Return whether ``rank`` raises.

    Without hooks no rank notices another backward, and a rank that skipped a step is one step behind: the others
    notice when it ends.
    """
    if fault is steps_twice:
        return rank == VICTIM
    if gradient_sync != "backward" and fault is skips_step:
        return rank != VICTIM
    return gradient_sync == "backward" or fault is not runs_backward_twice


def inject(
    fault: Callable[[Run], None], gradient_sync: str, transport: str, world_size: int, directory: Path
) -> dict[int, Outcome]:
    directory.mkdir()
    scenario = Scenario(fault, gradient_sync, transport, str(directory / "checkpoints"))
    with ranks_of(world_size, directory / "store", scenario, timeout_s=TIMEOUT_S) as ranks:
        alive = [rank for rank in range(world_size) if rank != VICTIM or fault not in GONE]
        return {rank: ranks.hear(rank) for rank in alive}


@pytest.mark.filterwarnings("ignore:.*this rank has had no gradient")
@pytest.mark.parametrize(
    ("gradient_sync", "transport", "world_size"),
    [
        ("backward", "shared_memory", 2),
        ("step", "collective", 3),
        pytest.param("step", "shared_memory", 3, marks=pytest.mark.long),
        pytest.param("external", "collective", 2, marks=pytest.mark.long),
        pytest.param("backward", "collective", 3, marks=pytest.mark.long),
        pytest.param("backward", "shared_memory", 3, marks=pytest.mark.long),
        pytest.param("backward", "collective", 2, marks=pytest.mark.long),
        pytest.param("step", "shared_memory", 2, marks=pytest.mark.long),
        pytest.param("external", "shared_memory", 3, marks=pytest.mark.long),
    ],
)
def test_a_fault_ends_on_every_rank_in_an_error_that_names_the_rank(
    gradient_sync: str, transport: str, world_size: int, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = {
            fault: pool.submit(inject, fault, gradient_sync, transport, world_size, tmp_path / fault.__name__)
            for fault in FAULTS
        }
    for fault, future in found.items():
        outcomes = future.result()
        for rank, one in outcomes.items():
            what = f"{fault.__name__}, rank {rank}: {one.kind} after {one.seconds:.1f} s: {one.message}"
            if not is_noticed_by(fault, gradient_sync, rank):
                assert one.kind == "" and one.grew == 2, what
                continue
            assert one.kind in ("RankDesyncError", "TimeoutError", "ValueError"), what
            assert one.seconds < TIMEOUT_S + 5, what
            if fault in AT_ONCE and transport == "shared_memory":
                assert "have made different calls" in one.message, what
            if fault in (consolidates, looks_at_state, broadcasts_buffers, saves) and rank == VICTIM:
                assert f"{re.findall(CALLED_APART, one.message)[0]} is collective" in one.message, what
            assert f"rank {VICTIM}" in one.message or (fault is saves and "did not arrive" in one.message), what
            assert re.search(FAULTS[fault], one.message), what
            assert all(math.isfinite(x) for values in one.parameters for x in values), what
        if all(is_noticed_by(fault, gradient_sync, rank) for rank in outcomes):
            assert len({str((one.grew, one.parameters)) for one in outcomes.values()}) == 1, fault.__name__
