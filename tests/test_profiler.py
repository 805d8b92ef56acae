# SPDX-License-Identifier: Apache-2.0
"""``shardadam.profile``: sums over fake traces of known lengths, and a page from a real loop on two ranks."""

from __future__ import annotations

import time
import warnings
import xml.etree.ElementTree as ET
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardadam
from shardadam.profiler import trace
from shardadam.profiler.profiling import StepProfile, intervals_of, steps_of
from shardadam.profiler.trace import Interval
from tests.ranks import on_ranks, rank_and_size

NODE = "autograd::engine::evaluate_function: AddmmBackward0"
STEP = "profile.step 0"


def event(name: str, category: str, thread: int, start: float, end: float, **args: int) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "tid": thread, "ts": start, "dur": end - start, "args": args}


ON_CPU = [
    event(STEP, "user_annotation", 1, 1000, 2000),
    event("aten::linear", "cpu_op", 1, 1000, 1200),
    event("aten::addmm", "cpu_op", 1, 1050, 1150),
    event("my own range", "user_annotation", 1, 1000, 1900),
    event(NODE, "cpu_op", 1, 1200, 1500),
    event("shardadam.copy_in", "user_annotation", 1, 1300, 1350),
    event("aten::copy_", "cpu_op", 1, 1310, 1340),
    event("Optimizer.step#ShardedAdamW.step", "user_annotation", 1, 1500, 2000),
    event("shardadam.step_sync", "user_annotation", 1, 1510, 1600),
    event("shardadam.update", "user_annotation", 1, 1600, 1900),
    event("gloo:all_to_all", "cpu_op", 9, 1400, 1550),
    event("gloo:all_gather", "cpu_op", 9, 1900, 1990),
]


def test_each_moment_of_a_thread_belongs_to_the_innermost_part() -> None:
    main = [(one.part, one.start, one.end) for one in trace.of_host(ON_CPU) if one.row == "thread 1"]
    assert main == [
        ("forward", 1000, 1200),
        ("backward", 1200, 1300),
        ("copy_in", 1300, 1350),
        ("backward", 1350, 1500),
        ("other", 1500, 1510),
        ("step_sync", 1510, 1600),
        ("update", 1600, 1900),
        ("other", 1900, 2000),
    ]


def test_communication_is_exposed_where_no_thread_computes() -> None:
    (start, end), *_ = steps_of(ON_CPU)
    drawn, counted = intervals_of(ON_CPU, start, end)
    assert drawn == counted and {one.row for one in drawn} == {"main thread", trace.TRANSFERS}
    assert trace.exposed(counted) == 90  # of step_sync; the transfers run beside backward and step()
    without_step = [one for one in counted if one.part != "other"]
    assert trace.exposed(without_step) == 10 + 90 + 90


def test_on_a_gpu_its_streams_count_and_kernels_belong_to_what_launched_them() -> None:
    events = [
        event(STEP, "user_annotation", 1, 0, 100),
        event("shardadam.reduce_scatter", "user_annotation", 2, 30, 40),
        event(NODE, "cpu_op", 2, 20, 29),
        event("cudaLaunchKernel", "cuda_runtime", 1, 5, 6, correlation=1),
        event("cudaLaunchKernel", "cuda_runtime", 2, 21, 22, correlation=2),
        event("cuLaunchKernelEx", "cuda_driver", 2, 38, 39, correlation=4),
        event("cuLaunchKernelEx", "cuda_driver", 1, 50, 51, correlation=5),
        event("gemm", "kernel", 0, 50, 60, correlation=1, stream=7),
        event("gemm", "kernel", 0, 60, 70, correlation=2, stream=7),
        event("ncclDevKernel_ReduceScatter_Sum_f32", "kernel", 0, 65, 85, correlation=4, stream=20),
        event("ncclDevKernel_AllGather_RING", "kernel", 0, 90, 95, correlation=5, stream=20),
    ]
    drawn, counted = intervals_of(events, 0, 100)
    assert [(one.part, one.row) for one in counted] == [
        ("forward", "stream 7"),
        ("backward", "stream 7"),
        ("reduce_scatter", "stream 20"),
        ("all_gather", "stream 20"),
    ]
    assert trace.exposed(counted) == 15 + 5
    assert len(drawn) > len(counted)


def test_what_lies_close_together_is_joined_but_not_across_another_part() -> None:
    one, two, other = Interval("forward", "a", 0, 1), Interval("forward", "a", 2, 3), Interval("update", "a", 1.2, 1.8)
    assert trace.merged([one, two], 1.0) == [Interval("forward", "a", 0, 3)]
    assert trace.merged([one, two], 0.5) == [one, two]
    assert trace.merged([one, other, two], 1.0) == [one, other, two]
    assert trace.duration([Interval("a", "r", 0, 3), Interval("b", "s", 2, 5), Interval("c", "r", 7, 8)]) == 6
    assert trace.duration([Interval("a", "r", 0, 4), Interval("b", "s", 1, 2), Interval("c", "r", 3, 5)]) == 5


def profile_loop(path: Path, transport: Any) -> tuple[list[StepProfile], str, list[int]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    optimizer = shardadam.ShardedAdamW(model.parameters(), bucket_mb=0.05, transport=transport)
    before = []
    with shardadam.profile(path, optimizer, skip=1, steps=3) as profile:
        for _ in range(6):
            model(torch.ones(8, 64) * (rank_and_size()[0] + 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            before.append(len(profile.steps))
            profile.step()
    return profile.steps, str(profile), before


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
def test_a_loop_on_two_ranks_becomes_one_page(transport: str, tmp_path: Path) -> None:
    path = tmp_path / "step.html"
    for rank, (steps, text, before) in enumerate(on_ranks(2, profile_loop, path, transport)):
        assert before == [0, 0, 0, 0, 3, 3]
        heads = [line.partition(":")[0] for line in text.splitlines()]
        assert heads == [f"step {step} on rank {rank} of 2" for step in (2, 3, 4)]
        for step in steps:
            assert all(step.parts[part] > 0 for part in ("forward", "backward", "step_sync", "update", "all_gather"))
            assert 0 < step.exposed_ms < step.ms
            assert step.peak_bytes is None or step.peak_bytes > 1e7
    page = path.read_text()
    svg = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    names = {text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"rank 0: main thread", "rank 1: main thread", "backward", "all-gather"} <= names
    assert ("rank 0: transfers" in names) == (transport == "collective")
    titles = [title.text or "" for title in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title.startswith("backward: ") for title in titles)
    assert page.count("<tr>") == 1 + 3 * 2
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "<script" not in page


def test_a_loop_that_ends_too_early_writes_nothing_and_warns(tmp_path: Path) -> None:
    optimizer = shardadam.ShardedAdamW([nn.Parameter(torch.ones(3))])
    with (
        pytest.warns(UserWarning, match=r"1 steps have ended, expected 2 .*Call profile\.step\(\)"),
        shardadam.profile(tmp_path / "step.html", optimizer, skip=0, steps=2) as profile,
    ):
        profile.step()
    assert str(profile) == "no step profiled: 1 of 2 have ended" and not (tmp_path / "step.html").exists()
    with pytest.raises(ValueError, match="steps=0"):
        shardadam.profile(tmp_path / "step.html", optimizer, steps=0)


def test_a_missing_folder_is_found_before_the_loop(tmp_path: Path) -> None:
    optimizer = shardadam.ShardedAdamW([nn.Parameter(torch.ones(3))])
    with pytest.raises(FileNotFoundError, match=r"found no directory .*missing, expected .*step\.html"):
        shardadam.profile(tmp_path / "missing" / "step.html", optimizer)


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "step.html"
    path.write_text("the one before")
    write_text = Path.write_text

    def half(self: Path, text: str, **options: Any) -> int:
        if self.parent != tmp_path:
            return write_text(self, text, **options)
        write_text(self, text[: len(text) // 2], **options)
        raise OSError("no space left")

    with mock.patch.object(Path, "write_text", half), pytest.raises(OSError, match="no space left"):
        profile_loop(path, "auto")
    assert [one.name for one in tmp_path.iterdir()] == ["step.html"] and path.read_text() == "the one before"


def profile_too_long(path: Path) -> list[str]:
    optimizer = shardadam.ShardedAdamW([nn.Parameter(torch.ones(3))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with shardadam.profile(path, optimizer):
            pass
    return [str(one.message) for one in caught]


def test_a_loop_that_ends_too_early_is_told_once(tmp_path: Path) -> None:
    first, second = on_ranks(2, profile_too_long, tmp_path / "step.html")
    assert len(first) == 1 and second == []


def profile_with_pauses(path: Path, mesh_shape: tuple[int, int]) -> tuple[float, list[str]]:
    """Each rank would write to a folder of its own."""
    rank, _ = rank_and_size()
    mesh = init_device_mesh("cpu", mesh_shape)
    model = nn.Linear(4, 4)
    optimizer = shardadam.ShardedAdamW(model.parameters(), process_group=mesh)
    (path / str(rank)).mkdir()
    with shardadam.profile(path / str(rank) / "step.html", optimizer, skip=0, steps=1) as profile:
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        time.sleep(0.2)
        profile.step()
    return profile.steps[0].ms, sorted(one.name for one in path.glob("*/*"))


def test_a_step_lasts_until_its_end_and_one_of_all_replicas_writes(tmp_path: Path) -> None:
    found = on_ranks(2, profile_with_pauses, tmp_path, (2, 1))
    assert all(ms >= 200 for ms, _ in found)
    assert [str(one.relative_to(tmp_path)) for one in tmp_path.glob("*/*")] == ["0/step.html"]


def profile_beside_another(path: Path) -> str:
    rank, _ = rank_and_size()
    model = nn.Linear(4, 4)
    optimizer = shardadam.ShardedAdamW(model.parameters())
    other = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with pytest.raises(RuntimeError) as found, shardadam.profile(path, optimizer, skip=0, steps=2) as profile:
        for _ in range(2):
            with other if rank == 1 else nullcontext():
                model(torch.ones(1, 4)).sum().backward()
                optimizer.step()
            profile.step()
    return str(found.value)


def test_another_profiler_on_one_rank_raises_on_all(tmp_path: Path) -> None:
    """The other ranks waited for its trace until the timeout, or torch crashed."""
    for message in on_ranks(2, profile_beside_another, tmp_path / "step.html"):
        assert "of 2 profiled steps in the trace of rank 1. Another profiler of torch was running" in message
    assert not (tmp_path / "step.html").exists()
    optimizer = shardadam.ShardedAdamW([nn.Parameter(torch.ones(3))])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as other:
        with pytest.raises(RuntimeError, match="another profiler"):
            shardadam.profile(tmp_path / "step.html", optimizer, skip=0).__enter__()
        torch.ones(3).square()
    assert len(other.events()) > 0
