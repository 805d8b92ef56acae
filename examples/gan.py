# SPDX-License-Identifier: Apache-2.0
"""Train a generator and a discriminator, each with an optimizer of its own.

    torchrun --nproc-per-node 2 examples/gan.py
    torchrun --nproc-per-node 2 examples/gan.py --stock

With --stock, DistributedDataParallel and torch.optim.AdamW train both instead and print the same.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from shardadam import ShardedAdamW


def main(stock: bool) -> None:
    dist.init_process_group()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(i, 64), nn.LeakyReLU(0.2), nn.Linear(64, o)) for i, o in ((4, 2), (2, 1))]
    models = [model.to(device) for model in models]
    kind = torch.optim.AdamW if stock else ShardedAdamW
    g_optimizer, d_optimizer = (kind(each.named_parameters(), lr=2e-3, betas=(0.5, 0.99)) for each in models)
    generator, discriminator = map(DistributedDataParallel, models) if stock else models

    noise = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, 201):
        real = (torch.randn(64, 2, generator=noise) / 2 + torch.tensor([1.0, -1.0])).to(device)
        fake = generator(torch.randn(64, 4, generator=noise).to(device))

        scores = discriminator(torch.cat([real, fake.detach()]))  # detached: no gradients go to the generator
        targets = torch.ones_like(scores)
        targets[len(real) :] = 0
        d_loss = binary_cross_entropy_with_logits(scores, targets)
        d_loss.backward()
        d_optimizer.step()
        d_optimizer.zero_grad()

        models[1].requires_grad_(False)  # else its gradients are reduced, too, only to be discarded
        g_loss = binary_cross_entropy_with_logits(models[1](fake), torch.ones(64, 1, device=device))
        g_loss.backward()
        g_optimizer.step()
        g_optimizer.zero_grad()
        models[1].requires_grad_(True)

        if step % 40 == 0:
            dist.all_reduce(means := torch.stack([d_loss.detach(), g_loss.detach()]).div_(dist.get_world_size()))
            if dist.get_rank() == 0:
                print(f"step {step:3d}  discriminator's loss {means[0]:.6f}  generator's {means[1]:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--stock" in sys.argv)
