# SPDX-License-Identifier: Apache-2.0
"""If a rank dies during a save, or does not call it, the newest checkpoint stays whole and no rank hangs."""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardadam
from tests.ranks import on_ranks, processes, rank_and_size
from tests.runs import FORMATS, Run, build, digest

KILLS_SAMPLE, KILLS_ALL = 6, 100
FORMAT = FORMATS[2]
WIDTH = 500


def advance(run: Run, step: int) -> None:
    """A step whose result depends only on `step`: the mean of equal gradients is exact on 1, 2 and 4 ranks."""
    torch.manual_seed(step)
    run.model(torch.randn(4, 3, 6, 6)).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.scheduler.step()


def new_run() -> Run:
    return build(FORMAT, width=WIDTH, bucket_mb=0.2)


def save_until_killed(rank: int, world_size: int, store: str, directory: str, pipe: Connection) -> None:
    """Sends the step of every checkpoint over ``pipe`` as soon as ``save`` returns."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    run = new_run()
    step = 0
    if shardadam.has_checkpoint(directory):
        step = shardadam.load(directory, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler).step
    pipe.send(("from", step))
    arguments: Any = dict(model=run.model, optimizer=run.optimizer, scheduler=run.scheduler, keep=2, timeout_s=5)
    while True:
        advance(run, step)
        step += 1
        asynchronous = step % 3 == 0
        saved: Any = shardadam.save(directory, step=step, asynchronous=asynchronous, **arguments)
        if asynchronous:
            saved.result()
        pipe.send(("saved", step))


def run_and_kill(tmp_path: Path, directory: Path, generator: random.Random, index: int) -> int:
    """Starts ranks, kills one at a random moment, and the others a moment later, as torchrun would.

    Returns:
        The last step that a rank sent.
    """
    world_size = generator.choice((1, 2, 4))
    pipes, ranks = [], []
    for rank in range(world_size):
        mine, theirs = processes.Pipe()
        arguments = (rank, world_size, str(tmp_path / f"store-{index}"), str(directory), theirs)
        ranks.append(processes.Process(target=save_until_killed, args=arguments, daemon=True))
        ranks[-1].start()
        theirs.close()
        pipes.append(mine)
    acknowledged = 0
    assert pipes[0].poll(30)
    acknowledged = pipes[0].recv()[1]
    time.sleep(generator.uniform(0.0, 0.4))
    os.kill(ranks[generator.randrange(world_size)].pid, signal.SIGKILL)  # type: ignore[arg-type]
    time.sleep(generator.choice((0.0, 0.01, 0.1)))
    for process in ranks:
        process.kill()
        process.join(10)
    while ready := wait(pipes, timeout=0):
        for pipe in ready:
            try:
                acknowledged = max(acknowledged, pipe.recv()[1])  # type: ignore[union-attr]
            except EOFError:
                pipes.remove(pipe)  # type: ignore[arg-type]
    return acknowledged


@pytest.mark.timeout(1500)
def test_the_newest_checkpoint_survives_a_kill_at_any_moment(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    generator = random.Random(1)
    directory = tmp_path / "checkpoints"
    run = new_run()
    reference = new_run()
    reached = 0
    for index in range(KILLS_ALL if request.config.getoption("--long") else KILLS_SAMPLE):
        acknowledged = run_and_kill(tmp_path, directory, generator, index)
        if not directory.exists() or not shardadam.has_checkpoint(directory):
            assert acknowledged == 0
            continue
        loaded = shardadam.load(directory, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
        assert loaded.step >= acknowledged
        while reached < loaded.step:
            advance(reference, reached)
            reached += 1
        assert digest(run.everything()) == digest(reference.everything()), f"kill {index}, step {loaded.step}"
        left = [path.name for path in directory.iterdir() if path.name.startswith(".")]
        assert len(left) <= 3, left  # from this kill alone
    assert reached > 0
    shardadam.save(directory, step=reached + 1, model=run.model, keep=2)
    assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]
    assert len(list(directory.iterdir())) == 3


# Ranks that do not call save or load


def save_on_some(directory: str, absent: list[int]) -> list[Any]:
    rank, _ = rank_and_size()
    run = build(width=40)
    said: Any = "absent"
    start = time.monotonic()
    if rank not in absent:
        try:
            shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer, timeout_s=1.5)
        except TimeoutError as error:
            said = str(error)
    seconds = time.monotonic() - start
    dist.barrier()
    run.train(range(2))  # nothing is left over for a later collective
    path = shardadam.save(directory, step=2, model=run.model, optimizer=run.optimizer, timeout_s=20)
    return [said, seconds, path.name]


@pytest.mark.parametrize("absent", [[1], [0], [0, 2]])
def test_ranks_that_do_not_come_are_named_in_time(tmp_path: Path, absent: list[int]) -> None:
    names = {(1,): "rank 1 did", (0,): "rank 0 did", (0, 2): "ranks 0, 2 did"}[tuple(absent)]
    for rank, (said, seconds, path) in enumerate(on_ranks(3, save_on_some, str(tmp_path), absent)):
        if rank not in absent:
            assert names in said and "within 1.5 s" in said
            assert seconds < 4
        assert path == "step-00000002"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def save_at_different_steps(directory: str) -> str:
    rank, _ = rank_and_size()
    run = build(width=40)
    try:
        shardadam.save(directory, step=rank, model=run.model, optimizer=run.optimizer)
    except shardadam.CheckpointError as error:
        return str(error)
    return "saved"


def test_ranks_that_save_different_steps_are_refused(tmp_path: Path) -> None:
    for said in on_ranks(2, save_at_different_steps, str(tmp_path)):
        assert "disagree on the step, found [0, 1]" in said
    assert list(tmp_path.iterdir()) == []


def load_on_some(directory: str) -> str:
    rank, _ = rank_and_size()
    run = build(width=40)
    said = ""
    if rank == 0:
        try:
            shardadam.load(directory, model=run.model, optimizer=run.optimizer, timeout_s=1)
        except TimeoutError as error:
            said = str(error)
    dist.barrier()
    return said


def test_load_on_some_ranks_only_names_the_others(tmp_path: Path) -> None:
    run = build(width=40)
    shardadam.save(tmp_path, step=0, model=run.model, optimizer=run.optimizer)
    assert "ranks 1-2 did not arrive" in on_ranks(3, load_on_some, str(tmp_path))[0]


def save_slowly(directory: str) -> list[Any]:
    """Rank 1 writes for longer than ``timeout_s``, but shows a heartbeat."""
    rank, _ = rank_and_size()
    run = build(width=40)
    write = os.write

    def slowly(descriptor: int, content: Any) -> int:
        time.sleep(0.25)
        return write(descriptor, content)

    if rank == 1:
        os.write = slowly
    try:
        start = time.monotonic()
        path = shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer, timeout_s=2.5)
        return [path.name, time.monotonic() - start]
    finally:
        os.write = write


def test_a_rank_that_is_slow_is_waited_for(tmp_path: Path) -> None:
    for name, seconds in on_ranks(2, save_slowly, str(tmp_path)):
        assert name == "step-00000001" and seconds > 3
