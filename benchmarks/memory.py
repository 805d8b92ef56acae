# SPDX-License-Identifier: Apache-2.0
"""How many bytes of state does each parameter take on each rank, in every format?

    python benchmarks/memory.py [--world-size 1 2 4]

Starts the ranks itself, builds a decoder-like model of 50M parameters and prints ``optimizer.memory()``. Tables are
what the update needs besides: the parameter that each 128 elements belong to, and scalars of each parameter.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from shardadam import Precision, ShardedAdamW

FORMATS = {
    (torch.float32, "fp32", "auto"): 8.0,
    (torch.float32, "bf16", "auto"): 4.0,
    (torch.float32, "int8", "auto"): 2.07,
    (torch.bfloat16, "fp32", "fp32"): 12.0,
    (torch.bfloat16, "fp32", "split"): 10.0,
    (torch.bfloat16, "bf16", "split"): 6.0,
    (torch.bfloat16, "int8", "split"): 4.07,
    (torch.bfloat16, "int8", "none"): 2.07,
}


def shapes() -> list[tuple[int, ...]]:
    width = 768
    layer = [
        (3 * width, width),
        (width, width),
        (4 * width, width),
        (width, 4 * width),
        (4 * width,),
        (width,),
        (width,),
    ]
    return [(10_000, width), *6 * layer, (width,)]


def measure(rank: int, world_size: int, store: str) -> None:
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    for (dtype, moments, master), nominal in FORMATS.items():
        parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes()]
        numel = sum(p.numel() for p in parameters)
        precision = Precision(moments=moments, master=master)  # type: ignore[arg-type]
        memory = ShardedAdamW(parameters, precision=precision).memory()
        if rank == 0:
            each, expected = memory.state / numel, nominal / world_size
            print(
                f"{world_size:>3} | {str(dtype).removeprefix('torch.'):>8} | {master:>6} | {moments:>7} | "
                f"{each:9.4f} | {expected:8.4f} | {100 * (each / expected - 1):+5.2f}% | {memory.tables / numel:.4f}",
                flush=True,
            )
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--world-size", nargs="+", type=int, default=[1, 2, 4])
    args = parser.parse_args()
    numel = sum(torch.Size(shape).numel() for shape in shapes())
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}; {numel:,} parameters, bytes of each per rank"
    )
    print("  N |    dtype | master | moments |  measured |  nominal |   more | tables")
    for world_size in args.world_size:
        with tempfile.TemporaryDirectory() as directory:
            store = str(Path(directory) / "store")
            processes.spawn(measure, (world_size, store), nprocs=world_size)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
