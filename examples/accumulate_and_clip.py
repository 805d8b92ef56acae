# SPDX-License-Identifier: Apache-2.0
"""Accumulate gradients without communication in between, clip them, and follow a learning rate schedule.

    torchrun --nproc-per-node 2 examples/accumulate_and_clip.py

Prints the norm before clipping, which is equal on all ranks, and the learning rate.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from shardadam import ShardedAdamW

MICRO_BATCHES = 4


def main() -> None:
    dist.init_process_group()
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
    optimizer = ShardedAdamW(model.named_parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=60)

    generator = torch.Generator().manual_seed(rank)
    for step in range(60):
        inputs = torch.randn(MICRO_BATCHES, 32, 16, generator=generator).to(device)
        targets = inputs.sum(dim=-1, keepdim=True)
        with optimizer.no_sync():  # gradients accumulate in p.grad; nothing is sent
            for micro in range(MICRO_BATCHES - 1):
                (nn.functional.mse_loss(model(inputs[micro]), targets[micro]) / MICRO_BATCHES).backward()
        loss = nn.functional.mse_loss(model(inputs[-1]), targets[-1])
        (loss / MICRO_BATCHES).backward()  # reduces the accumulated gradients, too
        norm = optimizer.clip_grad_norm_(1.0)  # not torch.nn.utils.clip_grad_norm_
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if rank == 0 and step % 12 == 0:
            print(f"step {step:2d}  loss {loss.item():.4f}  norm {norm.item():.3f}  lr {schedule.get_last_lr()[0]:.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
