# SPDX-License-Identifier: Apache-2.0
"""How far from the memory floor is the update, in every format?

    OMP_NUM_THREADS=1 python benchmarks/update.py [--device cpu] [--numel 16777216] [--rounds 7]

One process, no process group. Three things take turns: the update of a whole optimizer (no communication), one raw call
of torch's fused AdamW on float32 tensors of as many elements, and a copy that moves as many bytes as the format must
(each of its tensors read, all but the gradient written). Medians and, in brackets, the fastest and the slowest round.
``/torch`` is the median ratio of update to raw call; ``floor`` is the copy's time over the update's. The last column is
the most memory that a step takes for itself on top of what was there.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from shardadam import Precision, ShardedAdamW
from shardadam.update import formats

FORMATS = [
    (torch.float32, "fp32", "auto"),
    (torch.float32, "bf16", "auto"),
    (torch.float32, "int8", "auto"),
    *(
        (torch.bfloat16, moments, master)
        for moments in ("fp32", "bf16", "int8")
        for master in ("fp32", "split", "none")
    ),
]


def build(dtype: torch.dtype, moments: str, master: str, numel: int, device: torch.device) -> ShardedAdamW:
    precision = Precision(moments=moments, master=master)  # type: ignore[arg-type]
    optimizer = ShardedAdamW([nn.Parameter(torch.randn(numel, device=device, dtype=dtype))], precision=precision)
    for arena in optimizer._arenas:
        arena.gradient_shard.normal_()
    return optimizer


def update(optimizer: ShardedAdamW) -> None:
    for arena in optimizer._arenas:
        device = arena.parameters.device
        arena.update.begin(
            found_inf=torch.zeros((), device=device),
            used=torch.ones(1, dtype=torch.bool, device=device),
            host_used=None,
            coefficient=None,
            hyperparameters=optimizer.param_groups[0],
        )
        for bucket in arena.buckets:
            arena.update.update_(bucket.shard, bucket.plan)


def bytes_moved(optimizer: ShardedAdamW) -> int:
    (arena,) = optimizer._arenas
    names = (*formats.MOMENTS, *formats.SCALES, *formats.MASTERS)
    kept = sum(arena.state[name].nbytes for name in names if name in arena.state)
    return 2 * (arena.parameters.nbytes + kept) + arena.gradient_shard.nbytes


def raw_call(numel: int, device: torch.device) -> Callable[[], None]:
    weight, gradient, exp_avg = (torch.randn(numel, device=device) for _ in range(3))
    lists = [[weight], [gradient], [exp_avg], [exp_avg.square()], [], [torch.ones((), device=device)]]
    options = dict(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=1e-2, eps=1e-8, amsgrad=False, maximize=False)
    return lambda: torch._fused_adamw_(*lists, **options)


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


def extra_bytes(optimizer: ShardedAdamW, device: torch.device) -> int:
    """The peak of what one step allocates. The gradient's way into the shard, staging included, is not in it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        return torch.cuda.max_memory_allocated() - before
    with watching() as peak:
        optimizer.step()
    return peak()


@contextmanager
def watching() -> Iterator[Callable[[], int]]:
    """The highest that the sum of all allocations and releases on the CPU has been."""
    result = [0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        yield lambda: result[0]
    now = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            result[0] = max(result[0], now)


def measure(dtype: torch.dtype, moments: str, master: str, args: argparse.Namespace, device: torch.device) -> str:
    optimizer = build(dtype, moments, master, args.numel, device)
    moved = bytes_moved(optimizer)
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    forms: dict[str, Callable[[], object]] = {
        "update": lambda: update(optimizer),
        "torch": raw_call(args.numel, device),
        "copy": lambda: target.copy_(source),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for round_index in range(args.rounds + 1):
        for name, form in forms.items():
            taken = seconds(form, device)
            if round_index > 0:
                times[name].append(taken)
    medians = {name: statistics.median(some) for name, some in times.items()}
    each = [1e9 * some / args.numel for some in (medians["update"], min(times["update"]), max(times["update"]))]
    against = statistics.median(a / b for a, b in zip(times["update"], times["torch"], strict=True))
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.sum().backward()
    optimizer.step()  # staging is there now, and stays
    parameter.sum().backward()
    optimizer._look(with_norm=False)
    return (
        f"{str(dtype).removeprefix('torch.'):>8} | {master:>6} | {moments:>7} | {moved / args.numel:5.1f} | "
        f"{each[0]:6.2f} ({each[1]:.2f} to {each[2]:.2f}) | {moved / medians['update'] / 1e9:7.1f} | {against:6.2f} | "
        f"{medians['copy'] / medians['update']:5.2f} | {extra_bytes(optimizer, device) / 2**20:6.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--numel", type=int, default=None, help="None: 2^24 on the CPU, 2^28 on CUDA")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    device = torch.device(args.device)
    args.numel = args.numel or (2**28 if device.type == "cuda" else 2**24)
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    print(f"{name}, Python {platform.python_version()}, torch {torch.__version__}; {args.numel:,} elements")
    print("   dtype | master | moments | bytes | ns an element        |    GB/s | /torch | floor | MiB extra")
    for case in FORMATS:
        print(measure(*case, args, device), flush=True)


if __name__ == "__main__":
    main()
