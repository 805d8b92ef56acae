# SPDX-License-Identifier: Apache-2.0
"""Train matrices with torch.optim.Muon, and embeddings, head and biases with ShardedAdamW.

    torchrun --nproc-per-node 2 examples/muon.py
    torchrun --nproc-per-node 2 examples/muon.py --stock

With --stock, the model is wrapped in DistributedDataParallel, and torch.optim.AdamW takes ShardedAdamW's place. Both
print the same.
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
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    model = nn.Sequential(nn.Embedding(64, 16), hidden, nn.Linear(16, 64)).to(device)
    matrices = [p for p in hidden.parameters() if p.ndim == 2]
    others = [(name, p) for name, p in model.named_parameters() if not any(p is matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=2e-2)
    adam = (torch.optim.AdamW if stock else ShardedAdamW)(others, lr=1e-2)
    if stock:
        model = DistributedDataParallel(model)
    else:
        adam.sync_module(model)  # broadcasts the matrices, too: rank 0's values

    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, 101):
        tokens = torch.randint(64, (64,), generator=generator).to(device)
        noise = torch.randint(8, (64,), generator=generator).to(device)
        loss = nn.functional.cross_entropy(model(tokens), (3 * tokens + noise) % 64)
        loss.backward()
        if not stock:
            adam.average_gradients(matrices)  # adam averages its own; accumulating, call this after the last backward
        gradients = nn.utils.get_total_norm([p.grad for p in matrices])
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            dist.all_reduce(loss.detach_().div_(dist.get_world_size()))
            norm = torch.stack([p.detach().norm() for p in matrices]).norm()
            if dist.get_rank() == 0:
                print(f"step {step:3d}  loss {loss:.6f}  norm of the matrices {norm:.6f}, of gradients {gradients:.6f}")
    if not stock:
        adam.check_in_sync(model)  # compares Muon's parameters, too
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--stock" in sys.argv)
