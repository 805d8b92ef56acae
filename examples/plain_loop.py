# SPDX-License-Identifier: Apache-2.0
"""Train with data-parallel AdamW that keeps half the state on each of two ranks: the smallest loop.

    torchrun --nproc-per-node 2 examples/plain_loop.py
    torchrun --nproc-per-node 2 examples/plain_loop.py --stock

The second command trains with DistributedDataParallel and torch.optim.AdamW instead. The losses are equal; the state
per rank is 8 bytes per parameter, divided by the number of ranks in the first.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardadam import ShardedAdamW


def main(stock: bool) -> None:
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 1)).to(device)
    if stock:
        model = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:  # the model is not wrapped in DDP; the optimizer averages gradients
        optimizer = ShardedAdamW(model.named_parameters(), lr=1e-2)

    generator = torch.Generator().manual_seed(rank)  # each rank has data of its own
    inputs = torch.randn(256, 16, generator=generator).to(device)
    targets = inputs.sum(dim=1, keepdim=True)
    for step in range(100):
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()  # gradients are reduce-scattered while this runs
        optimizer.step()  # every rank updates its shard, then parameters are gathered
        optimizer.zero_grad()
        if step % 20 == 0:
            dist.all_reduce(loss.detach_())  # each rank's loss is that of its own data
            if rank == 0:
                print(f"step {step:3d}  loss {loss.item() / world_size:.6f}")

    if isinstance(optimizer, ShardedAdamW):
        optimizer.check_in_sync()  # raises if ranks hold different parameters
    if rank == 0:
        values = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        print(f"state: {sum(v.nbytes for v in values)} bytes a rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--stock" in sys.argv)
