# SPDX-License-Identifier: Apache-2.0
"""Train although one rank has fewer batches than another, with torch's Join.

    torchrun --nproc-per-node 2 examples/uneven.py
    torchrun --nproc-per-node 2 examples/uneven.py --stock

With --stock, DistributedDataParallel joins, and torch.optim.AdamW trains. Both print the same.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from shardadam import ShardedAdamW


def main(stock: bool) -> None:
    dist.init_process_group()
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
    optimizer = (torch.optim.AdamW if stock else ShardedAdamW)(model.named_parameters(), lr=1e-2)
    train = DistributedDataParallel(model) if stock else model
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=100)
    optimizer.register_step_post_hook(lambda *_: schedule.step())  # also on ranks without batches

    inputs = torch.randn(40 + 60 * rank, 8, 16, generator=torch.Generator().manual_seed(rank)).to(device)
    with Join([train if stock else optimizer]):  # without it, rank 1 waits for rank 0
        for batch in inputs:  # 40 on rank 0, 100 on rank 1
            nn.functional.mse_loss(train(batch), batch.sum(dim=1, keepdim=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
    # DDP has now broadcast the parameters of rank 1, but rank 0's AdamW is 60 steps behind: a second epoch would train
    # the ranks apart. ShardedAdamW's state is the same as if all ranks had had 100 batches.
    with torch.no_grad():
        loss = nn.functional.mse_loss(model(inputs), inputs.sum(dim=-1, keepdim=True))
        norm = torch.stack([p.norm() for p in model.parameters()]).norm()
    dist.all_reduce(loss.div_(dist.get_world_size()))
    if rank == 0:
        print(f"loss {loss.item():.6f}  norm of parameters {norm.item():.6f}")
    dist.barrier()  # DDP's join may still be sending
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--stock" in sys.argv)
