# SPDX-License-Identifier: Apache-2.0
"""Train with torchtitan's OptimizersContainer and LRSchedulersContainer, and save and load through DCP.

    pip install torchtitan==0.3.0  # Python 3.11 or newer
    torchrun --nproc-per-node 2 examples/torchtitan_container.py checkpoint
    torchrun --nproc-per-node 2 examples/torchtitan_container.py checkpoint --stock

torchtitan averages gradients, so "external" leaves that to it; here DDP does. With --stock, the container builds
torch.optim.AdamW. Both print the same.
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from shardadam import ShardedAdamW


class Container(OptimizersContainer):
    @staticmethod
    def _resolve_optimizer_factory(name):
        return ShardedAdamW if name == "ShardedAdamW" else OptimizersContainer._resolve_optimizer_factory(name)


def build(stock: bool) -> tuple[nn.Module, OptimizersContainer, LRSchedulersContainer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    name, options = "AdamW" if stock else "ShardedAdamW", {"ShardedAdamW": {"gradient_sync": "external"}}
    patterns = [("bias$", {"lr": 1e-2, "weight_decay": 0.0}), (".*", {"lr": 1e-2, "weight_decay": 0.1})]
    groups = [ParamGroupConfig(pattern=p, optimizer_name=name, optimizer_kwargs=kwargs) for p, kwargs in patterns]
    config = OptimizersContainer.Config(param_groups=groups, optimizer_factory_kwargs_by_name=options)
    optimizers = Container(config, model_parts=[model])
    return model, optimizers, LRSchedulersContainer(optimizers, lambda step: 1 / (1 + step / 20))


def main(directory: str, stock: bool) -> None:
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(dist.get_rank())
    for start in (0, 20):
        model, optimizers, schedulers = build(stock)
        if start:  # new ones, which go on with what was saved
            states = {"model": model.state_dict(), "optimizer": optimizers.state_dict(), "lr": schedulers.state_dict()}
            dcp.load(states, checkpoint_id=directory)
            model.load_state_dict(states["model"])
            optimizers.load_state_dict(states["optimizer"])
            schedulers.load_state_dict(states["lr"])
        train = DistributedDataParallel(model)
        for _ in range(20):
            inputs = torch.randn(64, 16, generator=generator)
            loss = nn.functional.mse_loss(train(inputs), inputs.sum(dim=1, keepdim=True))
            optimizers.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizers.step()
            schedulers.step()
        dist.all_reduce(loss.detach_().div_(dist.get_world_size()))
        if dist.get_rank() == 0:
            print(f"step {start + 20}  loss {loss.item():.6f}  norm {norm.item():.6f}")
        states = {"model": model.state_dict(), "optimizer": optimizers.state_dict(), "lr": schedulers.state_dict()}
        dcp.save(states, checkpoint_id=directory)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], "--stock" in sys.argv)
