# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that another job removes while it is loaded is chosen again, the same one on all ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import shardadam
from shardadam import CheckpointError
from shardadam.checkpoint import DcpReader, loading, reader
from shardadam.checkpoint.directory import create_directory, newest
from shardadam.checkpoint.export import export
from shardadam.checkpoint.reader import MAX_CHOICES, Reader
from shardadam.cli import main
from tests.ranks import on_ranks, rank_and_size
from tests.runs import build, differences


def save_steps(directory: str, *steps: int) -> dict[str, torch.Tensor]:
    """Save a checkpoint of each step; return the last."""
    run = build(width=40)
    for step in steps:
        run.train([step])
        shardadam.save(directory, step=step, model=run.model, optimizer=run.optimizer)
    return run.everything()


def hide(directory: Path, step: int) -> Path:
    """Take a checkpoint away, as if it were not saved yet."""
    path = directory / f"step-{step:08d}"
    return path.rename(directory / f"hidden-{step}")


def load_and_say(directory: str, when: str) -> Any:
    """Load, while rank 0 plays the other job: it publishes step 2 and removes step 1 at some moment of the load."""
    rank, _ = rank_and_size()
    run = build(width=40, seed=2)
    run.train(range(1))
    path = Path(directory)

    def other_job() -> None:
        if rank == 0 and (path / "hidden-2").exists():
            (path / "hidden-2").rename(path / "step-00000002")
            shutil.rmtree(path / "step-00000001")
        if dist.is_initialized():
            dist.barrier()

    with pytest.MonkeyPatch.context() as patch:
        if when == "before it is opened":
            real = loading.Reader

            def opened(path: Path) -> Reader:
                other_job()
                return real(path)

            patch.setattr(loading, "Reader", opened)
        else:
            patch.setattr(reader, "_MAX_OPEN", 1)
            real_check, calls = loading.read_tensors, []

            def read(contents: Any, source: Reader) -> None:
                source.close()
                other_job()
                calls.append(source.path.name)
                real_check(contents, source)

            patch.setattr(loading, "read_tensors", read)
        try:
            loaded = shardadam.load(directory, model=run.model, optimizer=run.optimizer)
        except CheckpointError as error:
            return str(error)
    found = run.everything()
    run.train(range(1))  # the optimizer has not been poisoned
    return loaded.step, found


@pytest.mark.parametrize("when", ["before it is opened", "while it is read"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_next_newest_is_loaded_on_all_ranks(tmp_path: Path, world_size: int, when: str) -> None:
    expected = on_ranks(world_size, save_steps, str(tmp_path), 1, 2)[0]
    hide(tmp_path, 2)
    for step, found in on_ranks(world_size, load_and_say, str(tmp_path), when):
        assert step == 2
        assert differences(expected, found) == []


def test_open_files_are_read_to_their_end(tmp_path: Path) -> None:
    save_steps(str(tmp_path), 1)
    with Reader(tmp_path / "step-00000001") as opened:
        shutil.rmtree(tmp_path / "step-00000001")
        assert sum(nbytes for _, nbytes in opened.verify()) > 1000


def remove_for_ever(directory: str, specific: bool) -> str:
    """The other job removes every checkpoint that is chosen."""
    rank, _ = rank_and_size()
    run = build(width=40)
    path = Path(directory)
    count = 0

    def chosen(given: Path) -> Path:
        nonlocal count
        count += 1
        name = path / f"step-{count:08d}"
        return given if specific else name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading.directories, "newest", chosen)
        try:
            shardadam.load(directory, model=run.model, optimizer=run.optimizer, timeout_s=10)
        except CheckpointError as error:
            run.train(range(1))
            assert count == (0 if rank else 2 if specific else MAX_CHOICES + 1)
            return str(error)
    return "loaded"


@pytest.mark.parametrize("specific", [False, True])
def test_choosing_again_ends_with_a_message_on_all_ranks(tmp_path: Path, specific: bool) -> None:
    for said in on_ranks(2, remove_for_ever, str(tmp_path / "none"), specific):
        assert "does not exist, or has been removed since it was chosen" in said and "keep" in said


def load_where_it_is_not_shared(directory: str) -> str:
    """Rank 1 sees another directory under this path, without the checkpoint."""
    rank, _ = rank_and_size()
    run = build(width=40)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            real = loading.Reader
            patch.setattr(loading, "Reader", lambda path: real(path / "of another host"))
        try:
            shardadam.load(directory, model=run.model, optimizer=run.optimizer)
        except CheckpointError as error:
            return str(error)
    return "loaded"


def test_ranks_that_do_not_see_the_checkpoint_are_named(tmp_path: Path) -> None:
    save_steps(str(tmp_path), 1)
    for said in on_ranks(2, load_where_it_is_not_shared, str(tmp_path)):
        assert "exists on rank 0, but not on ranks [1]. Load from a directory that all hosts share" in said


def load_another_on_rank_1(directory: str) -> str:
    """Between the ranks' opening it, another job replaces the checkpoint."""
    rank, _ = rank_and_size()
    run = build(width=40)
    before = run.everything()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            real = loading.Reader
            patch.setattr(loading, "Reader", lambda path: real(path.with_name("step-00000001")))
        try:
            shardadam.load(directory, model=run.model, optimizer=run.optimizer)
        except CheckpointError as error:
            assert differences(before, run.everything()) == []
            return str(error)
    return "loaded a mixture"


def test_ranks_that_read_different_manifests_all_raise(tmp_path: Path) -> None:
    save_steps(str(tmp_path), 1, 2)
    for said in on_ranks(2, load_another_on_rank_1, str(tmp_path)):
        assert "step-00000002 has been replaced while ranks opened it" in said


def while_reading(directory: Path, use: Callable[[], Any]) -> Any:
    """Run ``use``; at the first Reader, step 2 is published and step 1 removed."""
    real = Reader._read_manifest

    def read(self: Reader) -> Any:
        if (directory / "hidden-2").exists():
            (directory / "hidden-2").rename(directory / "step-00000002")
            shutil.rmtree(directory / "step-00000001")
        return real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "_read_manifest", read)
        return use()


def test_every_reader_chooses_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole"
    save_steps(str(whole), 1, 2)
    hide(whole, 2)

    def by_dcp(directory: Path) -> None:
        found = {"model": {"scale": torch.zeros(())}}
        dcp_reader = DcpReader(directory)
        dcp.load(found, storage_reader=dcp_reader, no_dist=True)
        assert dcp_reader.checkpoint_id == directory / "step-00000002"

    uses: list[Callable[[Path], Any]] = [
        by_dcp,
        lambda directory: export(directory, format="torch", output=directory / "out"),
        lambda directory: main(["inspect", str(directory)]),
    ]
    for number, use in enumerate(uses):
        directory = tmp_path / str(number)
        shutil.copytree(whole, directory)
        while_reading(directory, lambda use=use, directory=directory: use(directory))  # type: ignore[misc]
    assert "step-00000002" in capsys.readouterr().out


def load_different_ones_by_dcp(directory: str) -> str:
    """The other job saves while ranks make their readers."""
    rank, _ = rank_and_size()
    dcp_reader = DcpReader(Path(directory) / f"step-{rank + 1:08d}")
    try:
        dcp.load({"model": {"scale": torch.zeros(())}}, storage_reader=dcp_reader)
    except dcp.CheckpointException as error:
        return str(error)
    return "loaded a mixture"


def test_ranks_that_read_different_checkpoints_by_dcp_all_raise(tmp_path: Path) -> None:
    save_steps(str(tmp_path), 1, 2)
    for said in on_ranks(2, load_different_ones_by_dcp, str(tmp_path)):
        assert "Ranks have found different checkpoints" in said and "step-00000001 and" in said


def test_a_checkpoint_that_is_replaced_under_dcp_is_noticed(tmp_path: Path) -> None:
    save_steps(str(tmp_path), 1, 2)
    dcp_reader = DcpReader(tmp_path / "step-00000001")
    dcp_reader.read_metadata()
    dcp_reader._reader = None
    shutil.rmtree(tmp_path / "step-00000001")
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="has been replaced while it was read"):
        dcp_reader.read_data(dcp.LoadPlan([]), dcp.DefaultLoadPlanner())


# Directories


def test_all_new_directories_outlive_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the entry of the innermost one was synced, so that a crash could lose those above it, and the save."""
    synced = []
    monkeypatch.setattr("shardadam.checkpoint.directory.sync_directory", synced.append)
    save_steps(str(tmp_path / "a" / "b" / "c"), 1)
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"} <= set(synced)
    synced.clear()
    assert create_directory(tmp_path / "a" / "d") == [tmp_path / "a" / "d"]
    assert synced == [tmp_path / "a"]
    export(tmp_path / "a" / "b" / "c", format="torch", output=tmp_path / "e" / "f")
    assert {tmp_path, tmp_path / "e"} <= set(synced)


@pytest.mark.parametrize(
    ("given", "below"),
    [
        ("run", "run/checkpoint-20/shardadam"),  # a Trainer's output_dir
        ("run/checkpoint-10", "run/checkpoint-10/shardadam"),  # one of its checkpoints
        ("state", "state/shardadam_0"),  # accelerate's save_state(output_dir)
        ("project", "project/checkpoints/checkpoint_1/shardadam_0"),  # ... with automatic names
    ],
)
def test_a_folder_of_trainer_or_accelerate_says_where_the_checkpoint_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, below: str
) -> None:
    run = build(width=40)
    for name in (
        "run/checkpoint-10/shardadam",
        "run/checkpoint-20/shardadam",
        "state/shardadam_0",
        "project/checkpoints/checkpoint_0/shardadam_0",
        "project/checkpoints/checkpoint_1/shardadam_0",
    ):
        shardadam.save(tmp_path / name, step=1, optimizer=run.optimizer)
        (tmp_path / name).parent.joinpath("config.json").touch()
    assert main(["inspect", str(tmp_path / given)]) == 1
    printed = capsys.readouterr().err
    with pytest.raises(CheckpointError) as error:
        shardadam.load(tmp_path / given, optimizer=run.optimizer)
    assert not shardadam.has_checkpoint(tmp_path / given)
    for said in (printed, str(error.value)):
        assert f"there is one in {tmp_path / below}" in said and "Pass that directory" in said
    assert main(["inspect", str(tmp_path / below)]) == 0


def test_a_search_below_a_directory_ends_and_follows_no_links(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "unreadable").mkdir(mode=0)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        newest(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "latest").write_text("../../step-00000001\n")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        newest(tmp_path / "elsewhere")


def test_a_parameter_called_as_safetensors_metadata_is_refused_by_name(tmp_path: Path) -> None:
    """The tensor took the place of the header's metadata, and no reader opened the file."""
    model = nn.Module()
    model.register_parameter("__metadata__", nn.Parameter(torch.ones(3)))
    shardadam.save(tmp_path, step=1, model=model, optimizer=shardadam.ShardedAdamW(model.named_parameters()))
    with pytest.raises(CheckpointError, match=r"model\.__metadata__ is called.*format torch"):
        export(tmp_path, format="safetensors", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path, _ = export(tmp_path, format="torch", output=tmp_path / "out")
    assert torch.equal(torch.load(path)["__metadata__"], torch.ones(3))
