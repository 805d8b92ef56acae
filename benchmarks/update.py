# SPDX-License-Identifier: Apache-2.0
"""How close is the update to the memory's bandwidth, in every format, and how fast are other optimizers?

    OMP_NUM_THREADS=1 python benchmarks/update.py [--device cpu] [--mib 256 ...] [--rounds 7] [--tune] [--json out.json]

Runs one process, without a process group. `--mib` is the size of a shard: parameters, float32 gradient and state.

**The update** of a whole optimizer (no communication, gradients already in the shard) takes turns with a copy that
moves as many bytes as the format must (each tensor is read, and all but the gradient are written). Prints medians and,
in brackets, the fastest and the slowest round. ``floor`` is the copy's time over the update's: the share of the
memory's bandwidth that the update reaches. The last column is the peak of the memory that a step allocates.

**The step**, `optimizer.step()` from gradients in `p.grad`, takes turns with other optimizers that keep the same
format, or the nearest: torch's AdamW (`fused` and `foreach`), the step with float32 masters as users write it by hand
(cast the gradients, step fused, copy the masters back), and 8-bit AdamW of torchao, bitsandbytes and FlashOptim if they
are installed. ``ratio`` is the other's time over shardadam's: above 1, shardadam is faster. Its step includes
the check for NaNs, and on a CPU a copy of each gradient into a buffer in the cache.

`--averages` instead times, in turns, the update with an average of the weights (`ema_decay`) and without, and the pass
of its own with which AveragedModel would average float32 weights.

`--numba` instead times, in turns, the update of CPU shards that Numba compiles, that of torch's kernels, and one call
of torch's fused kernel on as many float32 elements; in one thread, and in `--threads` more. The last two columns are
the times of the first two over that of the third.

`--tune` instead tries the kernel's tile sizes and warps, and correctly rounded against fast division and roots.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from shardadam import Precision, ShardedAdamW
from shardadam.engine.merging import adjoining, merged
from shardadam.update import StepInputs, formats

MIB = 2**20
COPY_BYTES = 4 * 2**30  # at most: a larger one is no faster
PARAMETER_NUMEL = 2**24


@dataclass(frozen=True)
class Form:
    dtype: torch.dtype
    moments: str
    master: str = "auto"

    @property
    def precision(self) -> Precision:
        return Precision(moments=self.moments, master=self.master)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.'):>8} | {self.master:>6} | {self.moments:>7}"


FORMS = [
    *(Form(torch.float32, moments) for moments in ("fp32", "bf16", "int8")),
    *(
        Form(torch.bfloat16, moments, master)
        for moments in ("fp32", "bf16", "int8")
        for master in ("fp32", "split", "none")
    ),
]

HALVES = [
    Form(torch.float16, moments, master) for moments in ("fp32", "bf16", "int8") for master in ("fp32", "split", "none")
]
TUNED = [Form(torch.float32, "fp32"), Form(torch.bfloat16, "fp32", "split"), Form(torch.bfloat16, "int8", "split")]


# shardadam


def build(form: Form, numel: int, device: torch.device, **options: Any) -> ShardedAdamW:
    return ShardedAdamW(parameters_of(form.dtype, numel, device), precision=form.precision, **options)


def parameters_of(dtype: torch.dtype, numel: int, device: torch.device) -> list[nn.Parameter]:
    lengths = [min(PARAMETER_NUMEL, numel - start) for start in range(0, numel, PARAMETER_NUMEL)]
    return [nn.Parameter(torch.randn(length, device=device, dtype=dtype)) for length in lengths]


def update(optimizer: ShardedAdamW) -> None:
    for arena in optimizer._engine.parameters.arenas:
        device = arena.parameters.device
        arena.update.begin(
            StepInputs(
                found_inf=torch.zeros((), device=device),
                used=torch.ones(len(arena.params), dtype=torch.bool, device=device),
                host_used=None,
                coefficient=None,
                hyperparameters=optimizer.param_groups[0],
                ema_decay=optimizer._engine.options.ema_decay,
            )
        )
        for buckets in adjoining(arena.buckets):
            arena.update.step_(*merged(buckets))


def bytes_moved(optimizer: ShardedAdamW) -> int:
    (arena,) = optimizer._engine.parameters.arenas
    return 2 * (arena.parameters.nbytes + kept_bytes(optimizer)) + arena.gradient_shard.nbytes


def kept_bytes(optimizer: ShardedAdamW) -> int:
    (arena,) = optimizer._engine.parameters.arenas
    return sum(arena.state[name].nbytes for name in formats.STATE if name in arena.state)


def bytes_of_an_element(form: Form) -> float:
    """Return the bytes of one element of a shard: parameter, float32 gradient and state."""
    optimizer = build(form, 2**14, torch.device("cpu"))
    return (optimizer._engine.parameters.arenas[0].parameters.nbytes + kept_bytes(optimizer)) / 2**14 + 4


# Other optimizers


@dataclass(frozen=True)
class Peer:
    name: str
    build: Callable[[list[nn.Parameter]], Callable[[], object]]
    forms: Callable[[Form], bool]
    needs: str | None = None


def stock(parameters: list[nn.Parameter], **options: Any) -> Callable[[], object]:
    return torch.optim.AdamW(parameters, **options).step


def with_masters(parameters: list[nn.Parameter]) -> Callable[[], object]:
    masters = [p.detach().float() for p in parameters]
    optimizer = torch.optim.AdamW(masters, fused=True)

    @torch.no_grad()
    def step() -> None:
        for p, master in zip(parameters, masters, strict=True):
            master.grad = p.grad.float()
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_copy_(parameters, masters)

    return step


def torchao_8bit(parameters: list[nn.Parameter]) -> Callable[[], object]:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, bf16_stochastic_round=parameters[0].dtype == torch.bfloat16).step


def bitsandbytes_8bit(parameters: list[nn.Parameter]) -> Callable[[], object]:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters).step


def flashoptim_8bit(parameters: list[nn.Parameter]) -> Callable[[], object]:
    from flashoptim import FlashAdamW

    return FlashAdamW(parameters, lr=1e-3).step


def is_plain(form: Form) -> bool:
    """As in torch: everything is in the parameter's dtype."""
    moments = "fp32" if form.dtype == torch.float32 else "bf16"
    return form.moments == moments and form.master in ("auto", "none")


def is_8bit_alone(form: Form) -> bool:
    return form.moments == "int8" and form.master in ("auto", "none")


def is_8bit_with_master(form: Form) -> bool:
    return form.moments == "int8" and form.master in ("auto", "split")


PEERS = [
    Peer("torch fused", lambda some: stock(some, fused=True), is_plain),
    Peer("torch foreach", lambda some: stock(some, foreach=True), is_plain),
    Peer("by hand, fp32 masters", with_masters, lambda form: form.master in ("fp32", "split")),
    Peer("torchao 8-bit", torchao_8bit, is_8bit_alone, "torchao"),
    Peer("bitsandbytes 8-bit", bitsandbytes_8bit, is_8bit_alone, "bitsandbytes"),
    Peer(
        "FlashOptim",
        flashoptim_8bit,
        lambda form: form.moments == "int8" and form.master in ("auto", "split"),
        "flashoptim",
    ),
]


# Clocks


def seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e4
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turns(contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each contender in every round but the first."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, contender in contenders.items():
            taken = seconds(contender, device)
            if index > 0:
                times[name].append(taken)
    return times


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def copier(nbytes: int, device: torch.device) -> Callable[[], object]:
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def extra_bytes(optimizer: ShardedAdamW, device: torch.device) -> int:
    """Return the peak of what one step allocates, without the reduction of gradients into the shard."""
    parameters = optimizer.param_groups[0]["params"]
    for _ in range(2):  # what the first one allocates may stay
        sum(p.sum() for p in parameters).backward()
        optimizer._engine.sync_before("step", optimizer.param_groups, with_norm=False)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step()
            found = torch.cuda.max_memory_allocated() - before
        else:
            with watching() as peak:
                optimizer.step()
            found = peak()
    return found


@contextmanager
def watching() -> Iterator[Callable[[], int]]:
    """Context manager: yield a function that returns the peak of memory allocated on the CPU inside."""
    result = [0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield lambda: result[0]
    now = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            result[0] = max(result[0], now)


# Measurements


def measure_update(form: Form, numel: int, args: argparse.Namespace) -> dict[str, Any]:
    optimizer = build(form, numel, args.device)
    for arena in optimizer._engine.parameters.arenas:
        arena.allocate_gradient_shard(torch.float32)  # as on several ranks
        arena.gradient_shard.normal_()
    moved = bytes_moved(optimizer)
    copied = min(moved // 2, COPY_BYTES)
    copy = copier(copied, args.device)
    times = in_turns({"update": lambda: update(optimizer), "copy": copy}, args.rounds, args.device)
    copies = [taken * (moved / 2 / copied) for taken in times["copy"]]
    del copy
    found = {
        "numel": numel,
        "bytes": moved / numel,
        "ns": [1e9 * taken / numel for taken in times["update"]],
        "gbs": moved / statistics.median(times["update"]) / 1e9,
        "copy_gbs": moved / statistics.median(copies) / 1e9,
        "floor": ratio(copies, times["update"]),
        "extra_bytes": extra_bytes(optimizer, args.device),
    }
    print(
        f"{form} | {moved / numel:5.1f} | {spread(found['ns'])} | {found['gbs']:7.1f} | {found['floor']:5.2f} | "
        f"{found['extra_bytes'] / MIB:6.2f}",
        flush=True,
    )
    return found


def measure_averages(form: Form, numel: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time the update without averages, with them, and with a pass of its own for them."""
    optimizers = {
        name: build(form, numel, args.device, ema_decay=d) for name, d in (("without", None), ("with", 0.999))
    }
    moved = {}
    for name, optimizer in optimizers.items():
        (arena,) = optimizer._engine.parameters.arenas
        arena.allocate_gradient_shard(torch.float32)
        arena.gradient_shard.normal_()
        moved[name] = bytes_moved(optimizer) / numel
    weights = [p.detach().float() for p in optimizers["without"].param_groups[0]["params"]]
    averages = [torch.zeros_like(w) for w in weights]
    contenders: dict[str, Callable[[], object]] = {
        name: lambda one=optimizer: update(one) for name, optimizer in optimizers.items()
    }
    contenders["pass"] = lambda: torch._foreach_lerp_(averages, weights, 0.001)
    times = in_turns(contenders, args.rounds, args.device)
    own_pass = [a + b for a, b in zip(times["without"], times["pass"], strict=True)]
    found = {
        "numel": numel,
        "bytes": moved,
        "ns": {name: [1e9 * taken / numel for taken in times[name]] for name in optimizers},
        "ratio": ratio(times["with"], times["without"]),
        "ratios": [a / b for a, b in zip(times["with"], times["without"], strict=True)],
        "ratio_of_own_pass": ratio(own_pass, times["without"]),
    }
    print(
        f"{form} | {moved['without']:5.1f} | {moved['with']:5.1f} | {spread(found['ns']['without'])} | "
        f"{spread(found['ns']['with'])} | {spread(found['ratios'])} | {found['ratio_of_own_pass']:5.2f}",
        flush=True,
    )
    return found


def measure_numba(form: Form, numel: int, averages: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Time the update by Numba against that by torch's kernels, and against torch's fused kernel in float32."""
    contenders: dict[str, Callable[[], object]] = {}
    for name, variable in (("numba", "1"), ("torch", "0")):
        os.environ["SHARDADAM_NUMBA"] = variable
        optimizer = build(form, numel, args.device, ema_decay=0.999 if averages else None)
        for arena in optimizer._engine.parameters.arenas:
            arena.allocate_gradient_shard(torch.float32)
            arena.gradient_shard.normal_()
        contenders[name] = lambda one=optimizer: update(one)
    del os.environ["SHARDADAM_NUMBA"]
    flats = [[torch.randn(numel)], [torch.randn(numel)], [torch.zeros(numel)], [torch.zeros(numel)]]
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-8}
    contenders["fused"] = lambda: torch._fused_adamw_(
        *flats, [], [torch.ones(())], amsgrad=False, maximize=False, **options
    )
    times = in_turns(contenders, args.rounds, args.device)
    found = {
        "threads": torch.get_num_threads(),
        "ns": {name: [1e9 * taken / numel for taken in times[name]] for name in contenders},
        **{f"{name} / fused": ratio(times[name], times["fused"]) for name in ("numba", "torch")},
    }
    print(
        f"{form} | {'yes' if averages else '':>7} | {torch.get_num_threads():7d} | {spread(found['ns']['numba'])} | "
        f"{spread(found['ns']['torch'])} | {spread(found['ns']['fused'])} | {found['numba / fused']:5.2f} | "
        f"{found['torch / fused']:5.2f}",
        flush=True,
    )
    return found


def measure_steps(form: Form, numel: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time shardadam's step against each other optimizer, one at a time."""
    peers = [peer for peer in PEERS if peer.forms(form)]
    found: dict[str, Any] = {}
    for peer in peers:
        if peer.needs is not None and importlib.util.find_spec(peer.needs) is None:
            found[peer.name] = "not installed"
            continue
        try:
            found[peer.name] = against(form, numel, peer, args)
            took = found[peer.name]
            text = f"{spread(took['peer_ns'])} | {spread(took['ns'])} | {took['ratio']:5.2f}"
        except torch.OutOfMemoryError:
            found[peer.name] = text = "out of memory"
        except Exception as error:  # in the other library
            found[peer.name] = text = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"{form} | {peer.name:>21} | {text}", flush=True)
        release(args.device)
    return found


def against(form: Form, numel: int, peer: Peer, args: argparse.Namespace) -> dict[str, Any]:
    optimizer = build(form, numel, args.device, gradient_sync="step")
    mine = optimizer.param_groups[0]["params"]
    theirs = parameters_of(form.dtype, numel, args.device)
    for p in (*mine, *theirs):
        p.grad = torch.randn_like(p)
    step = peer.build(theirs)

    def ours() -> None:
        zero(mine)  # the optimizer must see new gradients
        optimizer.step()

    def peers() -> None:
        zero(theirs)
        step()

    contenders = {"ours": ours, "peer": peers, "zero": lambda: zero(theirs)}
    times = in_turns(contenders, args.rounds, args.device)
    net = {name: [a - b for a, b in zip(times[name], times["zero"], strict=True)] for name in ("ours", "peer")}
    return {
        "ns": [1e9 * taken / numel for taken in net["ours"]],
        "peer_ns": [1e9 * taken / numel for taken in net["peer"]],
        "ratio": ratio(net["peer"], net["ours"]),
    }


def zero(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad.zero_()


def tune(args: argparse.Namespace) -> list[dict[str, Any]]:
    from shardadam.update import triton

    found = []
    print("   dtype | master | moments | rows | warps | exact |  GB/s")
    for form in (
        Form(torch.float32, "fp32"),
        Form(torch.bfloat16, "fp32", "split"),
        Form(torch.bfloat16, "int8", "split"),
    ):
        numel = round(args.mib[0] * MIB / bytes_of_an_element(form) / 2**14) * 2**14
        optimizer = build(form, numel, args.device)
        moved = bytes_moved(optimizer)
        for exact in (True, False):
            for rows in (4, 8, 16, 32):
                for warps in (4, 8):
                    triton.ROWS, triton.WARPS, triton.EXACT = rows, warps, exact
                    update(optimizer)
                    rate = moved / min(seconds(lambda o=optimizer: update(o), args.device) for _ in range(3)) / 1e9
                    found.append({"form": str(form), "rows": rows, "warps": warps, "exact": exact, "gbs": rate})
                    print(f"{form} | {rows:4d} | {warps:5d} | {exact!s:>5} | {rate:5.0f}", flush=True)
    return found


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):7.3f} ({min(values):.3f} to {max(values):.3f})"


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("numba", "triton", "torchao", "bitsandbytes", "flashoptim"):
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mib", type=float, nargs="+", help="1024 4096 16384 on CUDA, 256 on the CPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only", nargs="+", default=[], help="only formats whose line has these words, such as: bfloat16 split int8"
    )
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--averages", action="store_true")
    parser.add_argument("--numba", action="store_true")
    parser.add_argument("--threads", type=int, nargs="*", default=[], help="with --numba: more numbers of threads")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.device = torch.device(args.device)
    args.mib = args.mib or ([1024, 4096, 16384] if args.device.type == "cuda" else [256])
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU, one thread"
    result: dict[str, Any] = {"device": name, "versions": versions(), "forms": []}
    print(name, *(f"{key} {value}" for key, value in result["versions"].items()), sep=", ")

    def write() -> None:
        if args.json is not None:
            args.json.write_text(json.dumps(result, indent=1))

    if args.tune:
        result["tune"] = tune(args)
        write()
        return
    forms = [form for form in FORMS if set(args.only) <= set(str(form).split())]
    if args.numba:
        print(
            "   dtype | master | moments | average | threads | ns by Numba | ns by torch | ns of torch's fused fp32 | "
            "Numba / fused | torch / fused"
        )
        numel = round(args.mib[0] * MIB / 28 / 2**14) * 2**14
        chosen = [(form, False) for form in [*FORMS, *HALVES]] + [(form, True) for form in FORMS]
        for threads in (1, *args.threads):
            torch.set_num_threads(threads)
            for form, averages in chosen:
                if set(args.only) <= set(str(form).split()):
                    entry = {"dtype": str(form.dtype), "master": form.master, "moments": form.moments}
                    found = measure_numba(form, numel, averages, args)
                    result["forms"].append(entry | {"averages": averages} | found)
                    release(args.device)
                    write()
        return
    if args.averages:
        print(
            "   dtype | master | moments | bytes |  with | ns without | ns with | with / without | own pass / without"
        )
        for form in forms:
            numel = round(args.mib[0] * MIB / bytes_of_an_element(form) / 2**14) * 2**14
            entry = {"dtype": str(form.dtype), "master": form.master, "moments": form.moments, "mib": args.mib[0]}
            result["forms"].append(entry | measure_averages(form, numel, args))
            release(args.device)
            write()
        return
    for mib in args.mib:
        print(f"\nThe update, shards of {mib:g} MiB")
        print("   dtype | master | moments | bytes |  ns per element           |    GB/s | floor | MiB extra")
        for form in forms:
            numel = round(mib * MIB / bytes_of_an_element(form) / 2**14) * 2**14
            entry = {"dtype": str(form.dtype), "master": form.master, "moments": form.moments, "mib": mib}
            result["forms"].append(entry)
            entry |= measure_update(form, numel, args)
            release(args.device)
            write()
    print(f"\nThe step, shards of {args.mib[0]:g} MiB")
    print(
        "   dtype | master | moments |                  peer |  its ns per element        |  ours             | ratio"
    )
    for form, entry in zip(forms, result["forms"], strict=False):
        entry["peers"] = measure_steps(form, entry["numel"], args)
        write()


if __name__ == "__main__":
    main()
