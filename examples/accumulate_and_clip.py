# SPDX-License-Identifier: Apache-2.0
"""Accumulate gradients without communication in between, clip them, and follow a learning rate schedule.

    torchrun --nproc-per-node 2 examples/accumulate_and_clip.py
    torchrun --nproc-per-node 2 examples/accumulate_and_clip.py --stock

Prints the norm before clipping, and the learning rate. With --stock, DistributedDataParallel and torch.optim.AdamW
train instead and print the same.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardadam import ShardedAdamW

MICRO_BATCHES = 4


def main(stock: bool) -> None:
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
    model = DistributedDataParallel(model) if stock else model
    optimizer = (torch.optim.AdamW if stock else ShardedAdamW)(model.named_parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=60)

    generator = torch.Generator().manual_seed(rank)
    for step in range(60):
        inputs = torch.randn(MICRO_BATCHES, 32, 16, generator=generator).to(device)
        targets = inputs.sum(dim=-1, keepdim=True)
        with model.no_sync() if stock else optimizer.no_sync():  # gradients accumulate in p.grad; nothing is sent
            for micro in range(MICRO_BATCHES - 1):
                (nn.functional.mse_loss(model(inputs[micro]), targets[micro]) / MICRO_BATCHES).backward()
        loss = nn.functional.mse_loss(model(inputs[-1]), targets[-1])
        (loss / MICRO_BATCHES).backward()  # reduces the accumulated gradients, too
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0) if stock else optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_())
        if rank == 0 and step % 12 == 0:
            rate = schedule.get_last_lr()[0]
            print(f"step {step:2d}  loss {loss.item() / world_size:.6f}  norm {norm.item():.5f}  lr {rate:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--stock" in sys.argv)
