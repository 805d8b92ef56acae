# SPDX-License-Identifier: Apache-2.0
"""Keep an exponential moving average of the weights, split over the ranks, and evaluate it during training.

    torchrun --nproc-per-node 2 examples/ema.py
    torchrun --nproc-per-node 2 examples/ema.py --stock

With --stock, DistributedDataParallel, torch.optim.AdamW and torch.optim.swa_utils.AveragedModel do the same, with a
whole copy of the weights on every rank, and print the same.
"""

import os
import sys
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shardadam import ShardedAdamW


def main(stock: bool) -> None:
    dist.init_process_group()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
    if stock:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    else:
        optimizer = ShardedAdamW(model.named_parameters(), lr=2e-2, ema_decay=0.95)
    train = DistributedDataParallel(model) if stock else model

    def loss_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(model(inputs), inputs.sum(dim=1, keepdim=True))

    held_out = torch.randn(512, 16, generator=torch.Generator().manual_seed(99)).to(device)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, 101):
        loss_of(train, torch.randn(8, 16, generator=generator).to(device)).backward()
        optimizer.step()  # updates the averages, too
        optimizer.zero_grad()
        if stock:
            average.update_parameters(model)
        if step % 25 == 0:
            with torch.no_grad():
                loss = loss_of(model, held_out)
                # On all ranks, as it gathers. At its end the training weights are back, bit for bit.
                with nullcontext() if stock else optimizer.averaged_parameters():
                    averaged = loss_of(average if stock else model, held_out)
            if dist.get_rank() == 0:
                print(f"step {step:3d}  held-out loss {loss.item():.6f}  of the averages {averaged.item():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--stock" in sys.argv)
