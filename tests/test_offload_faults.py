# SPDX-License-Identifier: Apache-2.0
"""Full and failing disks, shared and removed directories, and killed processes: an error on all ranks, and no
parameter half written.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import shardadam
from shardadam import DiskOffload, ShardedAdamW
from shardadam.engine import norms
from shardadam.offload.files import StateFile
from tests.ranks import on_ranks, rank_and_size

WIDTH = 80
ROOT = Path(__file__).parent.parent


class Run:
    """A model whose buckets are all about as large, and its optimizer."""

    def __init__(
        self, offload: Any, *, update: Any = "step", transport: Any = "auto", frozen: int | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5)))
        if frozen is not None:
            self.model[frozen].requires_grad_(False)
        self.optimizer = ShardedAdamW(
            self.model.named_parameters(), lr=1e-2, bucket_mb=0.02, offload=offload, update=update, transport=transport
        )

    def backward(self, step: int) -> None:
        random = torch.Generator().manual_seed(100 * step + rank_and_size()[0])
        self.model(torch.randn(4, WIDTH, generator=random)).square().mean().backward()

    def train(self, *steps: int) -> None:
        for step in steps:
            self.backward(step)
            self.optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def everything(self) -> list[Tensor]:
        state = [value for p in self.model.parameters() for value in self.optimizer.full_state(p).values()]
        return self.values() + [value.clone() for value in state]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def failing(method: str, *, after: int, rank: int, number: int = errno.EIO) -> Iterator[None]:
    """Make ``StateFile.<method>`` fail on one rank, from the call ``after`` on."""
    calls = iter(range(10**6))
    real = getattr(StateFile, method)

    def call(file: StateFile, *arguments: Any) -> None:
        if next(calls) >= after and rank_and_size()[0] == rank:
            raise OSError(number, os.strerror(number))
        real(file, *arguments)

    with mock.patch.object(StateFile, method, call):
        yield


# Full disks


def built_on_full_disk(path: str, rank: int) -> tuple[str, str]:
    """Build where one rank finds no room; return the type of its error and the message."""
    fallocate = os.posix_fallocate

    def full(descriptor: int, offset: int, nbytes: int) -> None:
        if rank_and_size()[0] == rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(descriptor, offset, nbytes)

    with mock.patch.object(os, "posix_fallocate", full), pytest.raises((OSError, RuntimeError)) as caught:
        Run(DiskOffload(path))
    return type(caught.value).__name__, str(caught.value)


def test_a_full_disk_is_an_error_at_construction_on_all_ranks(tmp_path: Path) -> None:
    (_, told), (kind, message) = on_ranks(2, built_on_full_disk, str(tmp_path), 1)
    assert kind == "OSError"
    assert "bytes free in" in message and "needed 139264" in message and "Make room" in message
    assert "bytes free in" in told and "Rank 1" in told
    assert os.listdir(tmp_path) == []


def added_on_full_disk(path: str, rank: int) -> bool:
    """A param group for which there is no room is not added; training goes on without it."""
    runs = [Run(DiskOffload(path)), Run(None)]
    added = nn.Linear(10, 10)
    for run in runs:
        run.train(0)
    fallocate = os.posix_fallocate

    def full(*arguments: Any) -> None:
        if rank_and_size()[0] == rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(*arguments)

    with mock.patch.object(os, "posix_fallocate", full), pytest.raises((OSError, RuntimeError), match="bytes free"):
        runs[0].optimizer.add_param_group({"params": [*added.named_parameters(prefix="added")]})
    for run in runs:
        run.train(1)
    assert len(runs[0].optimizer.param_groups) == 1
    return equal(runs[0].everything(), runs[1].everything())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_param_group_without_room_is_not_added(world_size: int, tmp_path: Path) -> None:
    assert on_ranks(world_size, added_on_full_disk, str(tmp_path), world_size - 1) == [True] * world_size


def test_a_small_file_system(tmp_path: Path) -> None:
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", tmp_path]).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(OSError, match=r"found \d+ bytes free in .*, needed \d+ for the state.*No space left"):
            Run(DiskOffload(tmp_path))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# Failing disks


def trained_on_failing_disk(path: str, method: str, after: int, update: str, transport: str) -> dict[str, Any]:
    """Save, then train on a disk that fails on rank 1 (0 if alone), until all ranks raise; load, and train on."""
    bad = rank_and_size()[1] - 1
    expected = Run(None, update=update, transport=transport)
    expected.train(0, 1)
    run = Run(DiskOffload(path), update=update, transport=transport)
    run.train(0, 1)
    shardadam.save(f"{path}/saved", model=run.model, optimizer=run.optimizer, step=2)
    before = run.values()
    errors = []
    with failing(method, after=after, rank=bad):
        for attempt in range(2):
            if attempt == 1 and errors[0] and update == "backward":
                errors.append(errors[0])  # that step is not over
                break
            run.backward(2)
            try:
                run.optimizer.step()
                errors.append("")
            except (RuntimeError, ValueError) as error:
                errors.append(str(error))
            if attempt == 0:
                between = run.values()
    with pytest.raises((RuntimeError, shardadam.CheckpointError)):
        shardadam.save(f"{path}/broken", model=run.model, optimizer=run.optimizer, step=3)
    shardadam.load(f"{path}/saved", model=run.model, optimizer=run.optimizer)
    run.optimizer.zero_grad()
    run.train(2, 3)
    expected.train(2)
    after_step = expected.values()
    expected.train(3)
    return {
        "errors": errors,
        "whole": not half_written(run, before, between, after_step),
        "resumed": equal(run.everything(), expected.everything()),
        "values": between,
    }


def half_written(run: Run, before: list[Tensor], between: list[Tensor], after: list[Tensor]) -> bool:
    """Return whether a shard is neither as before the step nor as after it."""
    flat = [torch.cat([t.flatten() for t in tensors]) for tensors in (before, between, after)]
    starts, at = {}, 0
    for param in run.optimizer._engine.parameters.params:
        starts[param.index] = 0
    for parameter in run.model.parameters():
        param = run.optimizer._engine.parameters.find(parameter)
        starts[param.index] = at
        at += parameter.numel()
    for bucket in run.optimizer._engine.parameters.buckets:
        for rank in range(bucket.plan.world_size):
            kinds = set()
            for segment in bucket.plan.shard_segments(rank):
                index = bucket.arena.params[segment.parameter].index
                part = slice(starts[index] + segment.start, starts[index] + segment.start + segment.numel)
                old, now, new = (tensor[part] for tensor in flat)
                kinds.add("old" if torch.equal(now, old) else "new" if torch.equal(now, new) else "mixed")
            if len(kinds) > 1 or "mixed" in kinds:
                return True
    return False


FAILURES = [
    ("read", 0, "step"),
    ("read", 3, "step"),
    ("write", 0, "step"),
    ("write", 5, "step"),
    ("read", 2, "backward"),
    ("write", 2, "backward"),
]


@pytest.mark.sweep(6)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("method", "after", "update"), FAILURES)
def test_a_failing_disk_is_an_error_on_all_ranks(
    method: str, after: int, update: str, world_size: int, tmp_path: Path
) -> None:
    """The rank itself raises at the end of its step, all ranks raise in the next, until a checkpoint is loaded."""
    arguments = (str(tmp_path), method, after, update, "auto")
    results = on_ranks(world_size, trained_on_failing_disk, *arguments)
    verb = {"read": "reading", "write": "writing"}[method]
    for rank, result in enumerate(results):
        first, second = result["errors"]
        # A failure in backward is known before the step.
        fails_at_once = rank == world_size - 1 or update == "backward"
        assert (f"{verb} its state in {tmp_path} failed (Input/output error" in first) == fails_at_once
        assert f"{verb} its state in {tmp_path} failed (Input/output error" in second
        assert result["whole"]
        assert result["resumed"]
        assert update == "backward" or equal(result["values"], results[0]["values"])


def test_a_failing_disk_with_collective_transport(tmp_path: Path) -> None:
    results = on_ranks(2, trained_on_failing_disk, str(tmp_path), "read", 3, "step", "collective")
    assert all(result["errors"][1] and result["whole"] and result["resumed"] for result in results)


def flushed_too_late(path: str) -> list[str]:
    """Where files use the page cache, the disk may fail after the step."""
    errors = []
    with mock.patch.object(StateFile, "_can_read_directly", make_indirect):
        run = Run(DiskOffload(path))
    with failing("flush", after=2, rank=1):
        for step in range(3):
            run.backward(step)
            try:
                run.optimizer.step()
                errors.append("")
            except (RuntimeError, ValueError) as error:
                errors.append(str(error))
            time.sleep(0.2)
    return errors


def make_indirect(file: StateFile) -> bool:
    import fcntl

    fcntl.fcntl(file._descriptor, fcntl.F_SETFL, 0)
    return False


def test_write_behind_may_fail_late(tmp_path: Path) -> None:
    for errors in on_ranks(2, flushed_too_late, str(tmp_path)):
        assert all("Input/output error" in error for error in errors[1:])


def ratios_of_lost_state(path: str, how: str) -> str:
    """Rank 1's state cannot be read, or could not be written behind the last step."""
    with mock.patch.object(StateFile, "_can_read_directly", make_indirect):
        run = Run(DiskOffload(path))
    run.train(0)
    run.optimizer.update_ratios()
    unreadable = OSError(errno.EIO, os.strerror(errno.EIO)) if how == "read" and rank_and_size()[0] == 1 else None
    with failing("flush", after=10**6 * (how == "read"), rank=1):
        run.backward(1)
        with suppress(RuntimeError):
            run.optimizer.step()
        with mock.patch.object(norms, "_squares", side_effect=unreadable, wraps=norms._squares):
            try:
                return f"nothing: {run.optimizer.update_ratios()}"
            except (OSError, RuntimeError) as error:
                return str(error)


@pytest.mark.parametrize("how", ["read", "flush"])
def test_ratios_of_lost_state_are_an_error_on_all_ranks(how: str, tmp_path: Path) -> None:
    """One rank raised while the others waited for it, or returned ratios of state that it had lost."""
    for message in on_ranks(2, ratios_of_lost_state, str(tmp_path), how):
        assert "Input/output error" in message and not message.startswith("nothing")


# Directories


def trained_in(path: str, removes: bool) -> bool:
    run, expected = Run(DiskOffload(path)), Run(None)
    run.train(0)
    if removes and rank_and_size()[0] == 0:
        os.rmdir(path)
    run.train(1, 2)
    expected.train(0, 1, 2)
    return equal(run.everything(), expected.everything())


@pytest.mark.parametrize("removes", [False, True], ids=["shared", "removed"])
def test_ranks_may_share_a_directory_which_may_go(removes: bool, tmp_path: Path) -> None:
    """Files have no names: no two ranks, jobs or optimizers can have the same one, and nobody can remove it."""
    path = tmp_path / "state"
    path.mkdir()
    assert on_ranks(2, trained_in, str(path), removes) == [True, True]
    assert removes or os.listdir(path) == []


# Killed processes

SCRIPT = """
import sys
import torch
import shardadam
from shardadam import DiskOffload
from tests.test_offload_faults import Run

run = Run(DiskOffload(sys.argv[1] + "/state"))
saved = sys.argv[1] + "/saved"
first = shardadam.load(saved, model=run.model, optimizer=run.optimizer).step if shardadam.has_checkpoint(saved) else 0
for step in range(first, int(sys.argv[2])):
    run.train(step)
    if step % 3 == 0:
        shardadam.save(saved, model=run.model, optimizer=run.optimizer, step=step + 1)
    print(step, flush=True)
torch.save(run.everything(), sys.argv[1] + "/result")
"""


def test_a_killed_run_leaves_nothing_and_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "100000"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 5:
            break
    time.sleep(0.05 * random.random())  # somewhere in a step
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    process.stdout.close()
    assert os.listdir(tmp_path / "state") == []
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), "40"], cwd=ROOT, check=True, capture_output=True)
    expected = Run(None)
    expected.train(*range(40))
    assert equal(torch.load(tmp_path / "result"), expected.everything())


def unfrozen_on_full_disk(path: str) -> bool:
    """While there is no room for the state of a parameter that is unfrozen, each step raises and changes nothing."""
    runs = [Run(DiskOffload(path), frozen=2), Run(None, frozen=2)]
    for run in runs:
        run.train(0)
        run.model[2].requires_grad_(True)
        run.backward(1)
    before = runs[0].values()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "posix_fallocate", side_effect=full):
        for _ in range(2):
            with pytest.raises((OSError, RuntimeError), match="bytes free"):
                runs[0].optimizer.step()
    unchanged = equal(runs[0].values(), before)
    for run in runs:
        run.optimizer.step()
        run.train(2)
    return unchanged and equal(runs[0].everything(), runs[1].everything())


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_unfrozen_parameter_waits_for_room(world_size: int, tmp_path: Path) -> None:
    assert on_ranks(world_size, unfrozen_on_full_disk, str(tmp_path)) == [True] * world_size
