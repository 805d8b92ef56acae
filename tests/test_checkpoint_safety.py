# SPDX-License-Identifier: Apache-2.0
"""A damaged, foreign or malicious checkpoint is refused by name; its code never runs."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardadam
from shardadam import CheckpointError
from shardadam.checkpoint.directory import newest
from shardadam.checkpoint.files import MANIFEST, manifest_text
from shardadam.checkpoint.reader import Reader
from tests.ranks import on_ranks, rank_and_size
from tests.runs import Run, build, differences

FUZZ_SAMPLE, FUZZ_ALL = 60, 500


def save_run(directory: str, step: int = 3) -> dict[str, torch.Tensor]:
    run = build(width=40)
    run.train(range(step))
    shardadam.save(directory, step=step, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    return run.everything()


def load_into(run: Run, directory: Path | str) -> shardadam.Checkpoint:
    return shardadam.load(directory, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)


def refusal(directory: Path) -> str:
    run = build(width=40, seed=2)
    run.train(range(1))
    before = run.everything()
    with pytest.raises(CheckpointError) as error:
        load_into(run, directory)
    if "now hold a part of the checkpoint" in str(error.value):
        with pytest.raises(RuntimeError, match="Load a whole checkpoint"):
            run.train(range(1))
    else:
        assert differences(before, run.everything()) == []
        run.train(range(1))
    return str(error.value)


def rewrite_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """With correct checksums, as an attacker would."""
    content = json.loads((checkpoint / MANIFEST).read_text())["content"]
    change(content)
    (checkpoint / MANIFEST).write_text(manifest_text(content))


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def replace_object(checkpoint: Path, key: str, content: bytes) -> None:
    name = "rank-00000.bin"
    with (checkpoint / name).open("ab") as file:
        offset = file.tell()
        file.write(content)

    def change(manifest: dict[str, Any]) -> None:
        manifest["index"]["objects"][key] = [0, offset, len(content), zlib.crc32(content)]
        manifest["index"]["files"][0][1] = offset + len(content)

    rewrite_manifest(checkpoint, change)


@pytest.mark.parametrize("key", ["optimizer.param_groups", "scheduler", "rng.0"])
@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(tmp_path: Path, key: str, form: str) -> None:
    save_run(str(tmp_path))
    trap = tmp_path / "it ran"
    payload = {"x": Malicious(trap)}
    if form == "pickle":
        content = pickle.dumps(payload, protocol=2)
    else:
        torch.save(payload, tmp_path / "payload")
        content = (tmp_path / "payload").read_bytes()
    replace_object(tmp_path / "step-00000003", key, content)
    said = refusal(tmp_path)
    assert not trap.exists()
    assert key in said and "step-00000003" in said and "running code" in said
    assert "mkdir" in said
    assert "weights_only" not in said  # torch's message advises to turn the protection off


def test_metadata_of_other_kinds_is_refused_unread(tmp_path: Path) -> None:
    trap = tmp_path / "it ran"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / ".metadata").write_bytes(pickle.dumps(Malicious(trap)))
    assert "torch.distributed.checkpoint" in refusal(foreign)
    save_run(str(tmp_path / "ours"))
    manifest = tmp_path / "ours" / "step-00000003" / MANIFEST
    manifest.write_bytes(pickle.dumps(Malicious(trap)))
    assert str(manifest) in refusal(tmp_path / "ours")
    assert not trap.exists()


MANIPULATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a file elsewhere": lambda c: c["index"]["files"][0].__setitem__(0, "../../rank-00000.bin"),
    "an absolute file": lambda c: c["index"]["files"][0].__setitem__(0, "/etc/passwd"),
    "beyond the file": lambda c: c["index"]["tensors"]["model.first.weight"]["items"][0].__setitem__(3, 10**12),
    "a file that is not listed": lambda c: c["index"]["tensors"]["model.scale"]["items"][0].__setitem__(2, 7),
    "a gap": lambda c: c["index"]["tensors"]["model.first.weight"]["items"][0].__setitem__(0, 1),
    "too few items": lambda c: c["index"]["tensors"]["model.first.weight"]["items"].clear(),
    "a negative size": lambda c: c["index"]["tensors"]["model.scale"]["items"][0].__setitem__(1, -1),
    "a dtype that is none": lambda c: c["index"]["tensors"]["model.scale"].__setitem__("dtype", "load"),
    "an order that is none": lambda c: c["index"]["tensors"]["model.first.weight"].__setitem__("order", [0, 0]),
    "no index": lambda c: c.pop("index"),
    "an index of another kind": lambda c: c.__setitem__("index", 3),
}


@pytest.mark.parametrize("how", MANIPULATIONS)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, how: str) -> None:
    save_run(str(tmp_path))
    rewrite_manifest(tmp_path / "step-00000003", MANIPULATIONS[how])
    assert str(tmp_path / "step-00000003") in refusal(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "missing")
    assert "holds no checkpoint (found nothing)" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "found notes.txt" in refusal(tmp_path)
    assert "not a directory" in refusal(tmp_path / "notes.txt")
    assert not shardadam.has_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, "rank-00000.bin", "rank-00001.bin"])
def test_a_missing_or_shortened_file_is_named_and_no_older_checkpoint_taken_instead(tmp_path: Path, name: str) -> None:
    on_ranks(2, save_run, str(tmp_path), 1)
    on_ranks(2, save_run, str(tmp_path), 3)
    file = tmp_path / "step-00000003" / name
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    said = refusal(tmp_path)
    assert str(file) in said
    file.unlink()
    said = refusal(tmp_path)
    assert name in said and "step-00000003" in said
    load_into(build(width=40), tmp_path / "step-00000001")


def test_a_flipped_byte_is_named_and_the_optimizer_refuses_to_go_on(tmp_path: Path) -> None:
    save_run(str(tmp_path))
    with Reader(tmp_path / "step-00000003") as reader:
        item = reader.index.tensors["optimizer.state.first.weight.exp_avg"].items[0]
    file = tmp_path / "step-00000003" / "rank-00000.bin"
    content = bytearray(file.read_bytes())
    content[item.offset + 5] ^= 0x10
    file.write_bytes(content)
    said = refusal(tmp_path)
    assert str(file) in said and "optimizer.state.first.weight.exp_avg" in said and "now hold a part of" in said


def load_damaged(directory: str) -> list[str]:
    """Only rank 1's part of the state is damaged; all ranks must raise."""
    run = build(width=40)
    said = []
    for attempt in (lambda: load_into(run, directory), lambda: run.train(range(1))):
        try:
            attempt()  # type: ignore[no-untyped-call]
            said.append("nothing")
        except (CheckpointError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_damage_that_one_rank_meets_stops_all(tmp_path: Path) -> None:
    on_ranks(2, save_run, str(tmp_path))
    checkpoint = tmp_path / "step-00000003"
    with Reader(checkpoint) as reader:
        item = reader.index.tensors["optimizer.state.again.bias.exp_avg"].items[-1]
        file = checkpoint / reader.index.files[item.file][0]
    content = bytearray(file.read_bytes())
    content[item.offset] ^= 1
    file.write_bytes(content)
    for loading, stepping in on_ranks(2, load_damaged, str(tmp_path)):
        assert "again.bias.exp_avg" in loading and "rank-0000" in loading
        assert "Load a whole checkpoint" in stepping


# Fuzzing


def test_random_damage_is_refused_or_harmless(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Truncates files and flips bits in all of them, ``latest`` included: never a crash or a wrong tensor."""
    whole = tmp_path / "whole"
    saved = {step: on_ranks(2, save_run, str(whole), step)[0] for step in (1, 3)}
    run = build(width=40)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) == 7
    generator = random.Random(0)
    outcomes = {"refused": 0, "harmless": 0}
    for index in range(FUZZ_ALL if request.config.getoption("--long") else FUZZ_SAMPLE):
        damaged = tmp_path / "damaged"
        shutil.copytree(whole, damaged)
        path = damaged / files[index % len(files)]
        content = bytearray(path.read_bytes())
        if generator.random() < 0.3:
            del content[generator.randrange(len(content)) :]
        else:
            for _ in range(generator.choice((1, 1, 3))):
                content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        start = time.monotonic()
        try:
            loaded = load_into(run, damaged)
        except CheckpointError as error:
            assert "damaged" in str(error) or "whole" in str(error) or "running code" in str(error), str(error)
            outcomes["refused"] += 1
        else:
            assert loaded.step == 3
            assert differences(saved[3], run.everything()) == [], files[index % len(files)]
            outcomes["harmless"] += 1
        assert time.monotonic() - start < 5
        shutil.rmtree(damaged)
    assert min(outcomes.values()) > 0, outcomes


# Directories that cannot be written


def save_and_say(directory: str, full_rank: int | None) -> str:
    rank, _ = rank_and_size()
    run = build(width=40)
    write, written = os.write, 0

    def fill_up(descriptor: int, content: Any) -> int:
        nonlocal written
        if written > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += len(content)
        return write(descriptor, content)

    if rank == full_rank:
        os.write = fill_up
    try:
        shardadam.save(directory, step=9, model=run.model, optimizer=run.optimizer)
    except CheckpointError as error:
        run.train(range(1))
        return str(error)
    finally:
        os.write = write
    return "saved"


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, full_rank: int) -> None:
    saved = on_ranks(2, save_run, str(tmp_path))[0]
    for rank, said in enumerate(on_ranks(2, save_and_say, str(tmp_path), full_rank)):
        assert "No space left on device" in said
        assert rank == full_rank or f"rank {full_rank}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]
    run = build(width=40)
    load_into(run, tmp_path)
    assert differences(saved, run.everything()) == []


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        for said in on_ranks(2, save_and_say, str(small), None):
            assert "No space left on device" in said
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_path_that_cannot_be_written_is_named_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for said in on_ranks(2, save_and_say, str(tmp_path / "file" / "below"), None):
        assert str(tmp_path / "file" / "below") in said and "Not a directory" in said


# latest


def test_latest_missing_or_dangling_gives_the_newest(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save_run(str(tmp_path), step)
    assert newest(tmp_path).name == "step-00000009"
    shutil.rmtree(tmp_path / "step-00000009")
    assert newest(tmp_path).name == "step-00000010"
    (tmp_path / "latest").unlink()
    assert newest(tmp_path).name == "step-00000010"
    assert shardadam.has_checkpoint(tmp_path)


def test_a_digit_changed_in_latest_does_not_lead_to_an_older_checkpoint(tmp_path: Path) -> None:
    for step in (1, 3):
        save_run(str(tmp_path), step)
    latest = tmp_path / "latest"
    latest.write_text(latest.read_text().replace("step-00000003", "step-00000001", 1))
    assert newest(tmp_path).name == "step-00000003"


@pytest.mark.parametrize("change", [('"step":3', '"step":4'), ('"world_size":1', '"world_size":2')])
def test_a_digit_changed_in_the_manifest_is_noticed(tmp_path: Path, change: tuple[str, str]) -> None:
    save_run(str(tmp_path))
    manifest = tmp_path / "step-00000003" / MANIFEST
    assert change[0] in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(*change, 1))
    assert f"{manifest} is damaged" in refusal(tmp_path)
