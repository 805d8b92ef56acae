# SPDX-License-Identifier: Apache-2.0
"""Train bfloat16 parameters with float32 masters, whole or split into 16 extra bits, and with 8-bit moments.

    torchrun --nproc-per-node 2 examples/bf16_and_int8.py

Prints the bytes of state per parameter (over all ranks) and the loss of each format. The losses hardly differ.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

from shardadam import Precision, ShardedAdamW

FORMATS = {
    "fp32 moments, fp32 master": Precision(moments="fp32", master="fp32"),
    "fp32 moments, split master": Precision(moments="fp32", master="split"),
    "int8 moments, split master": Precision(moments="int8", master="split"),
}


def main() -> None:
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(rank)).to(device, torch.bfloat16)
    targets = inputs.sum(dim=1, keepdim=True) / 8
    for name, precision in FORMATS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1)).to(device, torch.bfloat16)
        optimizer = ShardedAdamW(model.named_parameters(), lr=1e-3, precision=precision)
        for _ in range(100):
            loss = nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        count = sum(p.numel() for p in model.parameters())
        if rank == 0:
            nbytes = optimizer.memory().state * world_size / count
            print(f"{name}: {nbytes:5.2f} bytes a parameter  loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
