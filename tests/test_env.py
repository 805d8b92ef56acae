# SPDX-License-Identifier: Apache-2.0
"""``shardadam env`` prints what a bug report needs, and nothing private."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import pytest
import torch

import shardadam
from shardadam.cli import environment, main
from shardadam.transport import unix_sockets


def facts(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["env", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_versions_are_the_running_ones(capsys: pytest.CaptureFixture[str]) -> None:
    versions = facts(capsys)["versions"]
    assert versions["shardadam"] == shardadam.__version__
    assert versions["torch"] == torch.__version__ and versions["CUDA of torch"] == torch.version.cuda
    assert versions["Python"].startswith(platform.python_version())
    for name in ("triton", "transformers", "accelerate"):
        package = pytest.importorskip(name)
        assert versions[name] == package.__version__


def test_the_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    machine = facts(capsys)["machine"]
    assert platform.release() in machine["kernel"]
    assert machine["cores"] == f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    assert (
        machine["CPU"] and machine["memory"].endswith("iB") and machine["threads of torch"] == torch.get_num_threads()
    )


def test_only_variables_of_distributed_training_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {
        "RANK": "3",
        "MASTER_ADDR": "node-0",
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TORCH_LOGS": "+x",
    }
    unwanted = {"SECRET_TOKEN": "hunter2", "HF_TOKEN": "hunter2", "RANKING": "hunter2", "AWS_SECRET": "hunter2"}
    for name, value in (wanted | unwanted).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    variables = facts(capsys)["environment variables"]
    assert variables.items() >= wanted.items() and "WORLD_SIZE" not in variables
    assert "hunter2" not in json.dumps(variables)


def test_shared_memory_is_really_tried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert facts(capsys)["works here"]["shared memory between ranks"] is (unix_sockets.why_unsupported() is None)

    def refuse(*_: Any) -> int:
        raise PermissionError("seccomp says no")

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert facts(capsys)["works here"]["shared memory between ranks"] == "no: seccomp says no"


def test_trying_shared_memory_leaves_no_descriptor() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert unix_sockets.why_unsupported() is None
    assert set(os.listdir("/proc/self/fd")) == before


def test_gpus_are_named_with_their_driver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Properties:
        name, total_memory, major, minor = "NVIDIA H100", 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    real = environment._read
    version = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.3"
    )
    monkeypatch.setattr(environment, "_read", lambda path: version if "nvidia" in path else real(path))
    found = facts(capsys)
    assert found["gpus"] == {
        "driver": "550.54.15",
        "cuda:0": "NVIDIA H100, 80.0 GiB, compute capability 9.0",
        "cuda:1": "NVIDIA H100, 80.0 GiB, compute capability 9.0",
    }


def test_unknown_facts_are_printed_as_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(environment, "_read", lambda path: "")
    monkeypatch.setattr(environment, "_version", lambda package: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = facts(capsys)
    assert found["gpus"] == {} and found["machine"]["system"] is None and found["versions"]["triton"] is None


def test_the_text_has_sections_and_is_ascii(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    sections = printed.split("\n\n")
    assert [section.splitlines()[0] for section in sections] == [
        "versions",
        "machine",
        "gpus",
        "works here",
        "environment variables",
    ]
    assert all(line.startswith("  ") for section in sections for line in section.splitlines()[1:])
    assert f"  torch          {torch.__version__}\n" in printed and "OMP_NUM_THREADS" in sections[-1]
    assert printed.isascii()
