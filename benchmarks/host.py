# SPDX-License-Identifier: Apache-2.0
"""How much of a step is Python, rather than torch's kernels? And how long does it take to build an optimizer?

    OMP_NUM_THREADS=1 python benchmarks/host.py [--parameters 500] [--numel 1000] [--buckets 40] [--rounds 30]
    OMP_NUM_THREADS=1 python benchmarks/host.py --build 20000 [--rounds 5] [--profile]
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/host.py --build 20000

The first runs one process with float32 parameters of ``--numel`` elements. It records all calls that a step makes from
Python and in which torch computes or makes a tensor, with their arguments, and replays them in a bare loop: that is
torch's share, dispatch included. The rest of the step's time is Python's; so are reads of attributes, sizes and
addresses of tensors. A replay finds in the cache what the step before it has read, so with large parameters waiting for
memory counts as Python's, too. Steps and replays take turns; prints medians, and the fastest and slowest, in ms.

The others build an optimizer over parameters of 1,000 elements, and print wall and CPU time in s. An optimizer over one
parameter is built before: the first of a process imports torch._dynamo, as one of torch.optim does. ``--profile`` also
profiles one build, and prints the functions that took longest.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import platform
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from shardadam import ShardedAdamW
from shardadam.layout import ALIGNMENT_NUMEL

READS = {"__get__", "data_ptr", "dim", "element_size", "is_contiguous", "is_neg", "numel", "size", "stride"}
"""Names of calls that read a property of a tensor, and neither compute nor make one."""


class Record(TorchFunctionMode):
    """Records every call through torch's Python interface, except ``READS``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in READS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(gradient_sync: str, parameters: int, numel: int, buckets: int, rounds: int) -> dict[str, list[float]]:
    weights = [nn.Parameter(torch.randn(numel)) for _ in range(parameters)]
    padded = -(-numel // ALIGNMENT_NUMEL) * ALIGNMENT_NUMEL
    bucket_mb = -(-parameters // buckets) * padded * 4 / 2**20
    optimizer = ShardedAdamW(weights, gradient_sync=gradient_sync, bucket_mb=bucket_mb)  # type: ignore[arg-type]

    def backward() -> None:
        optimizer.zero_grad()
        torch.stack([weight.sum() for weight in weights]).sum().backward()

    for _ in range(3):
        backward()
        optimizer.step()
    backward()
    with Record() as record:
        optimizer.step()

    @torch.no_grad()
    def replay() -> None:
        for func, args, kwargs in record.calls:
            func(*args, **kwargs)

    times: dict[str, list[float]] = {"backward": [], "step": [], "torch": [], "python": []}
    for _ in range(rounds):
        times["backward"].append(timed(backward))
        times["step"].append(timed(optimizer.step))
        times["torch"].append(timed(replay))
        times["python"].append(times["step"][-1] - times["torch"][-1])
        # The replay has written to the step counters from outside: the next step cuts its buckets anew, untimed.
        backward()
        optimizer.step()
    print(f"{gradient_sync}: {len(optimizer._engine.parameters.buckets)} buckets, {len(record.calls)} calls of torch")
    return times


def build(parameters: int, rounds: int, *, profile: bool) -> None:
    is_first = int(os.environ.get("RANK", "0")) == 0
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    ShardedAdamW([nn.Parameter(torch.zeros(1))])
    walls, cpus = [], []
    for round_index in range(rounds + int(profile)):
        weights = [nn.Parameter(torch.randn(1000)) for _ in range(parameters)]
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
        profiler = cProfile.Profile()
        if round_index == rounds:
            profiler.enable()
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer = ShardedAdamW(weights)
        if round_index < rounds:
            cpus.append(time.process_time() - cpu)
            walls.append(time.perf_counter() - wall)
        elif is_first:
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
        del optimizer
    if is_first:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        print(f"{parameters} parameters, {ranks} ranks, in s")
        for name, values in (("wall", walls), ("cpu", cpus)):
            print(f"  {name:8s} {statistics.median(values):6.2f}  ({min(values):.2f} to {max(values):.2f})")
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=500)
    parser.add_argument("--numel", type=int, default=1000, help="elements of a parameter")
    parser.add_argument("--buckets", type=int, default=40)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--build", type=int, help="build an optimizer over so many parameters")
    parser.add_argument("--profile", action="store_true", help="with --build: also profile it")
    arguments = parser.parse_args()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    if arguments.build is not None:
        build(arguments.build, arguments.rounds or 5, profile=arguments.profile)
        return
    for gradient_sync in ("backward", "step", "external"):
        times = measure(gradient_sync, arguments.parameters, arguments.numel, arguments.buckets, arguments.rounds or 30)
        for name, values in times.items():
            print(f"  {name:8s} {statistics.median(values):6.2f}  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
