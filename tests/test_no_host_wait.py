# SPDX-License-Identifier: Apache-2.0
"""On a GPU the host never waits for the device in a step, in any mode, except where this says so.

Runs the library on a fake CUDA device (benchmarks/fake_cuda.py) where everything that would wait raises: ``item``,
``tolist``, ``bool``, ``nonzero``, a synchronize, and each copy between host and device that is not asynchronous and
from, or to, pinned memory. An event that is waited for must be from an earlier step, as the device is a step behind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import shardadam
from shardadam import Precision, ShardedAdamW
from shardadam.sums.to_device import send, send_as_arguments

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
pytest.importorskip("triton")
from fake_cuda import Event, FakeCuda, Observer, fake_cuda
from fake_world import rank_0_of


class HostWait(Exception):
    """The host would wait for the device."""


class Watch(Observer):
    """Raises HostWait in all steps but the first, which may wait: it learns the order of buckets from rank 0."""

    cuda: FakeCuda

    def __init__(self) -> None:
        self.is_strict = False
        self.read_labels: list[tuple[int, int]] = []  # this step, and the step of the event that the host waits for

    def on_wait(self, what: str) -> None:
        if self.is_strict:
            raise HostWait(what)

    def on_synchronize(self, event: Event) -> None:
        self.read_labels.append((self.cuda.label, event.label))
        if self.is_strict and event.label >= self.cuda.label:
            raise HostWait("an event of this step")


@contextmanager
def watched(ranks: int) -> Iterator[tuple[Watch, FakeCuda]]:
    watch = Watch()
    with rank_0_of(ranks, as_nccl=True), fake_cuda(watch) as cuda:
        watch.cuda = cuda
        yield watch, cuda


class Model(nn.Module):
    """Two used layers, one that is used where asked, and a parameter that never is."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        place: Any = {"device": "cuda", "dtype": dtype}
        self.first = nn.Linear(160, 256, **place)
        self.last = nn.Linear(256, 16, **place)
        self.expert = nn.Linear(256, 16, **place)
        self.unused = nn.Parameter(torch.zeros(70, **place))

    def forward(self, inputs: Tensor, use_expert: bool = False) -> Tensor:
        hidden = self.first(inputs)
        return (self.expert(hidden) if use_expert else self.last(hidden)).sum()


Step = Callable[[Model, ShardedAdamW, int], None]


def inputs_of(model: Model) -> Tensor:
    return torch.zeros(4, 160, dtype=model.unused.dtype, device="cuda")


def backward(model: Model, step: int = 0, *, use_expert: bool = False) -> None:
    model(inputs_of(model), use_expert).backward()


def plain(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    backward(model)
    optimizer.step()
    optimizer.zero_grad()


def all_used(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    (model(inputs_of(model)) + model(inputs_of(model), True) + model.unused.sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def experts_in_turn(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    backward(model, use_expert=step % 2 == 0)
    optimizer.step()


def accumulation(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    for _ in range(3):
        backward(model)
    optimizer.step()
    optimizer.zero_grad()


def no_sync(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    with optimizer.no_sync():
        backward(model)
    backward(model, use_expert=True)
    optimizer.step()


def clip_norm(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    backward(model)
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()


def clip_other_norms(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    backward(model)
    optimizer.clip_grad_norm_(1.0, norm_type=1.0)
    optimizer.clip_grad_norm_(torch.tensor(1.0, device="cpu"), norm_type=float("inf"))
    optimizer.clip_grad_norm_(1.0, parameters=model.first.parameters())
    optimizer.step()


def clip_value(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    backward(model)
    optimizer.clip_grad_value_(0.1)
    optimizer.clip_grad_value_(torch.tensor(0.1, device="cpu"), parameters=model.first.parameters())  # type: ignore
    optimizer.clip_grad_norm_(1.0)
    optimizer.clip_grad_value_(0.1)
    optimizer.step()


def rescaled(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    backward(model)
    optimizer._engine.rescale(2.0)  # as in a Join context
    optimizer.step()


def training_loop(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    """What a script does: a scheduler, norms that it keeps without reading them, two micro-batches."""
    if step == 0:
        optimizer.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))  # type: ignore
        optimizer.losses = []  # type: ignore[attr-defined]
    optimizer.zero_grad()
    with optimizer.no_sync():
        backward(model)
    loss = model(inputs_of(model))
    loss.backward()
    optimizer.losses.append(loss.detach())  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.losses.append(optimizer.grad_norm)  # type: ignore[attr-defined]
    optimizer.scheduler.step()  # type: ignore[attr-defined]


def gradient_skipped(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    """A batch that is discarded."""
    backward(model)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def scaled(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    if step == 0:
        with mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False):
            optimizer.scaler = shardadam.GradScaler("cuda")  # type: ignore[attr-defined]
    scaler = optimizer.scaler  # type: ignore[attr-defined]
    scaler.scale(model(inputs_of(model))).backward()
    if step % 2:
        scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def averages_others(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    """Parameters of another optimizer, all with a gradient on this rank."""
    if step == 0:
        optimizer.others = [nn.Parameter(torch.zeros(300, device="cuda")) for _ in range(3)]  # type: ignore
    for other in optimizer.others:  # type: ignore[attr-defined]
        other.grad = torch.zeros_like(other)
    optimizer.average_gradients(optimizer.others)  # type: ignore[attr-defined]
    plain(model, optimizer, step)


def lacks_others(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    optimizer.average_gradients([nn.Parameter(torch.zeros(300, device="cuda"))])
    plain(model, optimizer, step)


def device_lr(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    if step == 0:
        optimizer.param_groups[0]["lr"] = torch.full((), 1e-3, device="cuda")
    plain(model, optimizer, step)


def overlapped(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    if step == 0:
        optimizer.overlap_gather(model)
    backward(model)
    optimizer.step()


def moved(model: Model, optimizer: ShardedAdamW, step: int) -> None:
    """Parameters whose data is replaced between steps, which are bound again."""
    model.first.weight.data = torch.zeros_like(model.first.weight)
    plain(model, optimizer, step)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MODES: dict[str, tuple[Step, torch.dtype, dict[str, Any]]] = {
    "plain": (plain, BF16, {}),
    "plain, clipped": (plain, BF16, {"max_grad_norm": 1.0}),
    "no bucket is ever complete": (plain, BF16, {"bucket_mb": 1.0}),
    "all used": (all_used, FP32, {"max_grad_norm": 1.0}),
    "experts in turn": (experts_in_turn, BF16, {"max_grad_norm": 1.0}),
    "accumulation": (accumulation, BF16, {"max_grad_norm": 1.0}),
    "no_sync": (no_sync, BF16, {}),
    "clip_grad_norm_": (clip_norm, FP32, {}),
    "clip_grad_norm_, other norms": (clip_other_norms, BF16, {}),
    "clip_grad_value_": (clip_value, BF16, {}),
    "rescale": (rescaled, FP32, {"max_grad_norm": 1.0}),
    "training loop": (training_loop, BF16, {"max_grad_norm": 1.0}),
    "GradScaler": (scaled, FP32, {"max_grad_norm": 1.0}),
    "GradScaler, float16 parameters": (scaled, FP16, {}),
    "exact sums": (accumulation, BF16, {"precision": Precision(accumulate="fp32"), "max_grad_norm": 1.0}),
    "overlap_gather": (overlapped, BF16, {"max_grad_norm": 1.0}),
    "int8": (accumulation, BF16, {"precision": Precision(moments="int8"), "max_grad_norm": 1.0}),
    "bf16 moments, no masters": (plain, BF16, {"precision": Precision(moments="bf16", master="none")}),
    "averages": (experts_in_turn, BF16, {"ema_decay": 0.9, "max_grad_norm": 1.0}),
    "averages, float64": (all_used, FP64, {"ema_decay": 0.9}),
    "fp32 masters": (plain, BF16, {"precision": Precision(master="fp32")}),
    "float16": (accumulation, FP16, {"max_grad_norm": 1.0}),
    "float64": (all_used, FP64, {"max_grad_norm": 1.0}),
    "average_gradients": (averages_others, BF16, {}),
    "lr on the device": (device_lr, BF16, {}),
    "p.data replaced": (moved, FP32, {}),
    "step": (plain, BF16, {"gradient_sync": "step", "max_grad_norm": 1.0}),
    "step, accumulation": (accumulation, BF16, {"gradient_sync": "step", "max_grad_norm": 1.0}),
    "step, training loop": (training_loop, FP32, {"gradient_sync": "step", "max_grad_norm": 1.0}),
    "step, clip_grad_value_": (clip_value, FP32, {"gradient_sync": "step"}),
    "step, GradScaler": (scaled, FP32, {"gradient_sync": "step"}),
    "external": (plain, BF16, {"gradient_sync": "external", "max_grad_norm": 1.0}),
    "external, accumulation": (accumulation, BF16, {"gradient_sync": "external", "max_grad_norm": 1.0}),
    "external, other norms": (clip_other_norms, BF16, {"gradient_sync": "external"}),
    "external, GradScaler": (scaled, FP32, {"gradient_sync": "external"}),
}


def run(step: Step, dtype: torch.dtype, options: dict[str, Any], ranks: int, *, mesh: bool = False) -> Watch:
    """Run five steps; all but the first must not wait."""
    with watched(ranks) as (watch, cuda):
        cuda.label = -1
        model = Model(dtype)
        group = init_device_mesh("cpu", (2, ranks // 2)) if mesh else None
        options = {"bucket_mb": 0.05, "transport": "collective", "process_group": group, **options}
        optimizer = ShardedAdamW(model.parameters(), **options)
        for number in range(5):
            cuda.label, watch.is_strict = number, number > 0
            step(model, optimizer, number)
        watch.is_strict = False
    return watch


@pytest.mark.parametrize("mode", MODES)
def test_no_step_but_the_first_waits_for_the_device(mode: str) -> None:
    run(*MODES[mode], 8)


@pytest.mark.sweep(12)
@pytest.mark.parametrize("mode", MODES)
def test_one_rank_does_not_wait_for_the_device(mode: str) -> None:
    run(*MODES[mode], 1)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("mode", MODES)
def test_hybrid_sharding_does_not_wait_for_the_device(mode: str) -> None:
    run(*MODES[mode], 8, mesh=True)


def test_the_host_reads_the_result_of_a_sync_in_the_next_step() -> None:
    """Later would be possible; in the same step it would wait for that step's backward."""
    watch = run(*MODES["experts in turn"], 8)
    assert watch.read_labels == [(step, step - 1) for step in range(1, 5)]


def test_only_the_first_step_with_new_parameters_waits() -> None:
    with watched(8) as (watch, cuda):
        model = Model(BF16)
        model.last.requires_grad_(False)
        optimizer = ShardedAdamW(model.parameters(), transport="collective", max_grad_norm=1.0)
        for number in range(9):
            cuda.label, watch.is_strict = number, number % 3 != 0
            if number == 3:
                optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(300, device="cuda"))], "lr": 1e-4})
            if number == 6:
                model.last.requires_grad_(True)
            experts_in_turn(model, optimizer, number)


WAITING: dict[str, tuple[Step, torch.dtype, int]] = {
    # torch's kernel, which updates float64, has no mask: the host must leave the parameters out.
    "float64 parameters, some without a gradient": (plain, FP64, 8),
    "average_gradients of a parameter without a gradient": (lacks_others, BF16, 8),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_is_documented_to_wait_does(name: str) -> None:
    """The watch sees it; if one of these waits no more, move it to ``MODES``."""
    step, dtype, ranks = WAITING[name]
    with pytest.raises(HostWait):
        run(step, dtype, {}, ranks)


@pytest.mark.parametrize("values", [[], [True, False, True], [1.5, -2.0, 0.0], list(range(300))])
def test_values_sent_as_arguments_of_kernels_arrive(values: list[float]) -> None:
    sent = send_as_arguments(values, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(sent, torch.tensor(values, dtype=torch.float64), rtol=0, atol=0)


def test_a_captured_step_reads_no_host_memory() -> None:
    """A graph would read it at every replay, when it may have been freed, or written again."""
    with watched(1) as (watch, cuda):
        cuda.label, watch.is_strict, cuda.is_capturing = 1, True, True
        before = cuda.pinned_count
        send([True, False], torch.float64, torch.device("cuda"))
        assert cuda.pinned_count == before
        cuda.is_capturing = False
        send([True, False], torch.float64, torch.device("cuda"))
        assert cuda.pinned_count == before + 1


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: t[0, 0].item(),
    "float": lambda t: float(t.sum()),
    "int": lambda t: int(t.sum()),
    "bool": lambda t: bool(t[0, 0] > 0),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu", non_blocking=True),
    "to, with a dtype": lambda t: t.to(dtype=torch.float64, device="cpu"),
    "copy_": lambda t: torch.empty(2, 2, device="cpu").copy_(t, non_blocking=True),
    "copy_, pinned but blocking": lambda t: torch.empty(2, 2, device="cpu", pin_memory=True).copy_(t),
    "from the host": lambda t: torch.zeros(5, device="cpu").to("cuda", non_blocking=True),
    "from the host, copy_": lambda t: t.copy_(torch.zeros(2, 2, device="cpu"), non_blocking=True),
    "from the host, pinned but blocking": lambda t: t.copy_(torch.zeros(2, 2, device="cpu").pin_memory()),
    "from the host, assigned": lambda t: t.__setitem__(0, torch.zeros(2, device="cpu")),
    "torch.tensor": lambda t: torch.tensor(1.0, device="cuda"),
    "torch.as_tensor": lambda t: torch.as_tensor([1.0], device=t.device),
    "nonzero": lambda t: t.nonzero(),
    "a mask": lambda t: t[t > 0],
    "a mask, assigned": lambda t: t.__setitem__(t > 0, 1.0),
    "masked_select": lambda t: t.masked_select(t > 0),
    "unique": lambda t: t.unique(),
    "equal": lambda t: torch.equal(t, t + 1),
    "repeat_interleave": lambda t: t.repeat_interleave(torch.zeros(2, dtype=torch.int64, device="cuda"), dim=0),
    "torch.cuda.synchronize": lambda t: torch.cuda.synchronize(),
    "Stream.synchronize": lambda t: torch.cuda.current_stream().synchronize(),
    "Event.synchronize": lambda t: torch.cuda.current_stream().record_event().synchronize(),
}
ALLOWED: dict[str, Callable[[Tensor], Any]] = {
    "to the host, pinned": lambda t: torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True),
    "from the host, pinned": lambda t: t.copy_(torch.zeros(2, 2, device="cpu").pin_memory(), non_blocking=True),
    "a number": lambda t: t.__setitem__((0, slice(None)), 2.5),
    "full": lambda t: torch.full((), 3.0, device="cuda"),
    "as_tensor of its own": lambda t: torch.as_tensor(t, device="cuda"),
    "where": lambda t: torch.where(t > 0, t, 0.0),
    "on the host": lambda t: torch.tensor([1.0, 0.0], device="cpu").nonzero().tolist(),
}


@pytest.mark.parametrize("name", [*REFUSED, *ALLOWED])
def test_the_watch_sees_waits_and_nothing_else(name: str) -> None:
    with watched(1) as (watch, cuda), torch.no_grad():
        tensor = torch.empty(2, 2, device="cuda")
        cuda.label, watch.is_strict = 1, True
        if name in ALLOWED:
            ALLOWED[name](tensor)
        else:
            with pytest.raises(HostWait):
                REFUSED[name](tensor)
