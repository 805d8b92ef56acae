# SPDX-License-Identifier: Apache-2.0
"""An exported checkpoint holds exactly what was saved, loads without shardadam, and is written with little memory."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import shardadam
from shardadam import CheckpointError, Precision, ShardedAdamW
from shardadam.checkpoint import values
from shardadam.checkpoint.export import ALIGNMENT_BYTES, FORMATS, SAFETENSORS_DTYPES, export
from tests.parity import build_parameters, quadratic
from tests.ranks import on_ranks, rank_and_size
from tests.runs import FORMATS as PRECISIONS
from tests.runs import build, differences

TORCH, SAFETENSORS, TRAINER = FORMATS
PLAIN = (TORCH, SAFETENSORS)  # of any checkpoint; tests/test_export_trainer.py has the other


def saved(directory: str, precision: Any = PRECISIONS[0]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Save; return the state of the model, and on rank 0 that of the optimizer."""
    run = build(precision)
    run.train(range(3))
    shardadam.save(directory, step=3, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    model = {name: value.clone(memory_format=torch.preserve_format) for name, value in run.model.state_dict().items()}
    return model, run.optimizer.full_state_dict()


def exported(directory: Path, format: Any, **options: Any) -> list[Any]:
    """Export, and return the contents of the files of model and optimizer."""
    paths = export(directory, format=format, output=directory / "exported", **options)
    suffix = "pt" if format == TORCH else "safetensors"
    assert [path.name for path in paths] == [f"model.{suffix}", f"optimizer.{suffix}"]
    assert sorted((directory / "exported").iterdir()) == sorted(paths)
    if format == TORCH:
        return [torch.load(path, weights_only=True) for path in paths]
    return [safetensors.torch.load_file(path) for path in paths]


def flattened(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{index}.{kind}": value for index, entry in state.items() for kind, value in entry.items()}


def names_of(optimizer: dict[str, Any]) -> dict[int, str]:
    return {
        index: name
        for group in optimizer["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    }


@pytest.mark.sweep(4)
@pytest.mark.parametrize("chunk_numel", [128, 384, values.CHUNK_NUMEL])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(map(str, p)))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_torch_files_hold_the_saved_state_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, precision: Any, chunk_numel: int
) -> None:
    monkeypatch.setattr(values, "CHUNK_NUMEL", chunk_numel)
    model, optimizer = on_ranks(world_size, saved, str(tmp_path), precision)[0]
    found_model, found_optimizer = exported(tmp_path, TORCH)
    assert differences(model, found_model) == []
    assert {name: t.stride() for name, t in model.items()} == {name: t.stride() for name, t in found_model.items()}
    expected, found = flattened(optimizer["state"]), flattened(found_optimizer["state"])
    assert differences(expected, found) == []
    convolution = next(index for index, name in names_of(optimizer).items() if name == "conv.weight")
    assert found[f"{convolution}.exp_avg"].is_contiguous(memory_format=torch.channels_last)
    tied = found_model["tied.weight"], found_model["again.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    for group, found_group in zip(optimizer["param_groups"], found_optimizer["param_groups"], strict=True):
        del group["param_names"]
        assert group == found_group


@pytest.mark.sweep(3)
@pytest.mark.parametrize("chunk_numel", [128, values.CHUNK_NUMEL])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: "-".join(map(str, p)))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_safetensors_files_hold_the_saved_state_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, precision: Any, chunk_numel: int
) -> None:
    monkeypatch.setattr(values, "CHUNK_NUMEL", chunk_numel)
    model, optimizer = on_ranks(world_size, saved, str(tmp_path), precision)[0]
    found_model, found_state = exported(tmp_path, SAFETENSORS)
    assert json.loads(metadata(tmp_path / "exported/model.safetensors")["aliases"]) == {"again.weight": "tied.weight"}
    del model["again.weight"]
    assert differences(model, found_model) == []
    names = names_of(optimizer)
    steps = {names[index]: float(entry.pop("step")) for index, entry in optimizer["state"].items()}
    expected = {f"state.{names[i]}.{k}": value for i, e in optimizer["state"].items() for k, value in e.items()}
    assert differences(expected, found_state) == []
    about = metadata(tmp_path / "exported/optimizer.safetensors")
    assert json.loads(about["steps"]) == steps
    for group, found in zip(optimizer["param_groups"], json.loads(about["param_groups"]), strict=True):
        assert found["params"] == group.pop("param_names") and found["betas"] == list(group["betas"])
        kept = group.keys() - {"params", "betas"}
        assert {key: found[key] for key in kept} == {key: group[key] for key in kept}


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    assert found["format"] == "pt"
    return found


SHAPES = ((), (0, 3), (7, 15), (129,), (4, 3, 5, 2), (45, 101))


class Quadratic(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weights = nn.ParameterList(build_parameters(SHAPES, seed))

    def forward(self, rank: int, step: int) -> Tensor:
        return quadratic(list(self.weights), rank, step)


def save_and_train_on(directory: str) -> dict[str, Tensor]:
    model = Quadratic()
    optimizer = ShardedAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, bucket_mb=0.002)
    for step in range(6):
        if step == 3:
            shardadam.save(directory, step=step, model=model, optimizer=optimizer)
        model(rank_and_size()[0], step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_torchs_adamw_resumes_from_an_export(tmp_path: Path, world_size: int) -> None:
    expected = on_ranks(world_size, save_and_train_on, str(tmp_path))[0]
    found_model, found_optimizer = exported(tmp_path, TORCH)
    model = Quadratic(seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    assert found_optimizer["param_groups"][0].keys() == optimizer.state_dict()["param_groups"][0].keys()
    model.load_state_dict(found_model)
    optimizer.load_state_dict(found_optimizer)
    for step in range(3, 6):
        for rank in range(world_size):
            (model(rank, step) / world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


class Extra(nn.Module):
    """Many tensors of one shape, which only their order tells apart, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.full((5,), float(i))) for i in range(120)])

    def get_extra_state(self) -> Any:
        return {"amax": torch.arange(3.0), "names": ["a", "b"]}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("zip64_from_bytes", [8, 2**30])
@pytest.mark.parametrize("mmap", [False, True])
def test_every_tensor_of_a_torch_file_has_its_own_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mmap: bool, zip64_from_bytes: int
) -> None:
    monkeypatch.setattr("shardadam.checkpoint.export._ZIP64_FROM_BYTES", zip64_from_bytes)
    model = Extra()
    optimizer = ShardedAdamW(model.parameters(), lr=torch.tensor(0.25))
    for index, parameter in enumerate(model.weights):
        parameter.grad = torch.full((5,), 1000.0 + index)
    optimizer.step()
    shardadam.save(tmp_path, step=1, model=model, optimizer=optimizer)
    paths = export(tmp_path, format=TORCH, output=tmp_path / "out")
    found_model, found_optimizer = (torch.load(path, weights_only=True, mmap=mmap) for path in paths)
    extra = found_model["_extra_state"]
    assert torch.equal(extra["amax"], torch.arange(3.0)) and extra["names"] == ["a", "b"]
    assert torch.equal(torch.as_tensor(found_optimizer["param_groups"][0]["lr"]), torch.tensor(0.25))
    model.load_state_dict(found_model)
    for index, parameter in enumerate(model.weights):
        assert torch.equal(found_model[f"weights.{index}"], parameter)
        assert torch.equal(found_optimizer["state"][index]["exp_avg"], optimizer.full_state(parameter)["exp_avg"])
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None  # all checksums match
            names = [name.removeprefix("archive/") for name in archive.namelist()]
        reader = torch._C.PyTorchFileReader(str(path))
        assert {reader.get_record_offset(name) % ALIGNMENT_BYTES for name in names} == {0}
    with pytest.raises(CheckpointError, match=r"no tensor.*format torch"):
        export(tmp_path, format=SAFETENSORS, output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", [*SAFETENSORS_DTYPES, torch.complex128], ids=str)
def test_buffers_of_every_dtype_are_exported(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("buffer", torch.arange(24).view(2, 3, 4).to(dtype).transpose(0, 2))
    shardadam.save(tmp_path, step=1, model=model)
    as_bytes = model.buffer.contiguous().view(torch.uint8)
    for format in PLAIN:
        if (dtype, format) == (torch.complex128, SAFETENSORS):
            with pytest.raises(CheckpointError, match="complex128"):
                export(tmp_path, format=format, output=tmp_path / "out")
            continue
        (path,) = export(tmp_path, format=format, output=tmp_path / "out")
        load: Any = torch.load if format == TORCH else safetensors.torch.load_file
        found = load(path)["buffer"]
        assert found.dtype == dtype and torch.equal(found.contiguous().view(torch.uint8), as_bytes)
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("format", PLAIN)
def test_damaged_input_is_refused_and_leaves_no_output(tmp_path: Path, format: Any) -> None:
    on_ranks(2, saved, str(tmp_path), PRECISIONS[2])
    checkpoint = tmp_path / "step-00000003"
    exported(tmp_path, format)
    for name in ("rank-00000.bin", "rank-00001.bin", "checkpoint.json"):
        whole = (checkpoint / name).read_bytes()
        for position in (10, len(whole) // 2, len(whole) // 3):
            (checkpoint / name).write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
            with pytest.raises(CheckpointError, match=f"{name} is damaged"):
                export(tmp_path, format=format, output=tmp_path / "some/other")
            assert not (tmp_path / "some").exists()
        (checkpoint / name).write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            export(tmp_path, format=format, output=tmp_path / "some/other")
        (checkpoint / name).write_bytes(whole)
    (checkpoint / "rank-00001.bin").unlink()
    with pytest.raises(CheckpointError, match=r"not whole: rank-00001\.bin"):
        export(checkpoint, format=format, output=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"exported", "latest", "step-00000003"}


@pytest.mark.parametrize("format", PLAIN)
def test_a_full_disk_leaves_existing_files_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any
) -> None:
    saved(str(tmp_path))
    finished = []

    def full(file: Any) -> None:
        finished.append(file)
        if len(finished) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shardadam.checkpoint.export._finish", full)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(CheckpointError, match="No space left"):
        export(tmp_path, format=format, output=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_existing_files_are_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert export(tmp_path, format=TORCH)[0] == tmp_path / "step-00000003-torch" / "model.pt"
    (tmp_path / "step-00000003-torch" / "model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt exists"):
        export(tmp_path, format=TORCH)
    assert [path.name for path in (tmp_path / "step-00000003-torch").iterdir()] == ["optimizer.pt"]


def test_a_checkpoint_without_model_or_optimizer_exports_the_other_alone(tmp_path: Path) -> None:
    run = build()
    shardadam.save(tmp_path / "a", step=1, model=run.model)
    shardadam.save(tmp_path / "b", step=1, optimizer=run.optimizer)
    for format in PLAIN:
        assert [p.stem for p in export(tmp_path / "a", format=format, output=tmp_path / "a")] == ["model"]
        assert [p.stem for p in export(tmp_path / "b", format=format, output=tmp_path / "b")] == ["optimizer"]


MEASURE = """
import sys
from pathlib import Path
import shardadam.cli

def kib(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

Path("/proc/self/clear_refs").write_text("5")  # reset the peak, which imports have raised
before = kib("VmRSS")
assert shardadam.cli.main(["export", sys.argv[1], "--format", sys.argv[2], "--output", sys.argv[3]]) == 0
print((kib("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("moments", "format"), [("fp32", TORCH), ("int8", SAFETENSORS)])
def test_memory_is_far_below_the_size_of_the_checkpoint(tmp_path: Path, moments: Any, format: str) -> None:
    """The model is a single tensor of 64 MiB; its exported moments are twice as large."""
    model = nn.Linear(4096, 4096, bias=False)
    optimizer = ShardedAdamW(model.parameters(), precision=Precision(moments=moments))
    shardadam.save(tmp_path, step=1, model=model, optimizer=optimizer)
    output = tmp_path / "out"
    command = [sys.executable, "-c", MEASURE, str(tmp_path), format, str(output)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert sum(path.stat().st_size for path in output.iterdir()) > 190 * 2**20
    assert float(printed.splitlines()[-1]) < 48  # MiB
