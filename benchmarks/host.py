# SPDX-License-Identifier: Apache-2.0
"""How much of a step is Python, rather than torch's kernels?

    OMP_NUM_THREADS=1 python benchmarks/host.py [--parameters 500] [--buckets 40] [--rounds 30]

Runs one process with float32 parameters of 1,000 elements. Records all calls of torch that a step makes from Python,
with their arguments, and replays them in a bare loop: that is torch's share, dispatch included. The rest of the step's
time is shardadam's. Steps and replays take turns; prints medians, and the fastest and slowest, in ms.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from shardadam import ShardedAdamW


class Record(TorchFunctionMode):
    """Records every call through torch's Python interface, except reads of tensor attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measure(gradient_sync: str, parameters: int, buckets: int, rounds: int) -> dict[str, list[float]]:
    numel = 1000
    weights = [nn.Parameter(torch.randn(numel)) for _ in range(parameters)]
    bucket_mb = -(-parameters // buckets) * 1024 * 4 / 2**20
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

    times: dict[str, list[float]] = {"step": [], "torch": [], "python": []}
    for _ in range(rounds):
        backward()
        times["step"].append(timed(optimizer.step))
        times["torch"].append(timed(replay))
        times["python"].append(times["step"][-1] - times["torch"][-1])
    print(f"{gradient_sync}: {len(optimizer._engine.parameters.buckets)} buckets, {len(record.calls)} calls of torch")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=500)
    parser.add_argument("--buckets", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    for gradient_sync in ("backward", "step", "external"):
        times = measure(gradient_sync, arguments.parameters, arguments.buckets, arguments.rounds)
        for name, values in times.items():
            print(f"  {name:8s} {statistics.median(values):6.2f}  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
