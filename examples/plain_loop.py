# SPDX-License-Identifier: Apache-2.0
"""Train with data-parallel AdamW that keeps half the state on each of two ranks: the smallest loop.

    torchrun --nproc-per-node 2 examples/plain_loop.py

Expect the loss to fall, and the state per rank to be 8 bytes per parameter, divided by the number of ranks.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from shardadam import ShardedAdamW


def main() -> None:
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 1)).to(device)  # not wrapped in DDP
    optimizer = ShardedAdamW(model.named_parameters(), lr=1e-2)  # broadcasts rank 0's parameters

    generator = torch.Generator().manual_seed(rank)  # each rank has data of its own
    inputs = torch.randn(256, 16, generator=generator).to(device)
    targets = inputs.sum(dim=1, keepdim=True)
    for step in range(100):
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()  # gradients are reduce-scattered while this runs
        optimizer.step()  # every rank updates its shard, then parameters are gathered
        optimizer.zero_grad()
        if rank == 0 and step % 20 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")

    optimizer.check_in_sync()  # raises if ranks hold different parameters
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"state: {optimizer.memory().state} bytes a rank for {count} parameters on {world_size} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
