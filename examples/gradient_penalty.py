# SPDX-License-Identifier: Apache-2.0
"""Train a critic with a penalty on the gradient of its output with respect to its input (WGAN-GP): double backward.

    torchrun --nproc-per-node 2 examples/gradient_penalty.py [backward|step|in_backward]
    torchrun --nproc-per-node 2 examples/gradient_penalty.py --stock

The argument says when gradients are reduced, and parameters updated. With --stock, DistributedDataParallel and
torch.optim.AdamW train instead. All print the same.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardadam import ShardedAdamW

MODES = {"backward": {}, "step": {"gradient_sync": "step"}, "in_backward": {"update": "backward"}}


def main(mode: str) -> None:
    dist.init_process_group()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Softplus(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 1))
    model.to(device)
    if mode == "--stock":
        critic, optimizer = DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        critic, optimizer = model, ShardedAdamW(model.named_parameters(), lr=1e-3, **MODES[mode])

    noise = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, 101):
        real = torch.randn(64, 2, generator=noise).to(device) / 2 + 1
        fake = torch.randn(64, 2, generator=noise).to(device)
        weights = torch.rand(64, 1, generator=noise).to(device)
        mixed = (weights * real + (1 - weights) * fake).requires_grad_()
        of_real, of_fake, of_mixed = critic(torch.cat([real, fake, mixed])).chunk(3)  # one forward, as DDP wants it
        # autograd.grad gives the gradient of the inputs only: no gradient comes to the parameters, nothing is reduced
        (gradient,) = torch.autograd.grad(of_mixed.sum(), mixed, create_graph=True)
        penalty = (gradient.norm(dim=1) - 1).square().mean()
        loss = of_fake.mean() - of_real.mean() + 10 * penalty
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            dist.all_reduce(means := torch.stack([loss.detach(), penalty.detach()]).div_(dist.get_world_size()))
            if dist.get_rank() == 0:
                print(f"step {step:3d}  loss {means[0]:.6f}  penalty {means[1]:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "backward")
