# SPDX-License-Identifier: Apache-2.0
"""Is the memory that `shardadam plan` tells what training takes?

    OMP_NUM_THREADS=1 python benchmarks/plan.py [--ranks 1 2 4] [--layers 8] [--width 512]

Starts the ranks itself, new ones for every line: the decoder of launch/ on 4 tokens a rank, so that activations are
small, 3 steps. What they take is their proportional set size without pages of files (`Pss_Anon` and `Pss_Shmem` of
/proc/PID/smaps_rollup): all ranks' at one time, the highest of samples a millisecond apart while they train, less what
there was before the model was built, after steps of one with a single layer. A rank's mean, as pages of shared memory
count in equal parts to all who have touched them:

    planned   `need(...)` of shardadam.planner: parameters, gradients and all that the optimizer holds
    measured  where malloc gives back at once what is freed (MALLOC_MMAP_THRESHOLD_=65536)
    default   where it keeps some, as it does unless told otherwise
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from shardadam import Precision, ShardedAdamW
from shardadam.planner import Need, Setting, need

sys.path.append(str(Path(__file__).resolve().parents[1] / "launch"))
from model import Decoder, ModelConfig

TOKENS = 4
STEPS = 3
PERIOD_S = 0.001
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    gradient_sync: str
    precision: Precision = field(default_factory=Precision)
    transport: str = "auto"

    def setting(self, world_size: int) -> Setting:
        return Setting(
            world_size=world_size,
            precision=self.precision,
            gradient_sync=self.gradient_sync,  # type: ignore[arg-type]
            transport=self.transport,  # type: ignore[arg-type]
        )

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype:>8} | {self.gradient_sync:>8} | {self.precision.moments:>7} | {self.transport:>10}"


CASES = (
    Case(torch.float32, "backward"),
    Case(torch.float32, "backward", transport="collective"),
    Case(torch.float32, "backward", Precision(moments="int8")),
    Case(torch.float32, "step"),
    Case(torch.bfloat16, "backward"),
    Case(torch.bfloat16, "step"),
)


def pss_bytes(pids: Sequence[int]) -> int:
    """Anonymous and shared memory; without pages of files, which is code."""
    total = 0
    for pid in pids:
        found = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        total += 1024 * sum(int(found[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem"))
    return total


def build(case: Case, model: nn.Module) -> ShardedAdamW:
    return ShardedAdamW(
        model.parameters(),
        precision=case.precision,
        gradient_sync=case.gradient_sync,  # type: ignore[arg-type]
        transport=case.transport,  # type: ignore[arg-type]
    )


def train(model: nn.Module, optimizer: ShardedAdamW) -> None:
    tokens = torch.arange(TOKENS)[None] + 1
    for _ in range(STEPS):
        model(tokens).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def work(rank: int, world_size: int, store: str, case: Case, config: ModelConfig, meeting: Any, trained: Any) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    small = Decoder(replace(config, layers=1)).to(case.dtype)
    optimizer = build(case, small)
    train(small, optimizer)  # libraries and heaps are there then
    del small, optimizer
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    meeting.wait(TIMEOUT_S)  # the parent looks how much there is
    meeting.wait(TIMEOUT_S)
    model = Decoder(config).to(case.dtype)
    optimizer = build(case, model)
    gc.collect()
    meeting.wait(TIMEOUT_S)  # and looks from here on
    train(model, optimizer)
    if world_size > 1:
        dist.barrier()
    trained.set()
    meeting.wait(TIMEOUT_S)
    del model, optimizer
    if world_size > 1:
        dist.destroy_process_group()


def measure(case: Case, world_size: int, config: ModelConfig) -> float:
    """Bytes a rank at the peak."""
    spawn = processes.get_context("spawn")
    meeting, trained = spawn.Barrier(world_size + 1), spawn.Event()
    with tempfile.TemporaryDirectory() as directory:
        arguments = (world_size, str(Path(directory) / "store"), case, config, meeting, trained)
        ranks = processes.spawn(work, arguments, nprocs=world_size, join=False)  # type: ignore[attr-defined]
        meeting.wait(TIMEOUT_S)
        before, peak = pss_bytes(ranks.pids()), 0
        meeting.wait(TIMEOUT_S)
        meeting.wait(TIMEOUT_S)
        while not trained.is_set():
            peak = max(peak, pss_bytes(ranks.pids()))
            time.sleep(PERIOD_S)
        peak = max(peak, pss_bytes(ranks.pids()))
        meeting.wait(TIMEOUT_S)
        while not ranks.join():
            pass
    return (peak - before) / world_size


def planned(case: Case, world_size: int, config: ModelConfig) -> tuple[int, Need]:
    with torch.device("meta"):
        model = Decoder(config).to(case.dtype)
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), need(parameters, case.setting(world_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(CASES)), help="numbers of lines")
    args = parser.parse_args()
    config = ModelConfig(args.layers, args.width, args.width // 64, TOKENS)
    numel, _ = planned(CASES[0], 1, config)
    print(f"Python {platform.python_version()}, torch {torch.__version__}; {numel:,} parameters, MB a rank")
    print("  N |    dtype |     sync | moments |  transport |  planned | measured |  default | more")
    for world_size in args.ranks:
        for case in (CASES[index] for index in args.cases):
            if world_size == 1 and case.transport != "auto":
                continue
            _, expected = planned(case, world_size, config)
            measured = []
            for threshold in ("65536", None):
                if threshold is None:
                    os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
                else:
                    os.environ["MALLOC_MMAP_THRESHOLD_"] = threshold
                measured.append(measure(case, world_size, config))
            numbers = " | ".join(f"{value / 1e6:8.1f}" for value in (expected.total, *measured))
            print(
                f"{world_size:>3} | {case} | {numbers} | {100 * (measured[0] / expected.total - 1):+.1f}%", flush=True
            )


if __name__ == "__main__":
    main()
