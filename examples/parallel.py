# SPDX-License-Identifier: Apache-2.0
"""Train with tensor, sequence and data parallelism, save, and continue with other numbers of ranks. Run it twice:

    torchrun --nproc-per-node 4 examples/parallel.py checkpoints 2
    torchrun --nproc-per-node 2 examples/parallel.py checkpoints 1

The last argument is the number of ranks that hold one copy of the model. Losses and norms do not depend on it.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import shardadam

PLAN = {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)), "norm": SequenceParallel()}
PLAN |= {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
PLAN |= {"head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())}  # Shard(1): the sequence is cut


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(64, 32), nn.RMSNorm(32), nn.Linear(32, 64)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def main(directory: str, tensor_parallel: int) -> None:
    dist.init_process_group()
    device, dp = "cuda" if torch.cuda.is_available() else "cpu", dist.get_world_size() // tensor_parallel
    mesh = init_device_mesh(device, (1, dp, tensor_parallel), mesh_dim_names=("pp", "dp", "tp"))
    torch.manual_seed(0)
    texts = torch.randint(64, (8, 17)).to(device).chunk(dp)[mesh["dp"].get_local_rank()]  # equal within mesh["tp"]
    model = parallelize_module(Model().to(device), mesh["tp"], PLAN)
    optimizer = shardadam.ShardedAdamW(model.named_parameters(), lr=1e-2, process_group=mesh["dp"], max_grad_norm=0.5)
    found = shardadam.has_checkpoint(directory)
    first = shardadam.load(directory, model=model, optimizer=optimizer).step if found else 0
    for step in range(first, first + 20):
        loss = nn.functional.cross_entropy(model(texts[:, :-1]).transpose(1, 2), texts[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach_().div_(dp), group=mesh["dp"].get_group())
        if dist.get_rank() == 0 and step % 5 == 0:
            print(f"step {step:2d}  loss {loss.item():.5f}  norm {optimizer.grad_norm.item():.5f}")
    shardadam.save(directory, step=first + 20, model=model, optimizer=optimizer, keep=2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
