# SPDX-License-Identifier: Apache-2.0
"""On CUDA no two streams race, no memory is reused too early, and a step can be captured: ``simulated_streams.py`` runs
the library's own code over all modes. One process stands for one of 8 ranks over NCCL; nothing is sent.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardadam import GradScaler, Precision, ShardedAdamW, load, save, sums
from shardadam.engine.gathering import ParameterGatherer
from shardadam.transport import Pending
from shardadam.transport.watchdog import Watchdog
from tests.simulated_streams import Simulation, Stream

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

    def __init__(self, sides: list[Stream], *dtypes: torch.dtype) -> None:
        super().__init__()
        shapes = [(40, 64), (10, 13), (7,), (90, 64), (33, 5), (20, 64), (20, 63)] * len(dtypes)
        self.layers = nn.ModuleList(Layer(*shape, dtype=dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes))
        self.sides = sides
        self.unused: set[int] = set()
        self.order = list(range(len(self.layers)))

    def forward(self) -> Tensor:
        caller = torch.cuda.current_stream()
        for side in self.sides:
            side.wait_stream(caller)
        terms = []
        for index in self.order:
            layer = self.layers[index]
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
        ranks: 1; 8; "hybrid": 2 replicas of 4 shards; or "replicated": 8 replicas of one shard.
        sides: streams beside the default one that forward and backward run on.
        rounds: backwards of one step.
        local: those before the last run in ``no_sync``.
        mixed: every other layer is in bfloat16.
        shuffled: layers are used in another order than they are registered in, and have buckets of their own.
        unused: the second step leaves a layer out.
        clips: which methods clip, in each step: "norm", "inf", "some", "value".
        between: what happens between the second and the third step: "add", "freeze", "unfreeze", "state", "whole",
            "save", "zero".
        kernels: use the Triton kernels.
        captures: the last step is captured as a CUDA graph.
        ends: how the optimizer is released: "idle"; after a backward that no step follows: "in flight"; so, but while
            another stream is the current one than that of training: "elsewhere"; or so, "during a capture".
    """

    gradient_sync: str = "backward"
    update: str = "step"
    ranks: int | str = RANKS
    sides: int = 0
    dtype: torch.dtype = torch.float32
    precision: Precision | None = None
    mixed: bool = False
    shuffled: bool = False
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
        dtypes = (mode.dtype, BFLOAT16) if mode.mixed else (mode.dtype,)
        self.model = Branches(sides, *dtypes).to("cuda")
        if mode.shuffled:
            self.model.order = [6, 2, 3, 5, 4, 0, 1]
        self.frozen = self.model.layers[1].weight
        if mode.between == "unfreeze":
            self.frozen.requires_grad_(False)
        self.extra = nn.Parameter(torch.ones(300, device="cuda", dtype=mode.dtype))
        shapes = {"hybrid": (2, 4), "replicated": (8, 1)}
        mesh = init_device_mesh("cpu", shapes[mode.ranks]) if isinstance(mode.ranks, str) else None
        self.optimizer = ShardedAdamW(
            self.model.parameters(),
            lr=1e-3,
            bucket_mb=0.002 if mode.shuffled else 0.008 if mode.mixed else 0.015,
            process_group=mesh,
            gradient_sync=mode.gradient_sync,  # type: ignore[arg-type]
            max_grad_norm=mode.max_grad_norm,
            precision=mode.precision,
            transport="collective",
            update=mode.update,  # type: ignore[arg-type]
        )
        self.scaler = GradScaler("cuda", init_scale=1024.0) if mode.scales else None
        if mode.overlaps:
            self.optimizer.overlap_gather(self.model)
        self.name_memory()

    def name_memory(self) -> None:
        """Name the buffers of the optimizer, for findings."""
        for number, arena in enumerate(self.optimizer._engine.parameters.arenas):
            buffers = {"parameters": arena.parameters, "gradient shard": arena.gradient_shard, **arena.state}
            for role, flat in buffers.items():
                if flat is not None:
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
            stack.enter_context(mock.patch.object(sums, "KERNEL_DEVICES", set()))
        if mode.ranks != 1:
            exchange = dist.all_to_all_single
            stack.enter_context(rank_0_of(RANKS, as_nccl=True))
            stack.enter_context(mock.patch.object(dist, "all_to_all_single", exchange))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: True))
        yield


@dataclass
class Result:
    waits: set[str]  # places where the host waited for the device in an ordinary step
    counts: int  # of the watchdogs in that step


def simulated() -> Simulation:
    return Simulation(unordered_readers=("transport/watchdog.py",))


def run(mode: Mode, directory: Path, simulation: Simulation) -> Result:
    """Train in one mode."""
    with world(mode), simulation.running():
        caller = simulation.stream("caller") if mode.ends == "elsewhere" else simulation.main
        with torch.cuda.stream(caller):  # type: ignore[arg-type]
            job = Job(simulation, mode)
            sides = job.model.sides
            for index in range(5):
                job.model.unused = {2, 3} if mode.unused and index % 2 else set()
                if index == 2:
                    job.between(directory)
                if index == 4:
                    simulation.waits.clear()
                with mock.patch.object(
                    Watchdog, "expect_progress", autospec=True, side_effect=Watchdog.expect_progress
                ) as count:
                    job.step()
            result = Result(set(simulation.waits), count.call_count)
            if mode.captures:
                job.optimizer.synchronize()
                with capturing(simulation):
                    job.step()
                job.step()
            if mode.ends != "idle":
                job.backward()
        with capturing(simulation) if mode.ends == "during a capture" else nullcontext():
            del job
        simulation.check_memory(caller)
        for side in sides:  # as the next forward does
            side.wait_stream(caller)
            simulation.check_memory(side)
    return result


@contextmanager
def capturing(simulation: Simulation) -> Iterator[None]:
    """Context manager: capture a CUDA graph on a stream of its own, as torch.cuda.graph does."""
    with torch.cuda.stream(simulation.stream("capturing")), simulation.capture():  # type: ignore[arg-type]
        yield


BFLOAT16 = torch.bfloat16
INT8 = Precision(moments="int8")
BF16_GRADIENTS = Precision(gradients="bf16")
FEATURES = [
    Mode(),
    Mode(gradient_sync="step", max_grad_norm=1.0),
    Mode(gradient_sync="external", max_grad_norm=1.0),
    Mode(rounds=2, max_grad_norm=1.0),
    Mode(rounds=3, local=True),
    Mode(mixed=True, rounds=2, max_grad_norm=1.0),
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
    Mode(dtype=BFLOAT16, rounds=2, shuffled=True),
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
    Mode(ends="elsewhere", overlaps=True),
    Mode(ends="during a capture", rounds=2),
    Mode(captures=True, max_grad_norm=1.0),
    Mode(captures=True, rounds=2),
    Mode(captures=True, gradient_sync="step"),
    Mode(captures=True, gradient_sync="external"),
    Mode(captures=True, overlaps=True),
    Mode(precision=BF16_GRADIENTS, max_grad_norm=1.0),
    Mode(precision=BF16_GRADIENTS, rounds=2, clips=("value", "some")),
    Mode(kernels=True, precision=BF16_GRADIENTS, dtype=BFLOAT16, rounds=2, captures=True),
    Mode(update="backward", precision=BF16_GRADIENTS),
    Mode(kernels=True, max_grad_norm=1.0),
    Mode(kernels=True, dtype=BFLOAT16, precision=INT8, rounds=2, max_grad_norm=1.0),
    Mode(kernels=True, captures=True, overlaps=True, rounds=2),
    Mode(update="backward"),
    Mode(update="backward", rounds=3, local=True, mixed=True),
    Mode(update="backward", unused=True, shuffled=True),
    Mode(update="backward", overlaps=True, dtype=BFLOAT16, precision=INT8),
    Mode(update="backward", between="unfreeze"),
    Mode(update="backward", between="add", overlaps=True),
    Mode(update="backward", ends="in flight"),
    Mode(update="backward", captures=True),
    Mode(update="backward", kernels=True, dtype=BFLOAT16, precision=Precision(moments="int8", master="none")),
    Mode(update="backward", kernels=True, unused=True, shuffled=True),
]
MODES = (
    [
        replace(mode, ranks=ranks, sides=sides)
        for mode in FEATURES
        for ranks in (1, RANKS, "hybrid")
        for sides in (0, 1, 2)
        if ranks == 1 or mode.between != "save"  # it waits for the other ranks in the store
    ]
    + [replace(mode, ranks="replicated", sides=sides) for mode in FEATURES[:6] for sides in (0, 2)]
)


MAY_WAIT = ("engine/step_sync.py",)
"""Files in which the host of an ordinary step waits for the device: for the step before it."""
READS_USED = "engine/updating.py"
"""Where it waits, too, without kernels if a parameter has no gradient: torch's fused update must know which."""


@pytest.mark.sweep(60)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_nothing_races_and_the_host_runs_ahead(mode: Mode, tmp_path: Path) -> None:
    simulation = simulated()
    result = run(mode, tmp_path, simulation)
    assert simulation.findings == [], "\n" + "\n".join(map(str, simulation.findings))
    waits = [place for place in result.waits if not place.startswith(MAY_WAIT)]
    assert [place for place in waits if mode.kernels or READS_USED not in place] == []


@pytest.mark.parametrize(
    ("mode", "counts"),
    [(Mode(), 2), (Mode(ranks="hybrid"), 4), (Mode(ranks="hybrid", rounds=3), 8), (Mode(gradient_sync="step"), 1)],
    ids=str,
)
def test_watchdogs_count_once_a_round_and_once_a_sync(mode: Mode, counts: int, tmp_path: Path) -> None:
    """Hybrid sharding counted once a bucket, and a host that waited before the sync was not watched."""
    assert run(mode, tmp_path, simulated()).counts == counts


@pytest.mark.parametrize("ranks", [RANKS, "hybrid"])
def test_a_capture_that_would_wait_for_gathers_from_before_it_is_refused(ranks: int | str) -> None:
    mode = Mode(ranks=ranks, overlaps=True)
    simulation = simulated()
    with world(mode), simulation.running():
        job = Job(simulation, mode)
        job.step()
        with capturing(simulation), pytest.raises(RuntimeError, match=r"Call optimizer\.synchronize\(\)"):
            job.step()
        job.optimizer.synchronize()
        with capturing(simulation):
            job.step()
    assert simulation.findings == []


@pytest.mark.parametrize("ranks", [1, RANKS, "hybrid"])
def test_an_optimizer_is_released_after_torch_distributed(ranks: int | str) -> None:
    mode = Mode(ranks=ranks)
    simulation = simulated()
    with simulation.running():
        with world(mode):
            job = Job(simulation, mode)
            job.step()
            job.backward()
        job.optimizer._engine.release()
        del job
        simulation.check_memory(simulation.main)
    assert simulation.findings == []


def test_a_release_frees_storage_although_the_device_has_failed() -> None:
    mode = Mode()
    simulation = simulated()
    with world(mode), simulation.running():
        job = Job(simulation, mode)
        engine = job.optimizer._engine
        with mock.patch.object(Stream, "wait_stream", side_effect=RuntimeError("CUDA error")):
            engine.release()
        assert not any(arena.buckets for arena in engine.parameters.arenas)
        del job, engine


class _CountedPending(Pending):
    """A transfer that the host takes part in: a second wait would undo what was written since (Gloo)."""

    def __init__(self) -> None:
        self.waits = 0

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        self.waits += 1


def test_transfers_of_the_host_are_waited_for_once() -> None:
    pending = _CountedPending()
    gatherer = ParameterGatherer()
    gatherer.dispatch(mock.Mock(index=3, **{"arena.transport.all_gather": lambda _: pending}))
    for _ in range(2):
        gatherer.wait_for([3])
        gatherer.wait_all()
    gatherer.synchronize()
    assert pending.waits == 1 and not gatherer.has_pending


# The simulation itself


def _unordered(simulation: Simulation) -> None:
    flat = torch.zeros(8, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        flat.add_(1)
    torch.cuda.current_stream().wait_stream(simulation.main)


def _ordered(simulation: Simulation) -> None:
    flat, side = torch.zeros(8, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        flat.add_(1)
    torch.cuda.current_stream().wait_stream(side)
    flat.add_(1)


def _ordered_through_a_third(simulation: Simulation) -> None:
    flat, second, third = torch.zeros(8, device="cuda"), torch.cuda.Stream(), torch.cuda.Stream()
    second.wait_event(torch.cuda.current_stream().record_event())
    third.wait_stream(second)
    with torch.cuda.stream(third):
        flat.add_(1)


def _apart(simulation: Simulation) -> None:
    flat, side = torch.zeros(8, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        flat[:4].add_(1)
        flat.sum()
    flat[4:].sum()


def _early_event(simulation: Simulation) -> None:
    flat, side = torch.zeros(8, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    event = side.record_event()
    with torch.cuda.stream(side):
        flat.add_(1)
    torch.cuda.current_stream().wait_event(event)
    flat.sum()


def _freed(simulation: Simulation, *, records: bool = False, waits: bool = False) -> None:
    flat, side = torch.zeros(8, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        flat.add_(1)
    if records:
        flat.record_stream(side)
    del flat
    if waits:  # before anything is allocated
        torch.cuda.current_stream().wait_stream(side)
    torch.empty(8, device="cuda")


def _view_of_freed(simulation: Simulation) -> None:
    flat = torch.zeros(8, device="cuda")
    view = torch.empty(0, device="cuda").set_(flat.untyped_storage()[16:], 0, (4,), (1,))
    del flat
    with torch.cuda.stream(torch.cuda.Stream()):
        view.add_(1)


def _early_host_read(simulation: Simulation) -> None:
    flat = torch.zeros(8, device="cuda")
    torch.empty(8, pin_memory=True, device="cpu").copy_(flat, non_blocking=True).tolist()


def _host_read(simulation: Simulation) -> None:
    flat = torch.zeros(8, device="cuda")
    copy = torch.empty(8, pin_memory=True, device="cpu").copy_(flat, non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    copy.tolist()


def _forked_capture(simulation: Simulation, *, joins: bool) -> None:
    flat, side = torch.zeros(8, device="cuda"), torch.cuda.Stream()
    with capturing(simulation):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            flat.add_(1)
        if joins:
            torch.cuda.current_stream().wait_stream(side)


def _late_event(simulation: Simulation) -> None:
    event = torch.cuda.current_stream().record_event()
    with capturing(simulation):
        torch.cuda.current_stream().wait_event(event)


def _waiting_capture(simulation: Simulation) -> None:
    flat = torch.zeros(8, device="cuda")
    with capturing(simulation):
        flat.sum().item()


def _two_devices(simulation: Simulation) -> None:
    torch.zeros(8, device="cuda").add_(torch.ones(8, device="cpu"))


PROGRAMS: list[tuple[Any, set[str]]] = [
    (_unordered, {"race"}),
    (_ordered, set()),
    (_ordered_through_a_third, set()),
    (_apart, set()),
    (_early_event, {"race"}),
    (_freed, {"reused"}),
    (partial(_freed, records=True), set()),
    (partial(_freed, waits=True), set()),
    (_view_of_freed, {"race"}),
    (_early_host_read, {"race"}),
    (_host_read, set()),
    (partial(_forked_capture, joins=False), {"unjoined"}),
    (partial(_forked_capture, joins=True), set()),
    (_late_event, {"isolation"}),
    (_waiting_capture, {"forbidden"}),
    (_two_devices, {"devices"}),
]


@pytest.mark.parametrize(("program", "kinds"), PROGRAMS)
def test_the_simulation_finds_what_is_wrong_and_nothing_else(program: Any, kinds: set[str]) -> None:
    simulation = simulated()
    with simulation.running():
        program(simulation)
    assert {finding.kind for finding in simulation.findings} == kinds


def test_a_finding_names_both_places_both_streams_and_the_tensor(tmp_path: Path) -> None:
    simulation = simulated()
    (mutant,) = [mutant for mutant in MUTANTS if mutant.what == "a second stream does not wait for all-gathers"]
    with mutated(mutant):
        run(mutant.mode, tmp_path, simulation)
    text = str(simulation.findings[0])
    assert re.match(
        r"race: on parameters of arena 0 \[\d+:\d+\] \(bytes\): "
        r"c10d\._allgather_base_\.default writes on nccl's stream "
        r"\d+ at transport/nccl\.py:\d+ all_gather < .*; aten\.pow\.Tensor_Scalar reads on side \d at "
        r"test_streams\.py:\d+ forward",
        text,
    ), text


# Mutants: each breaks the library in one place, and a mode finds it


@dataclass(frozen=True)
class Mutant:
    """
    Args:
        where: module and function inside the package.
        edits: parts of its source, and what replaces them.
        mode: finds it.
        finds: the kind of a finding.
    """

    what: str
    where: str
    edits: dict[str, str]
    mode: Mode = Mode()
    finds: str = "race"

    def __str__(self) -> str:
        return self.what


def mutated(mutant: Mutant) -> Any:
    """Return a patch that puts the mutant in place of the library's function."""
    module_name, _, path = mutant.where.partition(":")
    module = import_module(f"shardadam.{module_name}")
    *owners, name = path.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    function = inspect.getattr_static(owner, name)
    function = inspect.unwrap(function.fget if isinstance(function, property) else function)
    lines, first = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    for old, new in mutant.edits.items():
        assert source.count(old) == 1, f"the source of {mutant.where} has changed: adapt the mutant"
        source = source.replace(old, new)
    made: dict[str, Any] = {}
    exec(compile("\n" * (first - 1) + source, inspect.getfile(function), "exec"), function.__globals__, made)
    return mock.patch.object(owner, name, made[function.__name__])


CAPTURED = Mode(captures=True)
HYBRID = Mode(ranks="hybrid")
OVERLAPPED = Mode(overlaps=True, sides=2)
IN_FLIGHT = Mode(ends="in flight")
MUTANTS = [
    Mutant(
        "a transfer does not wait for what it sends",
        "transport.streams:CommunicationStream.__enter__",
        {"self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))": "pass"},
    ),
    Mutant(
        "no event is recorded after a transfer",
        "transport.streams:OnStream.__init__",
        {"stream.record_event()": "torch.cuda.Event()"},
    ),
    Mutant(
        "nobody waits for a transfer",
        "transport.streams:OnStream.wait",
        {"current.wait_event(self._event)": "pass"},
    ),
    Mutant(
        "only the first stream waits for a transfer",
        "transport.streams:OnStream.wait",
        {"if current in self._waiting": "if self._waiting"},
        OVERLAPPED,
    ),
    *(
        Mutant(
            f"the event of {method} is recorded before the transfer",
            f"transport.nccl:NcclTransport.{method}",
            {
                "as stream:\n": f"as stream:\n{8 * ' '}pending = OnStream(stream)\n",
                "return OnStream(stream)": "return pending",
            },
        )
        for method in ("reduce_scatter", "all_gather", "all_reduce", "broadcast")
    ),
    Mutant(
        "buffers are freed while transfers use them",
        "transport.nccl:NcclTransport.close",
        {"self._streams.release()": "pass"},
        IN_FLIGHT,
        "reused",
    ),
    Mutant(
        "buffers are freed while hybrid's sums use them",
        "transport.hybrid:HybridTransport.close",
        {"self._streams.release()": "pass"},
        replace(IN_FLIGHT, ranks="hybrid"),
        "reused",
    ),
    Mutant(
        "only the stream that releases an optimizer waits for its transfers",
        "transport.streams:CommunicationStreams.release",
        {"self._owners[device] | {torch.cuda.current_stream(device)}": "[torch.cuda.current_stream(device)]"},
        Mode(ends="elsewhere"),
        "reused",
    ),
    Mutant(
        "a release during a capture waits for work from before it",
        "transport.streams:CommunicationStreams.release",
        {"if _is_captured(owner) == is_captured:": "if True:"},
        Mode(ends="during a capture"),
        "isolation",
    ),
    Mutant(
        "hybrid's all-reduce does not wait for the reduce-scatter",
        "transport.hybrid:HybridTransport._in_two_stages",
        {"reduce_scatter.wait()": "pass"},
        HYBRID,
    ),
    Mutant(
        "hybrid measures a shard before its all-reduce is over",
        "transport.hybrid:HybridTransport._in_two_stages",
        {"self._replica.all_reduce(total).wait()": "self._replica.all_reduce(total)"},
        HYBRID,
    ),
    Mutant(
        "hybrid's temporary sum is freed at once",
        "transport.hybrid:HybridTransport.reduce_scatter",
        {"kept=total)": "kept=request.shard)"},
        replace(HYBRID, rounds=2),
        "reused",
    ),
    Mutant(
        "hybrid's float32 sum of a bfloat16 shard is not on the stream that reuses its memory",
        "transport.hybrid:HybridTransport.reduce_scatter",
        {"with self._streams.on(shard.device) if shard.is_cuda else nullcontext()": "with nullcontext()"},
        replace(HYBRID, precision=BF16_GRADIENTS),
        "reused",
    ),
    Mutant(
        "the copy into staging does not wait for gradients of other streams",
        "engine.reduction.backward_reducer:joined_streams",
        {"current.wait_stream(stream)": "pass"},
        Mode(sides=2),
    ),
    Mutant(
        "gradients are freed while the copy of another stream reads them",
        "engine.reduction.backward_reducer:joined_streams",
        {"stream.wait_stream(current)": "pass"},
        Mode(sides=2),
        "reused",
    ),
    Mutant(
        "the streams of gradients are not noted",
        "engine.reduction.backward_reducer:BackwardReducer.on_gradient",
        {".add(stream)": ""},
        Mode(sides=2),
    ),
    Mutant(
        "staging is handed to a stream that has not waited for its transfer",
        "engine.reduction.staging:StagingPool.acquire",
        {"last.pending.wait_for_buffer()": "pass"},
        Mode(sides=2, mixed=True),
    ),
    Mutant(
        "staging is reused without waiting",
        "engine.reduction.staging:StagingPool.acquire",
        {"last.pending.wait_for_buffer()": "pass"},
    ),
    Mutant(
        "a sum that sends nothing has no event",
        "transport.single:SingleProcessTransport.reduce_scatter",
        {"if request.shard.is_cuda": "if False"},
        Mode(ranks="replicated", sides=2),
    ),
    Mutant(
        "sums whose buffers are used again are not waited for",
        "engine.reduction.staging:StagingPool.wait_all",
        {"self._on_streams.popleft().pending.wait()": "self._on_streams.popleft()"},
    ),
    Mutant(
        "staging of hybrid sharding is reused without waiting",
        "transport.hybrid:_InTwoStages.wait_for_buffer",
        {"self._reduce_scatter.wait_for_buffer()": "pass"},
        HYBRID,
    ),
    Mutant(
        "the watchdog's counter is zeroed on another stream",
        "transport.nccl:NcclTransport.expect_progress",
        {
            "if is_captured and self": "if self._watchdog is None:\n"
            "        self._watchdog = Watchdog(device, 60.0, lambda: '', lambda: False)\n"
            "    if is_captured and self",
            "with self._streams.on(device) as stream:": "stream = self._streams._streams[device]\n"
            "    with torch.cuda.stream(stream):",
        },
    ),
    Mutant(
        "a capture ends before the stream that the watchdog counts on is joined",
        "transport.nccl:NcclTransport.expect_progress",
        {"OnStream(stream).wait()": "pass"},
        replace(CAPTURED, ranks="hybrid"),
        "unjoined",
    ),
    Mutant(
        "a second stream does not wait for all-gathers",
        "engine.gathering:ParameterGatherer.wait_for",
        {"self._on_some_streams[index] = pending": "pass"},
        OVERLAPPED,
    ),
    Mutant(
        "all-gathers count as waited for once one stream has waited",
        "engine.gathering:ParameterGatherer.has_pending",
        {"self._pending or self._on_some_streams": "self._pending"},
        OVERLAPPED,
    ),
    Mutant(
        "a read of all parameters waits for no all-gather",
        "engine.gathering:ParameterGatherer.wait_all",
        {"self.wait_for([*self._pending, *self._on_some_streams])": "pass"},
    ),
    Mutant(
        "a gathered tensor is read before its all-gather is over",
        "state.whole:gather_shards",
        {"transport.all_gather(whole).wait()": "transport.all_gather(whole)"},
        Mode(between="whole"),
    ),
    Mutant(
        "a captured step leaves its all-gathers to the next forward",
        "engine.step:StepEngine._update",
        {" and not is_capturing(self.skipped_steps.device)": ""},
        replace(CAPTURED, overlaps=True),
        "unjoined",
    ),
    Mutant(
        "the statistics of all ranks are read before they are summed",
        "engine.step_sync:all_reduce_stats",
        {"transport.all_reduce(block).wait()": "transport.all_reduce(block)"},
    ),
    Mutant(
        "a captured sync is read by the host",
        "engine.step_sync:StepSync.sync",
        {"is_captured = is_capturing(device)": "is_captured = False"},
        CAPTURED,
        "forbidden",
    ),
    Mutant(
        "the host reads the statistics before their copy is over",
        "engine.step_sync:HostCopy._await",
        {"self._event.synchronize()": "pass"},
    ),
    Mutant(
        "an update in backward overtakes the one before it on another stream",
        "transport.streams:InStreamOrder.on",
        {"current.wait_stream(last)": "pass"},
        Mode(update="backward", sides=2, shuffled=True),
    ),
    Mutant(
        "an update in backward does not wait for gradients on other streams",
        "engine.reduction.local_reducer:AloneInBackward._pass_on",
        {"self._streams.get(device)": "None"},
        Mode(update="backward", ranks=1, sides=2),
    ),
    Mutant(
        "an update in backward does not wait for its reduction",
        "engine.reduction.staging:StagingPool._wait_oldest",
        {"elif then is not None:\n        pending.wait()": "elif then is not None:\n        pass"},
        Mode(update="backward"),
    ),
    Mutant(
        "parameters are used before they are broadcast",
        "engine.parameters:ShardedParameters.broadcast",
        {"pending.wait()": "pass"},
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_found(mutant: Mutant, tmp_path: Path) -> None:
    simulation = simulated()
    with mutated(mutant), suppress(RuntimeError):  # the library itself finds some
        run(mutant.mode, tmp_path, simulation)
    assert mutant.finds in {finding.kind for finding in simulation.findings}
