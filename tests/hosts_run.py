# SPDX-License-Identifier: Apache-2.0
"""Train a small model on the hosts of test_launchers.py; each rank writes its state to a file after every step.

... tests/hosts_run.py --steps 8 --out DIRECTORY [--hybrid] [--pace SECONDS] [--timeout SECONDS] [--save]

With --save it waits after step 5 for a file DIRECTORY/save, saves a checkpoint, and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import shardadam
from shardadam import ShardedAdamW

SAVED_STEP = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hybrid", action="store_true")
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    dist.init_process_group("gloo", timeout=timedelta(seconds=args.timeout))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    mesh = None
    if args.hybrid:
        mesh = init_device_mesh("cpu", (world_size // local, local), mesh_dim_names=("replica", "shard"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    optimizer = ShardedAdamW(model.named_parameters(), lr=1e-2, process_group=mesh, max_grad_norm=1.0)
    batches = torch.randn(args.steps, 4, 16, generator=torch.Generator().manual_seed(1))
    for step, batch in enumerate(batches):
        own = batch.chunk(world_size)[rank]
        model(own).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(args.pace)
        report = {
            "step": step,
            "transport": type(optimizer._engine.transport).__name__,
            "within": type(getattr(optimizer._engine.transport, "_shard", optimizer._engine.transport)).__name__,
            "parameters": [p.flatten().tolist() for p in model.parameters()],
        }
        unpublished = args.out / f"{rank}.new"
        unpublished.write_text(json.dumps(report))
        unpublished.replace(args.out / f"{rank}.json")
        if args.save and step == SAVED_STEP:
            while not (args.out / "save").exists():
                time.sleep(0.1)
            shardadam.save(args.out / "checkpoint", model=model, optimizer=optimizer, step=step)
            break
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
