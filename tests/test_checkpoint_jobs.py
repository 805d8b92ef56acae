# SPDX-License-Identifier: Apache-2.0
"""Two jobs in one directory of checkpoints: nothing is mixed or lost, and one of them is told."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardadam
from shardadam import CheckpointError
from shardadam.checkpoint import directory as directories
from shardadam.checkpoint import saving, unpublished
from tests.ranks import ranks_of


def model_of(value: float) -> nn.Linear:
    model = nn.Linear(64, 64)
    for parameter in model.parameters():
        parameter.detach().fill_(value)
    return model


def values_in(directory: Path) -> set[float]:
    model = model_of(0.0)
    shardadam.load(directory, model=model)
    return {value for parameter in model.parameters() for value in parameter.flatten().tolist()}


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def said(save: Callable[[], Any]) -> str:
    try:
        return str(save().name)
    except CheckpointError as error:
        return str(error)


def other_job(rank: int, pipe: Connection) -> None:
    """Saves a model of ones as it is told to; where ``hold``, rank 1 waits before it writes."""
    write_part = saving._write_part
    model = model_of(1.0)

    def held(*arguments: Any) -> None:
        pipe.send("held")
        if rank == 1:
            pipe.recv()
        write_part(*arguments)

    while True:
        directory, arguments, hold = pipe.recv()
        saving._write_part = held if hold else write_part
        pipe.send(said(lambda: shardadam.save(directory, model=model, **arguments)))  # noqa: B023


def test_a_save_that_goes_on_is_not_touched_and_the_other_job_is_told(tmp_path: Path) -> None:
    """The other job's unfinished save was removed, and its rank 1 then wrote into this job's checkpoint."""
    directory = tmp_path / "checkpoints"
    mine = model_of(2.0)
    with ranks_of(2, tmp_path / "store", other_job, timeout_s=30) as other:
        for pipe in other.pipes:
            pipe.send((directory, {"step": 5}, True))
        assert [other.hear(rank) for rank in (0, 1)] == ["held"] * 2
        for step in (5, 6):
            refused = said(lambda: shardadam.save(directory, step=step, model=mine, keep=1))  # noqa: B023
            assert "another job saves into" in refused and f"process {other.processes[0].pid} on" in refused
            assert "is writing step-00000005" in refused
        other.pipes[1].send("go on")
        assert [other.hear(rank) for rank in (0, 1)] == ["step-00000005"] * 2
        assert values_in(directory) == {1.0} and names_in(directory) == ["latest", "step-00000005"]

        # The job that came last goes on; the one that was there before is told.
        assert said(lambda: shardadam.save(directory, step=5, model=mine)) == "step-00000005-2"
        for pipe in other.pipes:
            pipe.send((directory, {"step": 7, "keep": 1}, False))
        for rank in (0, 1):
            assert "another job saves into" in (answer := other.hear(rank)) and "since this one has saved" in answer
        assert values_in(directory) == {2.0} and len(names_in(directory)) == 3

        # A save that was killed is removed at once.
        shardadam.load(directory, model=mine)
        (tmp_path / "elsewhere").mkdir()
        for pipe in other.pipes:
            pipe.send((tmp_path / "elsewhere", {"step": 8}, True))
        assert [other.hear(rank) for rank in (0, 1)] == ["held"] * 2
        assert len(names_in(tmp_path / "elsewhere")) == 1
        other.processes[0].kill()
        other.processes[0].join()
        start = time.monotonic()
        assert said(lambda: shardadam.save(tmp_path / "elsewhere", step=8, model=mine)) == "step-00000008"
        assert time.monotonic() - start < unpublished.WATCH_S
        assert names_in(tmp_path / "elsewhere") == ["latest", "step-00000008"]


def test_jobs_that_save_in_turn_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each removed the other's checkpoints, and ``latest`` went to and fro."""
    memories: dict[str, dict[str, set[str]]] = {"first": {}, "second": {}}  # of two processes

    def save(job: str, **arguments: Any) -> str:
        monkeypatch.setattr(directories, "_own_names", memories[job])
        return said(lambda: shardadam.save(tmp_path, model=model_of(2.0), **arguments))

    assert save("first", step=1) == "step-00000001"
    assert save("second", step=1, keep=1) == "step-00000001-2"  # it came last, as a job that was requeued does
    assert "it has saved step-00000001-2 there" in save("first", step=2, keep=1)
    assert save("second", step=3, keep=2) == "step-00000003"
    assert "load it first" in save("first", step=3)
    shardadam.load(tmp_path, model=model_of(2.0))  # by the first
    assert values_in(tmp_path) == {2.0}
    assert save("first", step=4) == "step-00000004"
    assert "it has saved step-00000004 there" in save("second", step=4)
    assert names_in(tmp_path) == ["latest", "step-00000001-2", "step-00000003", "step-00000004"]


def test_a_checkpoint_that_was_published_meanwhile_is_not_superseded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither job has seen the other's save, as may happen on a network file system."""
    write_manifest = saving._write_manifest

    def slow(*arguments: Any) -> None:
        monkeypatch.setattr(saving, "_write_manifest", write_manifest)
        monkeypatch.setattr(unpublished, "_other_saves", lambda directory, known: (None, {}))
        monkeypatch.setattr(directories, "_own_names", {})
        shardadam.save(tmp_path, step=2, model=model_of(1.0))
        monkeypatch.undo()
        write_manifest(*arguments)

    shardadam.save(tmp_path, step=1, model=model_of(2.0))
    monkeypatch.setattr(saving, "_write_manifest", slow)
    assert "it has saved step-00000002 there" in said(lambda: shardadam.save(tmp_path, step=3, model=model_of(2.0)))
    assert values_in(tmp_path) == {1.0}
    assert names_in(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_a_part_of_another_save_is_refused_when_parts_are_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_part = saving._write_part

    def others(mine: unpublished.Unpublished, *arguments: Any) -> None:
        write_part(mine, *arguments)
        part = mine.path / saving._part_name(0)
        part.write_text(json.dumps(json.loads(part.read_text()) | {"token": "another"}))

    monkeypatch.setattr(saving, "_write_part", others)
    words = said(lambda: shardadam.save(tmp_path, step=1, model=model_of(2.0)))
    assert "another job saves into" in words and "it has written" in words
    assert names_in(tmp_path) == []


def test_jobs_that_begin_at_the_same_moment_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look, both begin, both see each other and withdraw."""
    other_saves, withdrawn = unpublished._other_saves, []

    def also_there(directory: Path, known: Collection[Path]) -> tuple[Path | None, dict[Path, int]]:
        if known and len(withdrawn) < 2:
            withdrawn.extend(known)
            return tmp_path / ".saving-step-00000001.other", {}
        return other_saves(directory, known=known)

    monkeypatch.setattr(unpublished, "_other_saves", also_there)
    assert shardadam.save(tmp_path, step=1, model=model_of(2.0)).name == "step-00000001"
    assert len(set(withdrawn)) == 2 and names_in(tmp_path) == ["latest", "step-00000001"]


# Which saves are dead


def leave(directory: Path, token: str, *, seconds_ago: float = 0.0) -> Path:
    """What a save leaves when it is killed."""
    path = directory / f".saving-step-00000001.{token}"
    path.mkdir()
    alive = path / "alive"
    alive.write_text("process 7 on elsewhere")
    os.utime(alive, (time.time() - seconds_ago,) * 2)
    return path


@pytest.fixture
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpublished, "WATCH_S", 0.5)


@pytest.mark.usefixtures("quick_watch")
def test_a_save_elsewhere_is_removed_once_it_has_been_silent_for_long(tmp_path: Path) -> None:
    left = leave(tmp_path, "7-1-00000000-00000000", seconds_ago=unpublished.DEAD_S - 30)
    assert said(lambda: shardadam.save(tmp_path, step=1, model=model_of(1.0))) == "step-00000001"
    assert left.exists()
    os.utime(left / "alive", (time.time() - unpublished.DEAD_S - 1,) * 2)
    assert said(lambda: shardadam.save(tmp_path, step=2, model=model_of(1.0))) == "step-00000002"
    assert names_in(tmp_path) == ["latest", "step-00000001", "step-00000002"]


@pytest.mark.parametrize("seconds_ago", [0.0, 1e6])  # its clock may be wrong
def test_a_save_elsewhere_that_shows_signs_of_life_is_not_touched(tmp_path: Path, seconds_ago: float) -> None:
    left = leave(tmp_path, "7-1-00000000-00000000", seconds_ago=seconds_ago)
    done = threading.Event()

    def show_life() -> None:
        beat = 0
        while not done.wait(0.1):
            beat += 1
            os.utime(left / "alive", (time.time() - seconds_ago + beat,) * 2)

    thread = threading.Thread(target=show_life)
    thread.start()
    try:
        words = said(lambda: shardadam.save(tmp_path, step=2, model=model_of(1.0)))
    finally:
        done.set()
        thread.join()
    assert "process 7 on elsewhere is writing step-00000001" in words
    assert names_in(tmp_path) == [left.name] and names_in(left) == ["alive"]


@pytest.mark.usefixtures("quick_watch")
def test_a_process_of_this_machine_tells_whether_its_save_is_dead(tmp_path: Path) -> None:
    pid = os.getppid()
    started, machine = unpublished._started(pid), unpublished._machine()
    dead = [
        leave(tmp_path, f"{os.getpid()}-{unpublished._started(os.getpid())}-{machine}-00000000"),  # failed, say
        leave(tmp_path, f"{pid}-{started + 1}-{machine}-00000000"),  # type: ignore[operator]
        leave(tmp_path, f"{2**22 + 1}-1-{machine}-00000000"),
    ]
    stopped = leave(tmp_path, f"{pid}-{started}-{machine}-00000000", seconds_ago=1e6)
    assert said(lambda: shardadam.save(tmp_path, step=1, model=model_of(1.0))) == "step-00000001"
    assert not any(path.exists() for path in dead) and stopped.exists()
    leave(tmp_path, f"{pid}-{started}-{machine}-11111111")  # so busy that it shows no sign of life while it is watched
    assert "process 7 on elsewhere is writing" in said(lambda: shardadam.save(tmp_path, step=2, model=model_of(1.0)))


def test_what_others_planted_keeps_no_save(tmp_path: Path) -> None:
    """Files in place of directories, links and pipes are removed like other leftovers, not followed."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    (directory / ".saving-step-00000001.x").symlink_to(kept)
    (directory / ".deleting-step-00000001").symlink_to(kept)
    os.mkfifo(directory / ".deleting-step-00000002")
    os.mkdir(directory / ".saving-step-00000003.y")
    os.mkfifo(directory / ".saving-step-00000003.y" / "alive")
    unpublished_before = unpublished.WATCH_S
    unpublished.WATCH_S = 0.1
    try:
        assert said(lambda: shardadam.save(directory, step=1, model=model_of(1.0))) == "step-00000001"
    finally:
        unpublished.WATCH_S = unpublished_before
    assert names_in(kept) == ["file"]
    assert [name for name in names_in(directory) if name.startswith(".deleting")] == []


def test_an_asynchronous_save_of_another_job_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within one process, as two threads that train would."""
    write_part, go_on = saving._write_part, threading.Event()

    def held(*arguments: Any) -> None:
        go_on.wait(20)
        write_part(*arguments)

    monkeypatch.setattr(saving, "_write_part", held)
    saved = shardadam.save(tmp_path, step=1, model=model_of(1.0), asynchronous=True)
    with pytest.raises(CheckpointError, match="is writing step-00000001"):
        directories.create_unpublished(tmp_path, 1)
    go_on.set()
    assert saved.result(20).name == "step-00000001"
    assert values_in(tmp_path) == {1.0} and names_in(tmp_path) == ["latest", "step-00000001"]
    assert torch.is_grad_enabled()
