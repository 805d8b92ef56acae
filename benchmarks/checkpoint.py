# SPDX-License-Identifier: Apache-2.0
"""How fast are checkpoints, compared with the disk and torch.distributed.checkpoint? How long do they stall training?

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/checkpoint.py [--numel 100e6] [--rounds 5]
        [--directory DIR] [--json FILE]

Trains a model of float32 matrices with ShardedAdamW: a checkpoint has 12 bytes for each parameter. Each round runs, in
turn: `dd` with as many bytes (conv=fsync), `shardadam.save`, `dcp.save` of the same model under FSDP2 with torch's
AdamW (each rank holds 1/N of the parameters there), `shardadam.load`, `dcp.load`, and two asynchronous saves. The stall
is the time of the call itself. In the second one, a training step follows at once, and copies what is not yet written:
compare call and step with a step alone. Every form writes new files, removed between rounds, outside the timings.
Prints medians, and the lowest and highest times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

import shardadam


class Model(nn.Module):
    def __init__(self, numel: int) -> None:
        super().__init__()
        width = 2048
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(max(1, round(numel / width**2))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x.sum()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 2048)).backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(work: Callable[[], object]) -> float:
    """Return the seconds until all ranks have finished."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def dd(path: Path, nbytes: int) -> None:
    count = max(1, nbytes // 2**22)
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=4M", f"count={count}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=float, default=100e6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None, help="on the disk to measure; default: the current one")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    paths = [tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=args.directory or os.getcwd())]
    if rank != 0:
        os.rmdir(paths[0])
    dist.broadcast_object_list(paths)
    root = Path(paths[0])

    torch.manual_seed(0)
    model = Model(int(args.numel))
    optimizer = shardadam.ShardedAdamW(model.parameters())
    step(model, optimizer)
    peer = Model(int(args.numel))
    for layer in peer.layers:
        fully_shard(layer)
    fully_shard(peer)
    peers_optimizer = torch.optim.AdamW(peer.parameters(), fused=True)
    step(peer, peers_optimizer)
    numel = sum(p.numel() for p in model.parameters())
    nbytes = 12 * numel

    def peers_state() -> dict[str, object]:
        return {"model": peer.state_dict(), "optimizer": get_optimizer_state_dict(peer, peers_optimizer)}

    stalls: list[float] = []
    with_steps: list[float] = []

    def save_asynchronously(name: str, seconds: list[float], then: Callable[[], object]) -> None:
        start = time.perf_counter()
        future = shardadam.save(root / name, step=0, model=model, optimizer=optimizer, asynchronous=True)
        then()
        seconds.append(time.perf_counter() - start)
        future.result()

    forms: dict[str, Callable[[], object]] = {
        "dd, one stream": lambda: dd(root / "dd", nbytes) if rank == 0 else None,
        "dd, a stream a rank": lambda: dd(root / f"dd-{rank}", nbytes // world_size),
        "shardadam.save": lambda: shardadam.save(root / "ours", step=0, model=model, optimizer=optimizer),
        "dcp.save, FSDP2": lambda: dcp.save(peers_state(), checkpoint_id=str(root / "dcp")),
        "shardadam.load": lambda: shardadam.load(root / "ours", model=model, optimizer=optimizer),
        "dcp.load, FSDP2": lambda: dcp.load(peers_state(), checkpoint_id=str(root / "dcp")),
        "asynchronous save, until written": lambda: save_asynchronously("async", stalls, lambda: None),
        "a training step": lambda: step(model, optimizer),
        "asynchronous save and step, until written": lambda: save_asynchronously(
            "busy", with_steps, lambda: step(model, optimizer)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    try:
        for _ in range(args.rounds + 1):  # the first warms up
            for name, work in forms.items():
                seconds[name].append(timed(work))
            dist.barrier()
            if rank == 0:
                for path in root.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                os.sync()
    finally:
        if rank == 0:
            shutil.rmtree(root)
    of_ranks: list[list[float]] = [[]] * world_size
    for name, found in (("stall of training", stalls), ("call and a training step", with_steps)):
        dist.all_gather_object(of_ranks, found)
        seconds[f"asynchronous save, {name}"] = [max(each) for each in zip(*of_ranks, strict=True)]
    if rank == 0:
        report(seconds, nbytes, numel, world_size, args.json)
    dist.destroy_process_group()


def report(seconds: dict[str, list[float]], nbytes: int, numel: int, world_size: int, path: str | None) -> None:
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {world_size} ranks, {os.cpu_count()} cores; "
        f"{numel:,} float32 parameters, {nbytes / 1e9:.2f} GB a checkpoint"
    )
    fastest = statistics.median(seconds["dd, one stream"][1:])
    fastest = min(fastest, statistics.median(seconds["dd, a stream a rank"][1:]))
    for name, values in seconds.items():
        low, middle, high = min(values[1:]), statistics.median(values[1:]), max(values[1:])
        rate = "" if "step" in name or "stall" in name else f"{nbytes / middle / 1e9:6.2f} GB/s"
        share = f"{fastest / middle:6.2f} of dd's speed" if rate else ""
        print(f"  {name:41} {middle:7.3f} s ({low:.3f} to {high:.3f})  {rate}  {share}")
    sync = seconds["shardadam.save"][1:]
    stalls = seconds["asynchronous save, stall of training"][1:]
    ratios = [stall / whole for stall, whole in zip(stalls, sync, strict=True)]
    print(f"  stall / synchronous save: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    loads = zip(seconds["shardadam.load"][1:], seconds["dcp.load, FSDP2"][1:], strict=True)
    ratios = [ours / theirs for ours, theirs in loads]
    print(f"  shardadam.load / dcp.load: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if path:
        Path(path).write_text(json.dumps({"nbytes": nbytes, "world_size": world_size, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
