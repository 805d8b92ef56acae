# SPDX-License-Identifier: Apache-2.0
"""Train a mixture of experts that are spread over the ranks; tokens travel to the expert that a router chooses.

    torchrun --nproc-per-node 2 examples/moe.py
    torchrun --nproc-per-node 2 examples/moe.py --stock

With --stock, every rank holds all experts, under DistributedDataParallel and torch.optim.AdamW. Both print the same.
"""

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.nn.functional import all_to_all_single
from torch.nn.parallel import DistributedDataParallel

from shardadam import ShardedAdamW


class Experts(nn.Module):
    def __init__(self, held: Sequence[int], count: int) -> None:
        super().__init__()
        self.router, every = nn.Linear(16, count), [nn.Linear(16, 16) for _ in range(count)]
        self.experts = nn.ModuleDict({str(i): every[i] for i in held})  # each expert has a name of its own

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(dim=1).max(dim=1)
        order, sent = chosen.argsort(), chosen.bincount(minlength=self.router.out_features)
        x, parts, experts = x[order], sent.tolist(), list(self.experts.values())
        if len(experts) > 1:
            outputs = torch.cat([expert(part) for expert, part in zip(experts, x.split(parts), strict=True)])
        else:  # tokens travel to the ranks of their experts, and back
            dist.all_to_all_single(received := torch.empty_like(sent), sent)
            arrived = all_to_all_single(x.new_empty(int(received.sum()), 16), x, received.tolist(), parts)
            outputs = all_to_all_single(torch.empty_like(x), experts[0](arrived), parts, received.tolist())
        return (x + gates[order, None] * outputs)[order.argsort()]


def main(stock: bool) -> None:
    dist.init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Experts(range(size) if stock else [rank], size), nn.Linear(16, 1))
    if stock:
        model, optimizer = DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:
        mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("same_experts", "experts"))
        experts = [(name, p) for name, p in model.named_parameters() if ".experts." in name]
        others = [(name, p) for name, p in model.named_parameters() if ".experts." not in name]
        groups = [{"params": others}, {"params": experts, "process_group": mesh["same_experts"]}]
        optimizer = ShardedAdamW(groups, lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    for step in range(1, 61):
        x = torch.randn(64, 16, generator=generator)
        (loss := nn.functional.mse_loss(model(x), x.abs().sum(dim=1, keepdim=True))).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 50.0) if stock else optimizer.clip_grad_norm_(50.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_().div_(size))
        if rank == 0 and step % 20 == 0:
            print(f"step {step}  loss {loss.item():.6f}  norm of gradients {norm.item():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--stock" in sys.argv)
