# SPDX-License-Identifier: Apache-2.0
"""Train bfloat16 parameters with float32 masters, whole or split into 16 extra bits, and with 8-bit moments.

    torchrun --nproc-per-node 2 examples/bf16_and_int8.py
    torchrun --nproc-per-node 2 examples/bf16_and_int8.py --stock

Prints the bytes of state per parameter (over all ranks) and the loss of each format. The losses hardly differ. With
--stock, DistributedDataParallel averages bfloat16 gradients and torch.optim.AdamW trains float32 copies: as many
bytes, but on every rank.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardadam import Precision, ShardedAdamW

FORMATS = [("fp32", "fp32"), ("fp32", "split"), ("int8", "split")]


def main(stock: bool) -> None:
    dist.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    inputs = torch.randn(256, 64, generator=torch.Generator().manual_seed(rank)).to(device, torch.bfloat16)
    targets = inputs.float().sum(dim=1, keepdim=True) / 8
    for moments, kind in FORMATS[: 1 if stock else 3]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1)).to(device, torch.bfloat16)
        if stock:
            masters = [p.detach().float() for p in model.parameters()]
            model, optimizer = DistributedDataParallel(model), torch.optim.AdamW(masters, lr=1e-3)
        else:
            optimizer = ShardedAdamW(
                model.named_parameters(), lr=1e-3, precision=Precision(moments=moments, master=kind)
            )
        for _ in range(100):
            loss = nn.functional.mse_loss(model(inputs).float(), targets)
            loss.backward()
            if stock:
                for master, p in zip(masters, model.parameters(), strict=True):
                    master.grad, p.grad = p.grad.float(), None
            optimizer.step()
            optimizer.zero_grad()
            if stock:
                nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(masters).bfloat16(), model.parameters())
        dist.all_reduce(loss.detach_().div_(world_size))
        if stock:  # on every rank
            tensors = masters + [t for state in optimizer.state.values() for t in state.values() if t.ndim]
        nbytes = sum(t.nbytes for t in tensors) if stock else optimizer.memory().state * world_size
        nbytes /= sum(p.numel() for p in model.parameters())
        if rank == 0:
            print(f"{moments} moments, {kind} master: {nbytes:5.2f} bytes a parameter  loss {loss.item():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--stock" in sys.argv)
