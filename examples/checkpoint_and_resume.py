# SPDX-License-Identifier: Apache-2.0
"""Save a checkpoint and resume from it on another number of ranks. Run it twice:

    torchrun --nproc-per-node 2 examples/checkpoint_and_resume.py checkpoints
    torchrun --nproc-per-node 3 examples/checkpoint_and_resume.py checkpoints

The second run starts at step 30, and its first loss continues from the last one of the first run. With --stock after
the directory, torch.optim.AdamW trains under DistributedDataParallel, and torch.save saves: the losses are the same.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardadam

STEPS_A_RUN = 30


def main(directory: str, stock: bool) -> None:
    dist.init_process_group()
    rank = dist.get_rank()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
    optimizer = (torch.optim.AdamW if stock else shardadam.ShardedAdamW)(model.named_parameters(), lr=3e-3)
    train = DistributedDataParallel(model) if stock else model
    inputs = torch.randn(256, 16, generator=torch.Generator().manual_seed(0)).to(device)
    targets = inputs.sum(dim=1, keepdim=True)

    first, file = 0, os.path.join(directory, "stock.pt")
    if stock and os.path.exists(file):
        first, *states = torch.load(file, map_location=device)
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
    elif not stock and shardadam.has_checkpoint(directory):
        first = shardadam.load(directory, model=model, optimizer=optimizer).step
    for step in range(first, first + STEPS_A_RUN):
        loss = nn.functional.mse_loss(train(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step in (first, first + STEPS_A_RUN - 1):
            print(f"step {step:2d}  loss {loss.item():.6f}")
    if not stock:  # on all ranks: each writes its part
        shardadam.save(directory, step=first + STEPS_A_RUN, model=model, optimizer=optimizer, keep=2)
    elif rank == 0:
        os.makedirs(directory, exist_ok=True)
        torch.save((first + STEPS_A_RUN, model.state_dict(), optimizer.state_dict()), file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "checkpoints", "--stock" in sys.argv)
