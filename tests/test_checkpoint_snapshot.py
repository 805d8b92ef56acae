# SPDX-License-Identifier: Apache-2.0
"""An asynchronous save stores the state as it was when ``save`` was called, although it copies most of it later."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardadam
from shardadam import CheckpointError
from shardadam.engine.snapshot import Snapshot
from shardadam.engine.storage import FlatArena
from tests.ranks import on_ranks, rank_and_size
from tests.runs import FORMATS, Run, build, differences

THREAD = "shardadam.save"


@contextmanager
def patched(name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replaces a method of ``Snapshot`` by ``method(original, self, ...)``."""
    original = getattr(Snapshot, name)
    setattr(Snapshot, name, lambda *arguments: method(original, *arguments))
    try:
        yield
    finally:
        setattr(Snapshot, name, original)


@contextmanager
def held_back() -> Iterator[None]:
    """The thread that saves makes no copy until the block has ended."""
    go = threading.Event()

    def finish(original: Callable[[Snapshot], None], snapshot: Snapshot) -> None:
        if threading.current_thread().name == THREAD:
            go.wait(20)
        original(snapshot)

    with patched("finish", finish):
        try:
            yield
        finally:
            go.set()


@contextmanager
def slow_copies() -> Iterator[threading.Event]:
    """The thread that saves takes a while for each copy. The event tells that it has begun with the first."""
    begun = threading.Event()

    def copy(original: Callable[[Snapshot], None], snapshot: Snapshot) -> None:
        if threading.current_thread().name == THREAD:
            begun.set()
            time.sleep(0.1)
        original(snapshot)

    with patched("_copy_last", copy):
        yield begun


def save(run: Run, directory: Path | str) -> Future[Path]:
    return shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer, asynchronous=True)


def reference(run: Run, directory: Path | str) -> bytes:
    """Returns what a synchronous save writes on this rank now."""
    return written(shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer))


def written(path: Path) -> bytes:
    return (path / f"rank-{rank_and_size()[0]:05d}.bin").read_bytes()


def step(run: Run) -> None:
    run.train([3])


def backward_only(run: Run) -> None:
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(9)).to(run.model.scale)
    run.model(x).backward()


def weight(run: Run) -> Tensor:
    found: Tensor = run.model.tied.weight
    return found


def load_own(run: Run) -> None:
    state_dict = run.optimizer.state_dict()
    state_dict["state"] = {}
    run.optimizer.load_state_dict(state_dict)


def write_view(run: Run) -> None:
    run.optimizer.state[weight(run)]["exp_avg"].zero_()


def write_state_dict(run: Run) -> None:
    for entry in run.optimizer.state_dict()["state"].values():
        getattr(entry["exp_avg"], "local", entry["exp_avg"]).zero_()


def clear_state(run: Run) -> None:
    run.optimizer.state.clear()


def write_parameters_and_read(run: Run) -> None:
    """Masters and averages follow parameters that were written, when they are read."""
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(3)
    run.optimizer.state_dict()


def add_a_group(run: Run) -> None:
    run.optimizer.add_param_group({"params": [("added", torch.nn.Parameter(torch.ones(300)))]})
    step(run)


def delete(run: Run) -> None:
    sizes = [tensor.nbytes for arena in run.optimizer._engine.parameters.arenas for tensor in arena.flat_state.values()]
    run.optimizer = run.scheduler = None
    gc.collect()
    run.model.garbage = [torch.full((size,), 77, dtype=torch.uint8) for size in sizes * 3]


WRITES = [step, load_own, write_view, write_state_dict, clear_state, write_parameters_and_read, add_a_group, delete]


def save_and_write(directory: str, write: Callable[[Run], None], format: Any, options: dict[str, Any]) -> str:
    run = build(format, **options)
    run.train([1, 2])
    expected = reference(run, directory)
    with held_back():
        future = save(run, directory)
        begun = time.perf_counter()
        write(run)
        if time.perf_counter() - begun > 15:
            return "waited for the thread"
        if future.done():
            return "the thread was not held back"
    return "equal" if written(future.result()) == expected else "other bytes than those of the synchronous save"


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_what_writes_the_state_makes_the_missing_copies_first(tmp_path: Path, write: Callable[[Run], None]) -> None:
    options: dict[str, Any] = {"ema_decay": 0.9} if write is write_parameters_and_read else {}
    format = FORMATS[4] if write is write_parameters_and_read else FORMATS[0]
    assert save_and_write(str(tmp_path), write, format, options) == "equal"


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_step_right_after_the_call_changes_nothing_that_is_saved(tmp_path: Path, format: Any) -> None:
    assert save_and_write(str(tmp_path), step, format, {"ema_decay": 0.9}) == "equal"


@pytest.mark.parametrize("options", [{}, {"update": "backward"}, {"gradient_sync": "step"}], ids=str)
def test_on_several_ranks(tmp_path: Path, options: dict[str, Any]) -> None:
    write = backward_only if "update" in options else step
    assert on_ranks(2, save_and_write, str(tmp_path), write, FORMATS[0], options) == ["equal"] * 2


def save_slowly(directory: str) -> str:
    run = build()
    run.train([1, 2])
    expected = reference(run, directory)
    with slow_copies() as begun:
        future = save(run, directory)
        assert begun.wait(20)
        step(run)
        after = run.everything()
        found = written(future.result())
    other = build()
    other.train([1, 2, 3])
    assert not differences(after, other.everything()), "the step is another one"
    return "equal" if found == expected else "other bytes than those of the synchronous save"


def test_a_step_waits_for_the_copy_that_the_thread_is_making(tmp_path: Path) -> None:
    assert on_ranks(2, save_slowly, str(tmp_path)) == ["equal"] * 2


def test_views_from_before_the_save_may_be_written(tmp_path: Path) -> None:
    run = build()
    run.train([1, 2])
    view = run.optimizer.state[weight(run)]["exp_avg"]
    expected = reference(run, tmp_path)
    with held_back():
        future = save(run, tmp_path)
        view.fill_(9)
    assert written(future.result()) == expected


def test_a_state_dict_from_before_the_save_may_be_written(tmp_path: Path) -> None:
    run = build()
    run.train([1, 2])
    state = run.optimizer.state_dict()["state"]
    expected = reference(run, tmp_path)
    with held_back():
        future = save(run, tmp_path)
        for entry in state.values():
            entry["exp_avg"].fill_(9)
    assert written(future.result()) == expected


def test_saves_in_and_out_of_inference_mode(tmp_path: Path) -> None:
    """The copies could not be written outside of it, nor reused by the next save."""
    run = build(width=41)
    for is_inference in (True, False, True):
        run.train([1, 2])
        expected = reference(run, tmp_path)
        with torch.inference_mode(is_inference):
            future = save(run, tmp_path)
        step(run)
        assert written(future.result()) == expected


@pytest.mark.parametrize("call", ["state_dict", "save"])
def test_a_signals_handler_may_interrupt_a_copy(tmp_path: Path, call: str) -> None:
    """It waited for its own thread."""
    run = build()
    run.train([1, 2])
    expected = reference(run, tmp_path)
    sent: list[int] = []
    handled: list[int] = []

    def handle(number: int, _: Any) -> None:
        if call == "save":
            reference(run, tmp_path / "in handler")
        else:
            run.optimizer.state_dict()
        handled.append(number)

    def copy(original: Callable[[Snapshot], None], snapshot: Snapshot) -> None:
        if threading.current_thread() is threading.main_thread() and not sent:
            sent.append(signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
        original(snapshot)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with held_back() if call == "state_dict" else slow_copies(), patched("_copy_last", copy):
            future = save(run, tmp_path)
            run.optimizer.state_dict()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled == sent == [signal.SIGUSR1]
    assert written(future.result()) == expected


def test_a_step_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build()
    run.train([1, 2])
    expected = reference(run, tmp_path)
    go, write = threading.Event(), os.write

    def hang(*arguments: Any) -> int:
        if threading.current_thread() is not threading.main_thread():
            go.wait(20)
        return write(*arguments)

    monkeypatch.setattr(os, "write", hang)
    future = save(run, tmp_path)
    begun = time.perf_counter()
    step(run)
    assert time.perf_counter() - begun < 15 and not future.done()
    go.set()
    assert written(future.result()) == expected


def test_two_optimizers_are_saved_one_after_the_other(tmp_path: Path) -> None:
    runs = [build(seed=seed) for seed in range(2)]
    for run in runs:
        run.train([1, 2])
    expected = [reference(run, tmp_path / str(i)) for i, run in enumerate(runs)]
    with slow_copies():
        futures = [save(run, tmp_path / str(i)) for i, run in enumerate(runs)]
        for run in runs:
            step(run)
        assert [written(future.result()) for future in futures] == expected


def fail_to_copy(directory: str) -> str:
    rank, _ = rank_and_size()
    run = build()
    run.train([1, 2])

    def add(original: Callable[..., None], snapshot: Snapshot, source: Tensor, target: Tensor) -> None:
        original(snapshot, source, target)
        if rank == 1:
            snapshot._pieces[-1] = source, target.new_empty(source.numel() + 7)

    with patched("add", add):
        future = save(run, directory)
    step(run)
    try:
        future.result()
        return "saved"
    except (CheckpointError, RuntimeError) as error:
        said = str(error)
    other = build()
    other.train([1, 2, 3])
    assert not differences(run.everything(), other.everything()), "the step is another one"
    expected = reference(run, directory)
    assert written(save(run, directory).result()) == expected
    return said


def test_if_a_copy_fails_the_save_does_and_training_goes_on(tmp_path: Path) -> None:
    for said in on_ranks(2, fail_to_copy, str(tmp_path)):
        assert "size of tensor" in said


def test_a_thread_that_cannot_start_leaves_no_copies_to_be_made_into_those_of_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (build(seed=seed) for seed in range(2))
    for run in (first, second):
        run.train([1, 2])
    expected = reference(second, tmp_path)

    start = threading.Thread.start

    def start_others(thread: threading.Thread) -> None:
        if thread.name == THREAD:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", start_others)
        with pytest.raises(RuntimeError, match="start new thread"):
            save(first, tmp_path)
    with held_back():
        future = save(second, tmp_path)
        step(second)
        step(first)
    assert written(future.result()) == expected


def test_a_copy_may_be_interrupted_by_what_makes_all_copies() -> None:
    snapshot = Snapshot()

    class Target:
        copied = 0

        def copy_(self, source: Tensor) -> None:
            self.copied += 1
            if self.copied == 1:
                snapshot.finish()

    target = Target()
    others = [torch.zeros(8) for _ in range(2)]
    snapshot._pieces += [*((torch.ones(8), other) for other in others), (torch.ones(8), target)]  # type: ignore[list-item]
    snapshot.finish()
    assert snapshot.error is None and not snapshot._pieces
    assert all(other.eq(1).all() for other in others) and target.copied == 2


def test_an_interrupted_save_leaves_no_copies_to_be_made_into_those_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (build(seed=seed) for seed in range(2))
    for run in (first, second):
        run.train([1, 2])
    expected = reference(second, tmp_path)
    slot = FlatArena.snapshot

    def interrupt(arena: FlatArena, snapshot: Snapshot) -> None:
        slot.__set__(arena, snapshot)  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(FlatArena, "snapshot", property(slot.__get__, interrupt))  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            save(first, tmp_path)
    with held_back():
        future = save(second, tmp_path)
        step(second)
        step(first)
    assert written(future.result()) == expected


def test_a_child_does_not_wait_for_the_copies_of_its_parent() -> None:
    snapshot = Snapshot()
    snapshot.add(torch.ones(8), torch.zeros(8))
    with snapshot._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(10)  # ends it if it waits
            snapshot.finish()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
