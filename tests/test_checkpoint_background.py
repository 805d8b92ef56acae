# SPDX-License-Identifier: Apache-2.0
"""A save in the background that fails is told once: by its future, or the next ``save`` or ``load``, or at the end."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import shardadam
from shardadam import CheckpointError
from tests.ranks import on_ranks, processes, rank_and_size
from tests.runs import build

FULL = "No space left on device"


@contextmanager
def full_disk_in_the_background() -> Iterator[None]:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if threading.current_thread().name == "shardadam.save":
            raise OSError(errno.ENOSPC, FULL)
        fsync(descriptor)

    os.fsync = full
    try:
        yield
    finally:
        os.fsync = fsync


def failed_save(directory: Path | str, step: int = 1) -> Future[Path]:
    with full_disk_in_the_background():
        future = shardadam.save(directory, step=step, model=nn.Linear(2, 2), asynchronous=True)
        concurrent.futures.wait([future])
    return future


def save(directory: Path | str, step: int) -> str:
    return shardadam.save(directory, step=step, model=nn.Linear(2, 2)).name


def by_result(future: Future[Path]) -> None:
    with pytest.raises(CheckpointError, match=FULL):
        future.result()


def by_exception(future: Future[Path]) -> None:
    assert FULL in str(future.exception(1))


def by_completion(future: Future[Path]) -> None:
    for done in concurrent.futures.as_completed([future]):
        by_result(done)


def by_callback(future: Future[Path]) -> None:
    future.add_done_callback(by_exception)


@pytest.mark.parametrize("tell", [by_result, by_exception, by_completion, by_callback])
def test_a_failure_that_the_future_has_told_is_not_raised_again(
    tmp_path: Path, tell: Callable[[Future[Path]], None]
) -> None:
    """The next save raised it again, and wrote nothing."""
    tell(failed_save(tmp_path))
    assert save(tmp_path, 2) == "step-00000002"
    shardadam.load(tmp_path, model=nn.Linear(2, 2))


def not_asked(future: Future[Path]) -> None:
    concurrent.futures.wait([future])
    assert future.done() and not future.cancel() and not future.cancelled()
    future.add_done_callback(lambda future: None)


def test_a_failure_that_nobody_was_told_is_raised_once(tmp_path: Path) -> None:
    first = failed_save(tmp_path)
    not_asked(first)
    with pytest.raises(CheckpointError, match=f"previous save, in the background, failed.*step-00000001.*{FULL}"):
        save(tmp_path, 2)
    assert save(tmp_path, 2) == "step-00000002"
    second = failed_save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="step-00000003"):
        shardadam.load(tmp_path, model=nn.Linear(2, 2))
    assert shardadam.load(tmp_path, model=nn.Linear(2, 2)).step == 2
    for future in (first, second):
        by_result(future)  # still has it
    assert save(tmp_path, 4) == "step-00000004"


def test_a_failure_that_meets_another_error_is_kept(tmp_path: Path) -> None:
    failed_save(tmp_path)
    with pytest.raises(ValueError, match="step"):
        save(tmp_path, -1)
    with pytest.raises(CheckpointError, match=FULL):
        save(tmp_path, 2)


def tell_some(directory: str, told: list[int], then: str) -> list[str]:
    rank, _ = rank_and_size()
    run = build(width=8)
    with full_disk_in_the_background():
        future = shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer, asynchronous=True)
        concurrent.futures.wait([future])
    said = []
    if rank in told:
        said.append(str(future.exception()))
    for _ in range(2):
        try:
            if then == "save":
                said.append(shardadam.save(directory, step=2, model=run.model, optimizer=run.optimizer).name)
            else:
                said.append(str(shardadam.load(directory, model=run.model, optimizer=run.optimizer).step))
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_a_failure_that_one_rank_was_told_keeps_no_rank_from_the_next_save(tmp_path: Path) -> None:
    """The rank that was not told raised; the other one waited for it in the save."""
    saves = ["step-00000002", "step-00000002-2"]
    first, second = on_ranks(2, tell_some, str(tmp_path), [0], "save")
    assert FULL in first[0] and first[1:] == second == saves


@pytest.mark.parametrize("then", ["save", "load"])
def test_a_failure_that_no_rank_was_told_is_raised_once_on_each(tmp_path: Path, then: str) -> None:
    save(tmp_path, 0)
    for failed, succeeded in on_ranks(2, tell_some, str(tmp_path), [], then):
        assert "The previous save, in the background, failed" in failed and FULL in failed
        assert succeeded == "step-00000002" or ("does not fit" in succeeded and then == "load")


# At the end of the program

LAST = """
import atexit, gc, os, sys
from tests.test_checkpoint_background import *
atexit.register(lambda: print("a handler of others", file=sys.stderr, flush=True))
failed_save(sys.argv[1])
gc.collect()
child = os.fork()
if child == 0:
    sys.exit(0)
print("child", os.waitpid(child, 0)[1])
"""


def test_the_last_failure_of_a_program_is_told_at_its_end(tmp_path: Path) -> None:
    """The program ended with status 0 and not a word."""
    done = subprocess.run([sys.executable, "-c", LAST, tmp_path], capture_output=True, text=True, timeout=50)
    assert done.returncode == 120
    assert "A save in the background failed" in done.stderr
    assert done.stderr.count("nothing has asked for its result") == 1  # not by the child
    assert "child 0" in done.stdout and done.stderr.count("a handler of others") == 2
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def last_save(directory: str, how: str) -> None:
    if how == "succeeds":
        shardadam.save(directory, step=1, model=nn.Linear(2, 2), asynchronous=True)
    else:
        future = failed_save(directory)
        if how == "told":
            by_exception(future)


@pytest.mark.parametrize("how", ["untold", "told", "succeeds"])
def test_a_process_of_multiprocessing_ends_with_its_failure(tmp_path: Path, how: str) -> None:
    """These run no atexit handlers."""
    process: Any = processes.Process(target=last_save, args=(str(tmp_path), how))
    process.start()
    process.join(30)
    assert process.exitcode == (1 if how == "untold" else 0)
    assert shardadam.has_checkpoint(tmp_path) == (how == "succeeds")
