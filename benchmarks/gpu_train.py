# SPDX-License-Identifier: Apache-2.0
"""Trains a bfloat16 decoder on one GPU: how much memory and time does the optimizer take, in every format?

    python benchmarks/gpu_train.py steps   [--layers 48 --width 1600 --batch 8 --context 1024]   1.5B parameters
    python benchmarks/gpu_train.py largest [--width 4096 --batch 1 --context 512]
    python benchmarks/gpu_train.py capture
    python benchmarks/gpu_train.py ranks

**steps**: peak memory of training, time of a whole step, and the optimizer's share of it: the time beyond forward and
backward alone. Host time is that of `step()` and `zero_grad()` with nothing else on the device. AdamW is torch's fused
one: on bfloat16 parameters and moments, and on float32 masters as users write it by hand.

**largest**: the largest number of layers that train: predicted from the peaks of two small models, then tried one by
one until one number fits and the next does not.

**capture**: replays forward, backward and step as one CUDA graph; parameters must equal those of eager steps.

**ranks**: compares the memory of rank 0 of 8 and of 64, over torch's `fake` process group, with the plan.

The last line of the output is one JSON object. `--rehearse` runs all of it with small numbers, on the CPU, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fake_world import rank_0_of
from torch import Tensor, nn
from update import FORMS, Form, stock, with_masters

from shardadam import ShardedAdamW
from shardadam.planner import PlannedParameter, Setting, plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))
sys.path.append(str(Path(__file__).resolve().parents[1]))
from model import VOCABULARY, Decoder, ModelConfig, next_byte_loss
from tests.on_cuda import captured, warm_up

GB = 1e9
Update = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """`build(parameters)` gives the function that steps and clears the gradients."""

    name: str
    build: Callable[[list[nn.Parameter]], Update]


class Sharded:
    """Ours: steps and clears the gradients."""

    def __init__(self, form: Form, parameters: list[nn.Parameter], **options: Any) -> None:
        self.optimizer = ShardedAdamW(parameters, precision=form.precision, **options)

    def __call__(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def clearing(build: Callable[[list[nn.Parameter]], Update], parameters: list[nn.Parameter]) -> Update:
    step = build(parameters)

    def update() -> None:
        step()
        for p in parameters:
            p.grad = None

    return update


BY_HAND = Contender("AdamW on fp32 masters", partial(clearing, with_masters))
CONTENDERS = [
    Contender("AdamW", partial(clearing, partial(stock, fused=True))),
    BY_HAND,
    *(
        Contender(f"shardadam, {form.master} master, {form.moments} moments", partial(Sharded, form))
        for form in FORMS
        if form.dtype == torch.bfloat16
    ),
]
GROWN = [c for c in CONTENDERS if "shardadam" not in c.name or "split" in c.name or "none master, int8" in c.name]


@dataclass(frozen=True)
class Job:
    """A model's shape and its input."""

    device: torch.device
    layers: int
    width: int
    batch: int
    context: int

    def model(self) -> Decoder:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # creating float32 ones first would set the peak
        try:
            with self.device:
                return Decoder(ModelConfig(self.layers, self.width, max(1, self.width // 64), self.context))
        finally:
            torch.set_default_dtype(before)

    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(VOCABULARY, (self.batch, self.context + 1), generator=generator).to(self.device)


# The device's clock and memory, or the host's in a rehearsal


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the seconds until `run` returns, and until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    run()
    returned = time.perf_counter()
    synchronize(device)
    return returned - start, time.perf_counter() - start


# Steps


def forward_backward(model: Decoder, tokens: Tensor) -> None:
    next_byte_loss(model(tokens[:, :-1]), tokens).backward()


def measure_steps(contender: Contender | None, job: Job, rounds: int) -> dict[str, Any]:
    """Measure training steps; without a contender, forward and backward only."""
    clear(job.device)
    model, tokens = job.model(), job.tokens()
    update = model.zero_grad if contender is None else contender.build(list(model.parameters()))

    def step() -> None:
        forward_backward(model, tokens)
        update()

    for _ in range(3):
        step()
    clear(job.device)
    whole, host = [], []
    for _ in range(rounds):
        whole.append(timed(step, job.device)[1])
    for _ in range(rounds):
        forward_backward(model, tokens)
        host.append(timed(update, job.device)[0])
    return {"seconds": whole, "host_seconds": host, "peak_bytes": peak(job.device)}


def steps(job: Job, rounds: int) -> dict[str, Any]:
    alone = measure_steps(None, job, rounds)
    base = statistics.median(alone["seconds"])
    numel = sum(p.numel() for p in job.model().parameters())
    found: dict[str, Any] = {"numel": numel, "forward_backward": alone, "contenders": {}}
    print(f"{numel / 1e9:.2f}B parameters; forward and backward alone {1e3 * base:.1f} ms")
    print(f"{'':>40} |   ms a step | optimizer's share | host ms | peak GB")
    for contender in CONTENDERS:
        try:
            one = measure_steps(contender, job, rounds)
        except torch.OutOfMemoryError:
            found["contenders"][contender.name] = "out of memory"
            print(f"{contender.name:>40} | out of memory")
            continue
        middle = statistics.median(one["seconds"])
        one["share"] = 1 - base / middle
        found["contenders"][contender.name] = one
        print(
            f"{contender.name:>40} | {1e3 * middle:11.1f} | {100 * one['share']:16.1f}% | "
            f"{1e3 * statistics.median(one['host_seconds']):7.2f} | {one['peak_bytes'] / GB:7.2f}",
            flush=True,
        )
    return found


# The largest model


def peak_with(contender: Contender, job: Job) -> int | None:
    """Return the bytes at the peak of two steps; None if they do not fit."""
    clear(job.device)
    try:
        return _peak_with(contender, job)
    except torch.OutOfMemoryError:
        return None
    finally:
        clear(job.device)


def _peak_with(contender: Contender, job: Job) -> int:
    model, tokens = job.model(), job.tokens()
    update = contender.build(list(model.parameters()))
    for _ in range(2):
        forward_backward(model, tokens)
        update()
    synchronize(job.device)
    return peak(job.device)


def largest(job: Job, small: tuple[int, int], tries: int) -> dict[str, Any]:
    available = torch.cuda.mem_get_info()[0] if job.device.type == "cuda" else 0
    found: dict[str, Any] = {"available_bytes": available, "contenders": {}}
    for contender in GROWN:
        few, more = (peak_with(contender, with_layers(job, layers)) for layers in small)
        if few is None or more is None or more <= few:
            found["contenders"][contender.name] = {"small": [few, more]}  # on the CPU
            continue
        each = (more - few) / (small[1] - small[0])
        predicted = int((available - few) / each) + small[0]

        def is_too_large(layers: int, contender: Contender = contender) -> bool:
            return peak_with(contender, with_layers(job, layers)) is None

        fits, too_many = boundary(is_too_large, small[1], predicted, tries)
        with torch.device("meta"):
            numel = sum(p.numel() for p in Decoder(ModelConfig(fits, job.width, job.width // 64, 8)).parameters())
        found["contenders"][contender.name] = {"layers": fits, "too_many": too_many, "numel": numel, "each": each}
        print(f"{contender.name:>40} | {numel / 1e9:6.2f}B, {fits} layers; {too_many} do not fit", flush=True)
    return found


def boundary(is_too_large: Callable[[int], bool], fits: int, predicted: int, tries: int) -> tuple[int, int | None]:
    """Return the largest number that is not too large, and the next one; None for the latter after too many tries.

    Tries numbers one by one, from ``predicted``. ``fits``: a number that is known not to be too large.
    """
    tried, too_many = max(fits, predicted), None
    for _ in range(tries):
        if is_too_large(tried):
            too_many, tried = tried, tried - 1
        else:
            fits, tried = tried, tried + 1
        if tried in (fits, too_many):
            break
    return fits, too_many


def with_layers(job: Job, layers: int) -> Job:
    return Job(job.device, layers, job.width, job.batch, job.context)


# One CUDA graph


def capture(job: Job, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    torch.use_deterministic_algorithms(True, warn_only=True)
    for form in FORMS:
        if form.master == "split":
            eager, eager_s = _train(job, form, rounds, is_captured=False)
            replayed, replayed_s = _train(job, form, rounds, is_captured=job.device.type == "cuda")
            is_equal = all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))
            found[form.moments] = {"equal": is_equal, "eager_seconds": eager_s, "replayed_seconds": replayed_s}
            print(
                f"{form} | {'equal' if is_equal else 'NOT EQUAL'} | eager {1e3 * statistics.median(eager_s):.2f} ms | "
                f"replayed {1e3 * statistics.median(replayed_s):.2f} ms",
                flush=True,
            )
    return found


def _train(job: Job, form: Form, rounds: int, *, is_captured: bool) -> tuple[list[Tensor], list[float]]:
    clear(job.device)
    model, tokens = job.model(), job.tokens()
    lr = torch.tensor(1e-4, device=job.device)
    update = Sharded(form, list(model.parameters()), lr=lr, max_grad_norm=1.0)

    def step() -> None:
        forward_backward(model, tokens)
        update()

    if job.device.type == "cuda":
        warm_up(step)
    run = captured(step) if is_captured else step
    seconds = []
    for index in range(rounds):
        lr.fill_(1e-4 / (1 + index))
        seconds.append(timed(run, job.device)[1])
    return [p.detach().cpu() for p in model.parameters()], seconds


# As one of many ranks


def ranks(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {}
    print(f"{'':>30} | planned MB | measured MB")
    for count in (8, 64):
        with rank_0_of(count, as_nccl=True):
            for form in FORMS:
                if form.master == "split":
                    found[f"{count}, {form.moments}"] = one = _as_rank_0(job, form, count)
                    planned, measured = one["planned"], one["measured"]
                    more = f"{100 * (measured / planned - 1):+.2f}%" if measured else "not on the CPU"
                    print(
                        f"{count:>3} ranks, {form} | {planned / 1e6:10.1f} | {measured / 1e6:10.1f} {more}", flush=True
                    )
    return found


def _as_rank_0(job: Job, form: Form, count: int) -> dict[str, int]:
    """Return the bytes that the optimizer holds after two steps, planned and measured, parameters included."""
    clear(job.device)
    model, tokens = job.model(), job.tokens()
    outside = allocated(job.device) - sum(p.nbytes for p in model.parameters())
    setting = Setting(
        world_size=count, precision=form.precision, device=job.device.type, transport="collective", clips=True
    )
    planned = plan(PlannedParameter.of_model(model).values(), setting, peak=True)
    update = Sharded(form, list(model.parameters()), transport="collective", max_grad_norm=1.0)
    for _ in range(2):
        forward_backward(model, tokens)
        update()
    synchronize(job.device)
    gc.collect()
    measured = allocated(job.device) - outside if job.device.type == "cuda" else 0
    return {"planned": planned.total, "measured": measured, "says": update.optimizer.memory().total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "largest", "capture", "ranks"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("layers", "width", "batch", "context", "rounds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    usual = {
        "steps": dict(layers=48, width=1600, batch=8, context=1024, rounds=5),
        "largest": dict(layers=0, width=4096, batch=1, context=512, rounds=6),
        "capture": dict(layers=12, width=1600, batch=4, context=512, rounds=5),
        "ranks": dict(layers=8, width=1600, batch=1, context=256, rounds=0),
    }[args.what]
    if args.rehearse:
        usual = dict(layers=2, width=64, batch=1, context=16, rounds=2)
    usual |= {name: value for name, value in vars(args).items() if name in usual and value is not None}
    job = Job(torch.device(args.device), *(usual[name] for name in ("layers", "width", "batch", "context")))
    run = {
        "steps": lambda: steps(job, usual["rounds"]),
        "largest": lambda: largest(job, (1, 2) if args.rehearse else (2, 4), usual["rounds"]),
        "capture": lambda: capture(job, usual["rounds"]),
        "ranks": lambda: ranks(job),
    }[args.what]
    print(json.dumps({"job": usual, **run()}))


if __name__ == "__main__":
    main()
