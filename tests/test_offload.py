# SPDX-License-Identifier: Apache-2.0
"""Training with state in files equals training with state in memory, bit for bit, and the state is where it is said."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import shardadam
from shardadam import DiskOffload, HostOffload, Memory, Precision, ShardedAdamW
from shardadam.offload import files
from shardadam.offload.regions import BLOCK_BYTES
from shardadam.planner import Setting, plan
from tests.ranks import on_ranks, rank_and_size
from tests.runs import FORMATS, build, differences

ALL = [pytest.param(format, id="-".join(map(str, format))) for format in FORMATS]
SOME = [FORMATS[0], FORMATS[2], FORMATS[4], (torch.bfloat16, "fp32", "split"), (torch.bfloat16, "bf16", "none")]


def files_of_this_process() -> set[str]:
    """Return the open files without a name."""
    links = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # that of listdir
            continue
    return {link for link in links if link.endswith(" (deleted)") and "shardadam-state" in link}


@contextmanager
def directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="shardadam-state-", dir="/var/tmp") as path:
        yield path


def trained(format: Any, offload: Any, **options: Any) -> dict[str, Tensor]:
    run = build(format, offload=offload, **options)
    run.train(range(4))
    found = run.everything()
    if options.get("ema_decay") is not None:
        with run.optimizer.averaged_parameters():
            found |= {f"averaged {name}": p.detach().clone() for name, p in run.model.named_parameters()}
        run.train(range(4, 6))
        found |= {f"later {name}": value for name, value in run.everything().items()}
    return found


def compare(format: Any, **options: Any) -> list[str]:
    """Return the names of tensors that differ between training with state in files and in memory."""
    expected = trained(format, None, **options)
    with directory() as path:
        found = trained(format, DiskOffload(path), **options)
    return differences(expected, found)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("format", ALL)
def test_every_format_trains_as_in_memory(format: Any) -> None:
    assert compare(format) == []


@pytest.mark.sweep(4)
@pytest.mark.parametrize("bucket_mb", [0.003, 0.02, 10])
@pytest.mark.parametrize("format", SOME[:3], ids=str)
def test_buckets_of_any_size_do(format: Any, bucket_mb: float) -> None:
    """Smaller than a block, some blocks long with bytes of two buckets in one block, and a single one."""
    assert compare(format, bucket_mb=bucket_mb) == []


OPTIONS: list[dict[str, Any]] = [
    {"gradient_sync": "backward", "transport": "collective", "ema_decay": 0.9},
    {"update": "backward", "transport": "shared_memory", "ema_decay": 0.9},
    {"gradient_sync": "backward", "transport": "shared_memory"},
    {"gradient_sync": "backward", "transport": "collective", "max_grad_norm": 0.01},
    {"gradient_sync": "step", "transport": "shared_memory", "max_grad_norm": 0.01},
    {"gradient_sync": "step", "transport": "collective"},
    {"gradient_sync": "external", "transport": "collective"},
    {"update": "backward", "transport": "shared_memory"},
    {"update": "backward", "transport": "collective"},
]


@pytest.mark.sweep(6)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("format", SOME[1:4], ids=str)
def test_ranks_do(options: dict[str, Any], format: Any) -> None:
    assert on_ranks(2, compare_options, format, options) == [[]] * 2


@pytest.mark.sweep(1)
@pytest.mark.parametrize("options", [OPTIONS[2], OPTIONS[8]], ids=str)
def test_four_ranks_do(options: dict[str, Any]) -> None:
    assert on_ranks(4, compare_options, FORMATS[2], options) == [[]] * 4


def compare_options(format: Any, options: dict[str, Any]) -> list[str]:
    return compare(format, **options)


class Changing(nn.Module):
    """Parts that take part in some steps only, or are frozen, or added later."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(60, 60) for _ in range(4))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        for index in used:
            x = x + self.parts[index](x).tanh()
        return x.float().square().mean()


def changing(offload: Any, update: Any) -> list[Tensor]:
    """Train with unused, unfrozen and added parameters, accumulation, skipped steps, and writes from outside."""
    rank, _ = rank_and_size()
    torch.manual_seed(1)
    model = Changing().bfloat16()
    model.parts[2].requires_grad_(False)
    optimizer = ShardedAdamW(
        [p for part in model.parts[:3] for p in part.parameters()],
        lr=1e-2,
        bucket_mb=0.004,
        offload=offload,
        update=update,
    )
    for step, used in enumerate([[0, 1, 2], [0, 1], [0, 1, 2], [1, 2], [0, 1, 2, 3], [0, 2, 3], [3], [0, 1]]):
        random = torch.Generator().manual_seed(10 * step + rank)
        if step == 2:
            model.parts[2].requires_grad_(True)
        if step == 4:
            optimizer.add_param_group({"params": list(model.parts[3].parameters()), "lr": 3e-2})
        if step == 5:
            with torch.no_grad():
                model.parts[0].weight.mul_(1.5)
        if step == 6:
            optimizer.state[model.parts[3].weight]["exp_avg"].mul_(0.5)
        if step == 7:
            optimizer.state[model.parts[0].bias].clear()
        with optimizer.no_sync():
            model(torch.randn(3, 60, generator=random).bfloat16(), used).backward()
        loss = model(torch.randn(3, 60, generator=random).bfloat16(), used)
        (loss * float("inf") if step == 3 and update == "step" else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [p.detach().clone() for p in model.parameters()]
    return found + [value for p in model.parameters() for value in optimizer.full_state(p).values()]


def compare_changing(update: str) -> bool:
    expected = changing(None, update)
    with directory() as path:
        found = changing(DiskOffload(path), update)
    return all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("update", ["step", "backward"])
def test_parameters_may_change_their_part(update: str, world_size: int) -> None:
    assert on_ranks(world_size, compare_changing, update) == [True] * world_size


def test_a_file_system_without_direct_io_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and writes then use the page cache, and give its pages back."""
    given_back = []
    monkeypatch.setattr(files.StateFile, "_can_read_directly", lambda file: make_indirect(file))
    fadvise = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: (given_back.append(a), fadvise(*a)))
    assert compare(FORMATS[2]) == []
    assert {advice for *_, advice in given_back} == {os.POSIX_FADV_DONTNEED}


def make_indirect(file: files.StateFile) -> bool:
    import fcntl

    fcntl.fcntl(file._descriptor, fcntl.F_SETFL, 0)
    return False


# Where the state is


def test_memory_says_where_it_is() -> None:
    memories = []
    for offload in (None, DiskOffload("/var/tmp")):
        model = nn.Linear(300, 200).bfloat16()
        optimizer = ShardedAdamW(model.parameters(), bucket_mb=0.02, offload=offload)
        model(torch.ones(1, 300).bfloat16()).sum().backward()
        optimizer.step()
        memories.append(asdict(optimizer.memory()))
        largest = max(bucket.plan.shard_numel for bucket in optimizer._engine.parameters.buckets)
    resident, offloaded = memories
    assert offloaded["on_disk"] == resident["moments"] + resident["master"] > 0
    assert offloaded["moments"] == offloaded["master"] == offloaded["on_host"] == 0
    # 10 bytes of state an element, and the blocks around those of three tensors
    assert 2 * 10 * largest <= offloaded["offload_buffers"] <= 2 * (10 * largest + 6 * BLOCK_BYTES)
    changed = {"on_disk", "moments", "master", "offload_buffers"}
    assert {k: v for k, v in offloaded.items() if k not in changed} == {
        k: v for k, v in resident.items() if k not in changed
    }


def planned_and_held(format: Any, options: dict[str, Any]) -> list[tuple[Memory, Memory]]:
    dtype, moments, master = format
    precision = Precision(moments=moments, master=master)
    found = []
    for bucket_mb in (0.003, 0.1):
        parameters = [
            nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((300, 40), (129,), (), (0,), (64, 64))
        ]
        optimizer = ShardedAdamW(
            parameters, precision=precision, bucket_mb=bucket_mb, offload=DiskOffload("/var/tmp"), **options
        )
        setting = Setting(
            world_size=rank_and_size()[1], precision=precision, bucket_mb=bucket_mb, offload="disk", **options
        )
        found.append((plan(parameters, setting), optimizer.memory()))
    return found


@pytest.mark.sweep(4)
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("format", SOME, ids=str)
def test_a_plan_equals_optimizer_memory(format: Any, world_size: int) -> None:
    for of_rank in on_ranks(world_size, planned_and_held, format, {"gradient_sync": "step"}):
        for expected, found in of_rank:
            assert expected == found


def test_files_have_no_names_and_go_with_the_optimizer() -> None:
    with directory() as path:
        before = files_of_this_process()
        model = nn.Linear(100, 100)
        optimizer = ShardedAdamW(model.parameters(), offload=DiskOffload(path))
        assert os.listdir(path) == []
        assert len(files_of_this_process()) == len(before) + 1
        del optimizer
        assert files_of_this_process() == before


def test_state_of_an_optimizer_that_is_gone_stays_readable() -> None:
    model = nn.Linear(10, 10)
    optimizer = ShardedAdamW(model.parameters(), offload=DiskOffload("/var/tmp"))
    model(torch.ones(2, 10)).sum().backward()
    optimizer.step()
    exp_avg = optimizer.state[model.weight]["exp_avg"]
    expected = exp_avg.clone()
    del optimizer
    assert torch.equal(exp_avg, expected) and bool(expected.any())


# Checkpoints


def saved_and_loaded(format: Any, path: str, to: Any) -> list[str]:
    """Save a run with state in files, load it into another one, and train on."""
    with directory() as scratch:
        run = build(format, offload=DiskOffload(scratch))
        run.train(range(2))
        shardadam.save(path, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler, step=2)
        other = build(format, seed=1, offload=DiskOffload(scratch) if to == "disk" else None)
        shardadam.load(path, model=other.model, optimizer=other.optimizer, scheduler=other.scheduler)
        different = differences(run.everything(), other.everything())
        random = torch.get_rng_state()  # of dropout
        run.train(range(2, 4))
        torch.set_rng_state(random)
        other.train(range(2, 4))
        different += differences(run.everything(), other.everything())
        return [name for name in different if "running" not in name]  # buffers differ between ranks


@pytest.mark.sweep(4)
@pytest.mark.parametrize("to", ["disk", "memory"])
@pytest.mark.parametrize("format", SOME, ids=str)
def test_checkpoints_hold_all_of_it(format: Any, to: str, tmp_path: Path) -> None:
    assert on_ranks(2, saved_and_loaded, format, str(tmp_path), to) == [[]] * 2


def save_at(format: Any, path: str) -> dict[str, Tensor]:
    with directory() as scratch:
        run = build(format, offload=DiskOffload(scratch))
        run.train(range(2))
        shardadam.save(path, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler, step=2)
        return run.everything()


def load_at(format: Any, path: str) -> dict[str, Tensor]:
    with directory() as scratch:
        run = build(format, seed=1, offload=DiskOffload(scratch))
        shardadam.load(path, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
        return run.everything()


@pytest.mark.parametrize("format", [FORMATS[2], (torch.bfloat16, "int8", "split")], ids=str)
def test_reshards(format: Any, tmp_path: Path) -> None:
    (saved, _) = on_ranks(2, save_at, format, str(tmp_path))
    assert differences(saved, load_at(format, str(tmp_path))) == []


def state_dicts(format: Any) -> list[str]:
    """Return what differs after ``state_dict`` and ``load_state_dict``, and in ``full_state_dict``."""
    with directory() as scratch:
        run = build(format, offload=DiskOffload(scratch))
        run.train(range(2))
        plain = build(format)
        plain.train(range(2))
        other = build(format, offload=DiskOffload(scratch))
        other.model.load_state_dict(run.model.state_dict())
        other.optimizer.load_state_dict(run.optimizer.state_dict())
        found = differences(run.everything(), other.everything())
        run.optimizer.check_in_sync(run.model)
        wholes = [one.optimizer.full_state_dict(all_ranks=True)["state"] for one in (run, plain)]
        for index, entry in wholes[0].items():
            found += [f"{index}.{k}" for k, v in entry.items() if not torch.equal(v, wholes[1][index][k])]
        assert all(entry["exp_avg"].numel() == 0 or bool(entry["exp_avg"].any()) for entry in wholes[0].values())
        return found


@pytest.mark.sweep(2)
@pytest.mark.parametrize("format", SOME, ids=str)
def test_state_dicts_hold_all_of_it(format: Any) -> None:
    assert on_ranks(2, state_dicts, format) == [[]] * 2


def through_dcp(path: str) -> list[str]:
    format = (torch.bfloat16, "int8", "split")
    with directory() as scratch:
        run = build(format, offload=DiskOffload(scratch))
        run.train(range(2))
        dcp.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, checkpoint_id=path)
        other = build(format, seed=1, offload=DiskOffload(scratch))
        state = {"model": other.model.state_dict(), "optimizer": other.optimizer.state_dict()}
        dcp.load(state, checkpoint_id=path)
        other.model.load_state_dict(state["model"])
        other.optimizer.load_state_dict(state["optimizer"])
        different = differences(run.everything(), other.everything())
        return [name for name in different if "running" not in name]  # buffers differ between ranks


def test_dcp_saves_and_loads_it(tmp_path: Path) -> None:
    assert on_ranks(2, through_dcp, str(tmp_path)) == [[]] * 2


# Arguments


def kinds_that_differ(path: str) -> str:
    rank, _ = rank_and_size()
    with pytest.raises(ValueError) as caught:
        ShardedAdamW(nn.Linear(3, 3).parameters(), offload=DiskOffload(path) if rank else None)
    return str(caught.value)


def test_ranks_must_choose_the_same_kind(tmp_path: Path) -> None:
    for message in on_ranks(2, kinds_that_differ, str(tmp_path)):
        assert "offload" in message and "DiskOffload()" in message and "None" in message


def test_host_offload_is_refused_for_parameters_on_the_host() -> None:
    with pytest.raises(ValueError, match=r"HostOffload\(\).*in host memory already.*DiskOffload"):
        ShardedAdamW(nn.Linear(3, 3).parameters(), offload=HostOffload())


def test_other_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"offload: found 'disk', expected None, HostOffload\(\) or DiskOffload"):
        ShardedAdamW(nn.Linear(3, 3).parameters(), offload="disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"found no directory .*missing.*mkdir"):
        ShardedAdamW(nn.Linear(3, 3).parameters(), offload=DiskOffload(tmp_path / "missing"))
