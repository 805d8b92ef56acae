# SPDX-License-Identifier: Apache-2.0
"""A call to the file system that never returns is an error on all ranks, which names the call."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardadam
from shardadam import CheckpointError, ShardedAdamW
from shardadam.checkpoint import files, saving
from tests.ranks import on_ranks, processes, rank_and_size
from tests.runs import build

TIMEOUT_S = 0.3  # so a call may take 0.6 s


@contextmanager
def hanging(
    name: str,
    *,
    when: Callable[..., bool] = lambda *arguments: True,
    then: Callable[..., Any] = lambda *arguments: None,
) -> Iterator[None]:
    """``os.NAME`` returns only at the end of the block, where a checkpoint is written or read: what ``then`` returns;
    with None, it fails.
    """
    real, over, left = getattr(os, name), threading.Event(), []

    def hang(*arguments: Any, **keywords: Any) -> Any:
        if not threading.current_thread().name.startswith(("shardadam.disk", "shardadam.save")) or not when(*arguments):
            return real(*arguments, **keywords)
        left.append(threading.current_thread())
        over.wait(60)
        found = then(*arguments)
        if found is None:
            raise OSError(errno.EIO, "at last")
        return found

    setattr(os, name, hang)
    try:
        yield
    finally:
        setattr(os, name, real)
        over.set()
        for thread in left:
            thread.join()


def model_of(value: float) -> nn.Linear:
    model = nn.Linear(8, 8)
    for parameter in model.parameters():
        parameter.detach().fill_(value)
    return model


def save(directory: Path | str, step: int, **arguments: Any) -> Any:
    return shardadam.save(directory, step=step, model=model_of(1.0), **arguments)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


CALLS = {
    "mkdir": "creating .*saving",
    "open": "looking into .*",
    "write": "writing .*rank-00000.bin",
    "fsync": "fsync of .*rank-00000.bin",
    "replace": "writing .*checkpoint.json",
    "rename": "publishing .*step-00000002",
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_hangs_is_named(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    with hanging(name), pytest.raises(CheckpointError, match=f"{CALLS[name]}.* has not returned for 0.6 s"):
        save(tmp_path, 2, timeout_s=TIMEOUT_S)
    assert f"{CALLS[name].split()[0]} " in caplog.text and "has not returned for 0 s" in caplog.text
    assert shardadam.load(tmp_path, model=model_of(0.0)).step == 1
    save(tmp_path, 3)
    assert names_in(tmp_path) == ["latest", "step-00000001", "step-00000003"]


def test_old_checkpoints_whose_removal_hangs_keep_no_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with hanging("rmdir"), pytest.warns(UserWarning, match=r"could not be removed: removing .* has not returned"):
        assert save(tmp_path, 2, keep=1, timeout_s=TIMEOUT_S).name == "step-00000002"
    save(tmp_path, 3, keep=1)
    assert names_in(tmp_path) == ["latest", "step-00000003"]


def test_a_read_that_hangs_is_named_and_writes_nothing_later(tmp_path: Path) -> None:
    saved, model = model_of(1.0), model_of(2.0)
    shardadam.save(tmp_path, step=1, model=saved, optimizer=ShardedAdamW(saved.parameters()))
    optimizer = ShardedAdamW(model.parameters())  # whose storage is read into in place

    def is_weight(descriptor: int, buffers: list[memoryview], offset: int) -> bool:
        return len(buffers[0]) == model.weight.nbytes

    def fill(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        buffers[0][:] = b"\xff" * len(buffers[0])
        return len(buffers[0])

    with (
        hanging("preadv", when=is_weight, then=fill),
        pytest.raises(CheckpointError, match=r"reading .*rank-00000.bin has not returned"),
    ):
        shardadam.load(tmp_path, model=model, optimizer=optimizer, random_states=False, timeout_s=TIMEOUT_S)
    assert all(torch.equal(p, torch.full_like(p, 2.0)) for p in model.parameters())
    with hanging("stat"), pytest.raises(CheckpointError, match=r"looking into .* has not returned"):
        shardadam.load(tmp_path, model=model, optimizer=optimizer, timeout_s=TIMEOUT_S)
    shardadam.load(tmp_path, model=model, optimizer=optimizer)
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters())


def save_and_load(directory: str) -> list[str]:
    """Rank 1's disk hangs in a save, then in a load."""
    rank, _ = rank_and_size()
    run = build(width=40)
    arguments: Any = dict(model=run.model, optimizer=run.optimizer, timeout_s=1.0)
    shardadam.save(directory, step=1, **arguments)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardadam").addHandler(handler)
    said = []
    try:
        for name, call in (
            ("fsync", lambda: shardadam.save(directory, step=2, **arguments)),
            ("preadv", lambda: shardadam.load(directory, **arguments)),
        ):
            with hanging(name if rank == 1 else "getppid"):
                try:
                    call()  # type: ignore[no-untyped-call]
                except CheckpointError as error:
                    said.append(str(error))
    finally:
        logging.getLogger("shardadam").removeHandler(handler)
    shardadam.load(directory, **arguments)
    return [*said, "\n".join(lines)]


def test_all_ranks_raise_and_say_who_waits_for_what(tmp_path: Path) -> None:
    """``save`` returned on no rank, because the rank whose disk hung went on to show signs of life."""
    for rank, (saving_, loading, log) in enumerate(on_ranks(2, save_and_load, str(tmp_path))):
        assert "fsync of" in saving_ and "rank-00001.bin has not returned for 2 s" in saving_
        assert "reading" in loading and "has not returned for 2 s" in loading
        if rank == 0:
            assert "failed on rank 1, so on all ranks" in saving_ and "failed on rank 1, so on all ranks" in loading
            assert "waiting for rank 1, for" in log and "(rank 1: fsync of" in log and "(rank 1: reading" in log
        else:
            assert "fsync of" in log and "has not returned for" in log and "waiting for" not in log
    assert names_in(tmp_path) == ["latest", "step-00000001"]


def hang_beside_the_disk(directory: str) -> str:
    """As when a device does not answer: not in a call to the file system."""
    rank, _ = rank_and_size()
    run = build(width=40)
    write_part, over = saving._write_part, threading.Event()
    if rank == 1:
        saving._write_part = lambda *arguments: over.wait(4)  # type: ignore[assignment]
    try:
        return shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer, timeout_s=0.8).name
    except (TimeoutError, CheckpointError) as error:
        return str(error)
    finally:
        saving._write_part = write_part


def test_signs_of_life_end_when_nothing_advances(tmp_path: Path) -> None:
    first, second = on_ranks(2, hang_beside_the_disk, str(tmp_path))
    assert "rank 1 did not arrive within 0.8 s" in first
    assert "arrived after the others had given up" in second or "did not arrive" in second


def save_and_end(directory: str) -> None:
    name = "fsync"
    setattr(os, name, lambda descriptor: threading.Event().wait())
    save(directory, 1, asynchronous=True, timeout_s=TIMEOUT_S)


def test_a_program_whose_last_save_hangs_can_end(tmp_path: Path) -> None:
    process: Any = processes.Process(target=save_and_end, args=(str(tmp_path),))
    process.start()
    process.join(30)
    assert process.exitcode == 1
    assert not shardadam.has_checkpoint(tmp_path)


def test_a_save_in_the_background_that_hangs_is_raised_by_the_next_one(tmp_path: Path) -> None:
    with hanging("fsync"):
        save(tmp_path, 1, asynchronous=True, timeout_s=TIMEOUT_S)
        with pytest.raises(CheckpointError, match=r"The previous save.*fsync of .* has not returned"):
            save(tmp_path, 2)
    assert save(tmp_path, 2).name == "step-00000002"
    assert names_in(tmp_path) == ["latest", "step-00000002"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_an_error_while_data_is_written_back_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The kernel tells it once: the fsync that follows succeeds."""

    def fail(descriptor: int, start: Any, size: Any, flags: int) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(files, "_sync_file_range", fail)
    if number == errno.EINVAL:  # this file system cannot
        assert save(tmp_path, 1).name == "step-00000001"
    else:
        with pytest.raises(CheckpointError, match="Input/output error"):
            save(tmp_path, 1)


def test_a_large_object_is_written_in_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for 10 GB would take longer than the limit of one call, on a disk that does not hang."""
    sizes = []
    write_all = files._write_all

    def counting(descriptor: int, content: memoryview, owner: object) -> None:
        sizes.append(len(content))
        write_all(descriptor, content, owner)

    monkeypatch.setattr(files, "_write_all", counting)
    monkeypatch.setattr(files, "ITEM_BYTES", 2**10)
    writer = files.PartWriter(tmp_path, 0)
    content = bytes(range(256)) * 10
    writer.write_object("object", content)
    assert writer.close().objects["object"].nbytes == len(content)
    assert (tmp_path / files.file_name(0)).read_bytes() == content
    assert sizes == [1024, 1024, 512]
