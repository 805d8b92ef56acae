# SPDX-License-Identifier: Apache-2.0
"""Worker processes that run a function on every rank, with a deadline.

``on_ranks(4, function, *arguments)`` calls ``function(*arguments)`` on 4 ranks joined by Gloo and returns the four
results in rank order. Workers are started once for each world size and reused. If a rank raises or does not answer in
time, the test fails with every rank's traceback, and new workers replace these, so that no unfinished collective
reaches the next test. With one rank the function runs in this process, without a process group.

Workers use the test's warning filters, and their warnings are issued again in this process: ``pytest.warns`` and the
filters in pyproject.toml hold on every rank.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DEADLINE_S = 60.0

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.preloaded"])
_pools: dict[int, Workers] = {}


def on_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, deadline_s: float = DEADLINE_S
) -> list[Any]:
    if world_size == 1:
        return [function(*arguments)]
    if world_size not in _pools:
        _pools[world_size] = Workers(world_size)
    try:
        return _pools[world_size].call(function, arguments, deadline_s)
    except BaseException:
        _pools.pop(world_size).stop()
        raise


def restart(world_size: int) -> None:
    """Stop the workers: the next ``on_ranks`` starts new ones."""
    if world_size in _pools:
        _pools.pop(world_size).stop()


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Workers:
    def __init__(self, world_size: int) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="shardadam-test-")
        store = str(Path(self._directory.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            mine, theirs = processes.Pipe()
            process = processes.Process(target=_work, args=(rank, world_size, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...], deadline_s: float) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments, warnings.filters))
        answers: dict[int, tuple[bool, Any, list[Any]]] = {}
        end = time.monotonic() + deadline_s
        while len(answers) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            for pipe in ready:
                try:
                    answers[waiting[pipe]] = pipe.recv()  # type: ignore[index, union-attr]
                except EOFError:
                    answers[waiting[pipe]] = (False, "the process has died", [])  # type: ignore[index]
            if any(not succeeded for succeeded, *_ in answers.values()):
                end = min(end, time.monotonic() + 5.0)  # the others may wait for the rank that failed
            if not ready:
                break
        failures = [f"rank {rank}: {answers[rank][1]}" for rank in sorted(answers) if not answers[rank][0]]
        missing = [rank for rank in range(len(self._pipes)) if rank not in answers]
        if failures or missing:
            late = [f"no answer in time from ranks {missing}"] if missing else []
            raise AssertionError("\n".join([*failures, *late]))
        for *_, warned in answers.values():
            for warning in warned:
                warnings.warn_explicit(*warning)
        return [answers[rank][1] for rank in range(len(self._pipes))]

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()
        self._directory.cleanup()


def _work(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=DEADLINE_S)
    )
    while True:
        try:
            function, arguments, filters = pipe.recv()
        except EOFError:
            break
        with warnings.catch_warnings(record=True) as warned:
            warnings.filters[:] = filters
            try:
                answer = (True, function(*arguments))
            except BaseException:
                answer = (False, traceback.format_exc())
        pipe.send((*answer, [(w.message, w.category, w.filename, w.lineno) for w in warned]))
        del answer, function, arguments
        gc.collect()  # optimizers of the last test release their process groups
    dist.destroy_process_group()


# New processes for one test

ANSWER_S = 20.0


@dataclass
class Ranks:
    """The processes of ``ranks_of`` and pipes to them."""

    processes: list[Any]
    pipes: list[Connection]

    def hear(self, rank: int) -> Any:
        assert self.pipes[rank].poll(ANSWER_S), f"rank {rank} does not answer"
        return self.pipes[rank].recv()


Scenario = Callable[[int, Connection], None]


@contextmanager
def ranks_of(world_size: int, store: Path, scenario: Scenario, *, timeout_s: float = 3.0) -> Iterator[Ranks]:
    """Start processes joined by Gloo that each run ``scenario(rank, pipe)``; kill them at the end.

    Args:
        timeout_s: the timeout of their process group.
    """
    ranks = Ranks([], [])
    try:
        for rank in range(world_size):
            mine, theirs = processes.Pipe()
            arguments = (rank, world_size, str(store), timeout_s, scenario, theirs, warnings.filters)
            ranks.processes.append(processes.Process(target=_be_a_rank, args=arguments, daemon=True))
            ranks.processes[-1].start()
            theirs.close()
            ranks.pipes.append(mine)
        yield ranks
    finally:
        for process, pipe in zip(ranks.processes, ranks.pipes, strict=True):
            process.kill()
            process.join(5)
            process.close()
            pipe.close()


def _be_a_rank(
    rank: int, world_size: int, store: str, timeout_s: float, scenario: Scenario, pipe: Connection, filters: list[Any]
) -> None:
    warnings.filters[:] = filters
    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    scenario(rank, pipe)


@atexit.register
def stop_all() -> None:
    """Stop all workers: also called by ``conftest.py``, as processes of pytest-xdist end without Python's exit."""
    for workers in _pools.values():
        workers.stop()
    _pools.clear()
