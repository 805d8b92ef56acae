# SPDX-License-Identifier: Apache-2.0
"""Compile a model block by block, or as a whole, and gather parameters under the next forward.

    torchrun --nproc-per-node 2 examples/compiled.py [blocks|whole] [BACKEND]
    torchrun --nproc-per-node 2 examples/compiled.py [blocks|whole] [BACKEND] --stock

BACKEND is torch.compile's, by default "inductor"; on CPUs that needs a C++ compiler. With --stock, the same model is
compiled under DistributedDataParallel, and torch.optim.AdamW trains. Both print the same.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shardadam import ShardedAdamW


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main(how: str = "blocks", backend: str = "inductor", stock: bool = False) -> None:
    dist.init_process_group()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), *(Block() for _ in range(3)), nn.Linear(32, 1)).to(device)
    optimizer = (torch.optim.AdamW if stock else ShardedAdamW)(model.named_parameters(), lr=1e-3)
    if not stock:
        optimizer.overlap_gather(model)  # before a model is compiled as a whole; blocks may be compiled already
    if how == "blocks":
        for block in model[1:-1]:
            block.compile(backend=backend, fullgraph=True)
    train = DistributedDataParallel(model) if stock else model
    train = torch.compile(train, backend=backend) if how == "whole" else train

    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, 61):
        inputs = torch.randn(64, 16, generator=generator).to(device)
        loss = nn.functional.mse_loss(train(inputs), inputs.sum(dim=1, keepdim=True))
        loss.backward()
        optimizer.step()  # does not wait for the parameters: each block's forward does
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_().div_(dist.get_world_size()))
        if step % 20 == 0 and dist.get_rank() == 0:
            print(f"step {step}  loss {loss.item():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*(word for word in sys.argv[1:] if word != "--stock"), stock="--stock" in sys.argv)
