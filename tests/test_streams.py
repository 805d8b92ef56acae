# SPDX-License-Identifier: Apache-2.0
"""On CUDA no two streams race, no memory is reused too early, and a step can be captured: ``simulated_streams.py`` runs
the library's own code over all modes. One process stands for one of 8 ranks over NCCL; nothing is sent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardadam import GradScaler, Precision, ShardedAdamW, load, save, update
from tests.simulated_streams import Finding, Simulation, Stream

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from fake_world import rank_0_of

RANKS = 8


# A model with branches on several streams


class Branch(torch.autograd.Function):
    """A function of one parameter. As torch's engine does, backward runs it on the stream of its forward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.stream = torch.cuda.current_stream()
        return weight.float().square().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        ctx.stream.wait_event(Join.event)
        torch.cuda.set_stream(ctx.stream)
        gradient.record_stream(ctx.stream)
        (weight,) = ctx.saved_tensors
        return weight * (gradient * (2 / weight.numel()))


class Join(torch.autograd.Function):
    """The sum of all branches. As torch's engine does, backward ends by making the caller's stream wait for all."""

    event: Any = None

    @staticmethod
    def forward(ctx: Any, sides: list[Stream], *terms: Tensor) -> Tensor:
        ctx.sides, ctx.count = sides, len(terms)
        for side, term in zip(sides, terms, strict=False):
            del side
            term.record_stream(torch.cuda.current_stream())
        return torch.stack(terms).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        caller = torch.cuda.current_stream()
        sides = ctx.sides

        def end() -> None:
            for side in sides:
                caller.wait_stream(side)
            torch.cuda.set_stream(caller)

        torch.autograd.Variable._execution_engine.queue_callback(end)
        gradient = gradient.clone()
        Join.event = caller.record_event()
        return None, *[gradient] * ctx.count


class Layer(nn.Module):
    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape, dtype=dtype, device="cpu"))

    def forward(self) -> Tensor:
        return Branch.apply(self.weight)  # type: ignore[no-any-return]


class Branches(nn.Module):
    """Layers whose forwards and backwards run on the streams ``sides`` in turn, or on the current one if there is none.

    Args:
        unused: positions of the layers that are not used.
    """

    def __init__(self, sides: list[Stream], dtype: torch.dtype) -> None:
        super().__init__()
        shapes = [(40, 64), (10, 13), (7,), (90, 64), (33, 5), (20, 64), (20, 63)]
        self.layers = nn.ModuleList(Layer(*shape, dtype=dtype) for shape in shapes)
        self.sides = sides
        self.unused: set[int] = set()

    def forward(self) -> Tensor:
        caller = torch.cuda.current_stream()
        for side in self.sides:
            side.wait_stream(caller)
        terms = []
        for index, layer in enumerate(self.layers):
            if index not in self.unused:
                with torch.cuda.stream(self.sides[index % len(self.sides)] if self.sides else caller):
                    terms.append(layer())
        for side in self.sides:
            caller.wait_stream(side)
        return Join.apply(self.sides, *terms)  # type: ignore[no-any-return]


# Modes


@dataclass(frozen=True)
class Mode:
    """
    Args:
        ranks: 1; 8; or "hybrid": 2 replicas of 4 shards.
        sides: streams beside the default one that forward and backward run on.
        rounds: backwards of one step.
        local: those before the last run in ``no_sync``.
        unused: the second step leaves a layer out.
        clips: which methods clip, in each step: "norm", "inf", "some", "value".
        between: what happens between the second and the third step: "add", "freeze", "unfreeze", "state", "whole",
            "save", "zero".
        kernels: use the Triton kernels.
        captures: the last step is captured as a CUDA graph.
        ends: "idle"; or the optimizer is released "in flight", after a backward.
    """

    gradient_sync: str = "backward"
    ranks: int | str = RANKS
    sides: int = 0
    dtype: torch.dtype = torch.float32
    precision: Precision = Precision()
    rounds: int = 1
    local: bool = False
    unused: bool = False
    max_grad_norm: float | None = None
    clips: tuple[str, ...] = ()
    overlaps: bool = False
    scales: bool = False
    between: str = ""
    kernels: bool = False
    captures: bool = False
    ends: str = "idle"

    def __str__(self) -> str:
        default = Mode()
        own = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return " ".join(f"{name}={value}" for name, value in own.items()) or "default"


class Job:
    """A model and its optimizer in one mode."""

    def __init__(self, simulation: Simulation, mode: Mode) -> None:
        self.mode = mode
        self.simulation = simulation
        sides = [simulation.stream(f"side {index}") for index in range(mode.sides)]
        self.model = Branches(sides, mode.dtype).to("cuda")
        self.frozen = self.model.layers[1].weight
        if mode.between == "unfreeze":
            self.frozen.requires_grad_(False)
        self.extra = nn.Parameter(torch.ones(300, device="cuda", dtype=mode.dtype))
        mesh = init_device_mesh("cpu", (2, 4)) if mode.ranks == "hybrid" else None
        self.optimizer = ShardedAdamW(
            self.model.parameters(),
            lr=1e-3,
            bucket_mb=0.015,
            process_group=mesh,
            gradient_sync=mode.gradient_sync,  # type: ignore[arg-type]
            max_grad_norm=mode.max_grad_norm,
            precision=mode.precision,
            transport="collective",
        )
        self.scaler = GradScaler("cuda", init_scale=1024.0) if mode.scales else None
        if mode.overlaps:
            self.optimizer.overlap_gather(self.model)
        self.name_memory()

    def name_memory(self) -> None:
        """Name the buffers of the optimizer, for findings."""
        for number, arena in enumerate(self.optimizer._engine.parameters.arenas):
            for role, flat in {
                "parameters": arena.parameters,
                "gradient shard": arena.gradient_shard,
                **arena.state,
            }.items():
                self.simulation.memory.name(flat, f"{role} of arena {number}")

    def backward(self) -> None:
        loss = self.model()
        if self.extra.grad is not None or any(
            self.extra is p for g in self.optimizer.param_groups for p in g["params"]
        ):
            loss = loss + self.extra.float().sum()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> None:
        optimizer, mode = self.optimizer, self.mode
        for index in range(mode.rounds):
            is_local = mode.local and index + 1 < mode.rounds
            with optimizer.no_sync() if is_local else nullcontext():
                self.backward()
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        for kind in mode.clips:
            if kind == "norm":
                optimizer.clip_grad_norm_(1.0)
            elif kind == "inf":
                optimizer.clip_grad_norm_(1.0, norm_type=float("inf"))
            elif kind == "some":
                optimizer.clip_grad_norm_(1.0, parameters=[self.model.layers[0].weight, self.model.layers[3].weight])
            else:
                optimizer.clip_grad_value_(torch.full((), 0.1, device="cuda"))  # type: ignore[arg-type]
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad()

    def between(self, directory: Path) -> None:
        optimizer = self.optimizer
        if self.mode.between == "add":
            optimizer.add_param_group({"params": [self.extra]})
        elif self.mode.between in ("freeze", "unfreeze"):
            self.frozen.requires_grad_(self.mode.between == "unfreeze")
        elif self.mode.between == "state":
            optimizer.load_state_dict(optimizer.state_dict())
        elif self.mode.between == "whole":
            self.backward()
            optimizer.full_grad(self.model.layers[3].weight)
            optimizer.full_state(self.model.layers[3].weight)
            optimizer.zero_grad()
        elif self.mode.between == "save":
            save(directory, step=2, model=self.model, optimizer=optimizer)
            load(directory, model=self.model, optimizer=optimizer)
        elif self.mode.between == "zero":
            self.backward()
            optimizer.zero_grad()
            self.backward()
            optimizer.zero_grad()
        self.name_memory()


@contextmanager
def world(mode: Mode) -> Iterator[None]:
    with ExitStack() as stack:
        if not mode.kernels:
            stack.enter_context(mock.patch.object(update, "KERNEL_DEVICES", set()))
        if mode.ranks != 1:
            exchange = dist.all_to_all_single
            stack.enter_context(rank_0_of(RANKS, as_nccl=True))
            stack.enter_context(mock.patch.object(dist, "all_to_all_single", exchange))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: True))
        yield


def run(mode: Mode, directory: Path) -> Simulation:
    simulation = Simulation(unordered_readers=("transport/watchdog.py",))
    with world(mode), simulation.running():
        job = Job(simulation, mode)
        for index in range(4):
            job.model.unused = {2, 3} if mode.unused and index == 1 else set()
            if index == 2:
                job.between(directory)
            job.step()
        if mode.captures:
            job.optimizer.synchronize()
            with torch.cuda.stream(simulation.stream("capturing")), simulation.capture():  # type: ignore[arg-type]
                job.step()
        if mode.ends == "in flight":
            job.backward()
        del job
        simulation.check_memory()
    return simulation


BFLOAT16 = torch.bfloat16
INT8 = Precision(moments="int8")
FEATURES = [
    Mode(),
    Mode(gradient_sync="step", max_grad_norm=1.0),
    Mode(gradient_sync="external", max_grad_norm=1.0),
    Mode(rounds=2, max_grad_norm=1.0),
    Mode(rounds=3, local=True),
    Mode(gradient_sync="step", rounds=2, unused=True),
    Mode(gradient_sync="external", rounds=2, unused=True),
    Mode(rounds=2, unused=True, clips=("norm",)),
    Mode(clips=("inf", "some", "value")),
    Mode(gradient_sync="step", clips=("norm", "some", "value")),
    Mode(gradient_sync="external", clips=("norm", "inf", "some", "value")),
    Mode(precision=Precision(accumulate="fp32"), rounds=2, max_grad_norm=1.0),
    Mode(dtype=BFLOAT16, max_grad_norm=1.0),
    Mode(dtype=BFLOAT16, precision=INT8, rounds=2),
    Mode(dtype=BFLOAT16, precision=Precision(accumulate="fp32", master="fp32")),
    Mode(dtype=torch.float16, scales=True, rounds=2),
    Mode(scales=True, gradient_sync="step", clips=("norm",)),
    Mode(overlaps=True, max_grad_norm=1.0),
    Mode(overlaps=True, unused=True, gradient_sync="step"),
    Mode(overlaps=True, between="add"),
    Mode(overlaps=True, between="save"),
    Mode(between="freeze"),
    Mode(between="unfreeze", max_grad_norm=1.0),
    Mode(between="state", gradient_sync="step"),
    Mode(between="state", dtype=BFLOAT16, precision=INT8),
    Mode(between="whole", rounds=2),
    Mode(between="save", dtype=BFLOAT16),
    Mode(between="zero"),
    Mode(ends="in flight"),
    Mode(ends="in flight", overlaps=True),
    Mode(captures=True, max_grad_norm=1.0),
    Mode(captures=True, rounds=2),
    Mode(captures=True, gradient_sync="step"),
    Mode(captures=True, gradient_sync="external"),
    Mode(captures=True, overlaps=True),
    Mode(kernels=True, max_grad_norm=1.0),
    Mode(kernels=True, dtype=BFLOAT16, precision=INT8, rounds=2, max_grad_norm=1.0),
    Mode(kernels=True, captures=True, overlaps=True, rounds=2),
]
MODES = [
    replace(mode, ranks=ranks, sides=sides)
    for mode in FEATURES
    for ranks in (1, RANKS, "hybrid")
    for sides in (0, 1, 2)
    if ranks == 1 or mode.between != "save"  # it waits for the other ranks in the store
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_nothing_races(mode: Mode, tmp_path: Path) -> None:
    simulation = run(mode, tmp_path)
    assert simulation.findings == [], "\n" + "\n".join(map(str, simulation.findings))


_ = Finding
