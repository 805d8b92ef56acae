# SPDX-License-Identifier: Apache-2.0
"""``shardadam export`` and ``shardadam inspect``: their output, exit codes and error messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import shardadam
from shardadam.cli import main
from tests.ranks import on_ranks
from tests.runs import build


def save(directory: str) -> None:
    run = build((torch.float32, "int8", "auto"))
    for step in (1, 2):
        run.train([step])
        shardadam.save(directory, step=step, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    on_ranks(2, save, str(tmp_path))
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_inspect_counts_parameters_and_bytes(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(directory), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    checkpoint = directory / "step-00000002"
    sizes = {path.name: path.stat().st_size for path in checkpoint.glob("*.bin")}
    assert found["path"] == str(checkpoint) and found["others"] == ["step-00000001"]
    assert (found["step"], found["world_size"], found["whole"], found["verified"]) == (2, 2, True, "checksums")
    assert (found["shardadam"], found["torch"]) == (shardadam.__version__, torch.__version__)
    assert {entry["name"]: entry["bytes"] for entry in found["files"]} == sizes
    assert found["bytes"] == sum(sizes.values())
    assert sum(entry["bytes"] for entry in (*found["tensors"], found["objects"])) == found["bytes"]
    model = build().model
    numel = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found["parameters"]["elements"] == numel
    rows = {(entry["kind"], entry["dtype"]): entry for entry in found["tensors"]}
    assert list(rows) == [
        ("model", "float32"),
        ("model", "int64"),
        ("exp_avg", "int8"),
        ("exp_avg_sq", "uint8"),
        ("scales", "float32"),
    ]
    assert rows["exp_avg", "int8"]["elements"] == rows["exp_avg", "int8"]["bytes"] == numel
    assert rows["model", "int64"] == {"kind": "model", "dtype": "int64", "tensors": 1, "elements": 1, "bytes": 8}


def test_inspect_prints_an_aligned_table(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(directory / "step-00000001"), "--no-verify"]) == 0
    printed = capsys.readouterr().out
    facts, tensors, files = ([line for line in part.splitlines()] for part in printed.split("\n\n"))
    assert {line[:13].strip(): line[13:] for line in facts}.items() >= {
        "checkpoint": str(directory / "step-00000001"),
        "step": "1",
        "saved on": "2 ranks",
        "others here": "step-00000002",
        "whole": "sizes only",
    }.items()
    for table in (tensors, files):
        assert len({len(line) for line in table}) == 1  # the last column is aligned to the right


def test_inspect_finds_damage_and_with_no_verify_only_wrong_sizes(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(directory / "step-00000002" / "rank-00001.bin")
    assert main(["inspect", str(directory), "--no-verify"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(directory)]) == 1
    printed = capsys.readouterr()
    assert "rank-00001.bin is damaged" in printed.err and "whole        no\n" in printed.out
    assert main(["inspect", str(directory), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["whole"] is False and "rank-00001.bin is damaged" in found["error"]
    with (directory / "step-00000002" / "rank-00000.bin").open("ab") as file:
        file.write(b"x")
    assert main(["inspect", str(directory), "--no-verify"]) == 1
    assert "rank-00000.bin is damaged" in capsys.readouterr().err
    assert main(["inspect", str(directory / "step-00000001")]) == 0


def test_export_prints_the_files_it_has_written(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = directory / "a" / "b"
    assert main(["export", str(directory), "--format", "safetensors", "--output", str(output)]) == 0
    printed = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == [str(output / "model.safetensors"), str(output / "optimizer.safetensors")]
    assert main(["export", str(directory), "--format", "safetensors", "--output", str(output)]) == 1
    assert "exists already" in capsys.readouterr().err
    (directory / "file").touch()
    assert main(["export", str(directory), "--format", "torch", "--output", str(directory / "file")]) == 1
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect"], ["export", "--format", "torch"]], ids=str)
def test_a_path_without_a_checkpoint_is_one_message_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    for path, reason in [(tmp_path, "holds no checkpoint"), (tmp_path / "none", "no such directory")]:
        assert main([*command, str(path)]) == 1
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["export", "."], ["export", ".", "--format", "onnx"], ["inspect"]], ids=str)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: shardadam" in capsys.readouterr().err


def test_runs_as_a_module_and_prints_no_traceback_when_its_output_is_closed(directory: Path) -> None:
    flip(directory / "step-00000002" / "rank-00001.bin")
    command = [sys.executable, "-m", "shardadam.cli", "inspect", str(directory)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "is damaged" in process.stderr and "Traceback" not in process.stderr
    closed, broken = os.pipe()
    os.close(closed)
    process = subprocess.run(command, stdout=broken, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(broken)
    assert process.returncode == 1 and "Traceback" not in process.stderr and "BrokenPipe" not in process.stderr


def test_importing_it_imports_no_slow_modules() -> None:
    """Modules such as torch._dynamo take seconds to import and must stay lazy."""
    program = "import sys, shardadam.cli; print({'torch._dynamo', 'safetensors', 'triton'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == "set()"
