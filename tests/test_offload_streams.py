# SPDX-License-Identifier: Apache-2.0
"""On CUDA, offloaded state is copied in and out without a race, without waiting of the host, and equals state on the
device. Runs on simulated streams (``simulated_streams.py``), with the threads of ``DiskOffload`` run at once.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import shardadam
from shardadam import DiskOffload, HostOffload, Precision, ShardedAdamW, sums
from shardadam.offload import disk, files, host
from tests.simulated_streams import Simulation

BFLOAT16 = Precision(moments="fp32", master="fp32")
SPLIT = Precision(moments="int8", master="split")


class Inline:
    """An executor that runs everything at once."""

    def __init__(self, *_: Any) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*arguments))
        return done

    def shutdown(self, **_: Any) -> None:
        pass


@dataclass
class Job:
    model: nn.Sequential
    optimizer: ShardedAdamW

    def step(self, index: int) -> None:
        random = torch.Generator().manual_seed(index)
        inputs = torch.randn(4, 40, generator=random).to(torch.bfloat16).to("cuda")
        self.model(inputs).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(offload: Any, precision: Precision, update: Any = "step", layers: int = 5, bucket_mb: float = 0.003) -> Job:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(layers))).to(torch.bfloat16).to("cuda")
    optimizer = ShardedAdamW(
        model.parameters(), lr=1e-2, bucket_mb=bucket_mb, precision=precision, offload=offload, update=update
    )
    return Job(model, optimizer)


def accessed_by_host(simulation: Simulation, memory: Tensor) -> memoryview:
    """As ``memory_of``, whose bytes are then read from a file, or written to one."""
    simulation._host_access(memory, "a read or a write of a file", is_write=True)
    return files.memory_of(memory)


@contextmanager
def simulated(simulation: Simulation, *, kernels: bool = False) -> Iterator[None]:
    with ExitStack() as stack:
        if not kernels:
            stack.enter_context(mock.patch.object(sums, "KERNEL_DEVICES", set()))
        stack.enter_context(mock.patch.object(disk, "ThreadPoolExecutor", Inline))
        stack.enter_context(mock.patch.object(disk, "memory_of", partial(accessed_by_host, simulation)))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: True))
        stack.enter_context(simulation.running())
        yield


def offload_of(kind: str | None, path: Path) -> Any:
    return {"host": HostOffload(), "disk": DiskOffload(path), None: None}[kind]


def train(kind: str | None, path: Path, simulation: Simulation, steps: int = 4, **options: Any) -> list[Tensor]:
    """Train; return parameters and whole states. ``simulation.waits`` is that of the last step alone."""
    kernels = options.pop("kernels", False)
    with simulated(simulation, kernels=kernels):
        job = build(offload_of(kind, path), **options)
        for index in range(steps):
            simulation.waits.clear()
            job.step(index)
        waits = dict(simulation.waits)
        found = [p.detach().cpu().clone() for p in job.model.parameters()]
        for parameter in job.model.parameters():
            found += [value.cpu().clone() for value in job.optimizer.full_state(parameter).values()]
        simulation.waits.clear()
        simulation.waits.update(waits)
        del job
    return found


@pytest.mark.sweep(6)
@pytest.mark.parametrize("layers", [4, 5])
@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("precision", [BFLOAT16, SPLIT], ids=["fp32", "int8"])
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_offloaded_state_equals_state_on_the_device(
    kind: str, precision: Precision, update: str, layers: int, tmp_path: Path
) -> None:
    """Also with an odd number of buckets, of which each is in the other buffer in the next step."""
    options: dict[str, Any] = {"precision": precision, "update": update, "layers": layers}
    simulation = Simulation()
    found, expected = train(kind, tmp_path, simulation, **options), train(None, tmp_path, Simulation(), **options)
    assert [str(one) for one in simulation.findings] == []
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("update", ["step", "backward"])
def test_the_host_does_not_wait_for_copies(update: str, tmp_path: Path) -> None:
    simulation, plain = Simulation(), Simulation()
    pytest.importorskip("triton")
    train("host", tmp_path, simulation, precision=SPLIT, update=update, kernels=True)
    train(None, tmp_path, plain, precision=SPLIT, update=update, kernels=True)
    assert [str(one) for one in simulation.findings] == []
    waits = [{place for place in one.waits if not place.startswith("test_")} for one in (simulation, plain)]
    assert waits[0] == waits[1]


def test_the_whole_state_is_saved_and_loaded(tmp_path: Path) -> None:
    simulation = Simulation()
    with simulated(simulation):
        job, other = build(HostOffload(), SPLIT), build(HostOffload(), SPLIT)
        job.step(0)
        shardadam.save(tmp_path, model=job.model, optimizer=job.optimizer, step=1)
        shardadam.load(tmp_path, model=other.model, optimizer=other.optimizer)
        job.step(1)
        other.step(1)
        other.optimizer.load_state_dict(job.optimizer.state_dict())
        for one, another in zip(job.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(one.cpu(), another.cpu())
            states = [run.optimizer.full_state(p) for run, p in ((job, one), (other, another))]
            assert all(torch.equal(value.cpu(), states[1][name].cpu()) for name, value in states[0].items())
        job.optimizer.check_in_sync(job.model)
        del job, other, states, one, another
    assert [str(one) for one in simulation.findings] == []


def test_a_captured_step(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    simulation = Simulation()
    with simulated(simulation, kernels=True):
        job = build(HostOffload(), SPLIT)
        for index in range(3):
            job.step(index)
        inputs = torch.ones(4, 40, device="cuda", dtype=torch.bfloat16)
        with torch.cuda.stream(simulation.stream("capturing")), simulation.capture():  # type: ignore[arg-type]
            job.model(inputs).float().square().mean().backward()
            job.optimizer.step()
            job.optimizer.zero_grad()
        job.step(3)
        del job
    assert [str(one) for one in simulation.findings] == []


# Each wait is needed


MUTANTS = [
    ("host", host.HostStore.on_device, "current.wait_stream(slot.stream)", "pass"),
    ("host", host.HostStore.on_device, "slot.stream.wait_stream(current)", "pass"),
    ("host", host.HostStore._fill, "slot.stream.wait_event(stored.pending)", "pass"),
    ("host", host.HostStore.settle, "slot.stream.synchronize()", "pass"),
    ("disk", disk.DiskStore.on_device, "torch.cuda.current_stream(stored.device).wait_event(slot.loaded)", "pass"),
    ("disk", disk._start_copy_back, "slot.stream.wait_stream(torch.cuda.current_stream(device))", "pass"),
    ("disk", disk.DiskStore._write_regions, "copied.synchronize()", "pass"),
]


@pytest.mark.parametrize(("kind", "function", "before", "after"), MUTANTS, ids=[m[2] for m in MUTANTS])
def test_a_wait_that_is_left_out_is_found(kind: str, function: Any, before: str, after: str, tmp_path: Path) -> None:
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(before) == 1
    module = inspect.getmodule(function)
    assert module is not None
    namespace: dict[str, Any] = {}
    exec(compile(source.replace(before, after), module.__file__ or "", "exec"), vars(module), namespace)
    owner: Any = module
    *path, name = function.__qualname__.split(".")
    for part in path:
        owner = getattr(owner, part)
    simulation = Simulation()
    with mock.patch.object(owner, name, namespace[name]):
        # With one bucket, its next copy in is the first thing after its copy out, in the other buffer.
        train(kind, tmp_path, simulation, precision=SPLIT, bucket_mb=1.0 if "pending" in before else 0.003)
    assert any(one.kind == "race" for one in simulation.findings), simulation.findings
