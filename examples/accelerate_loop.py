# SPDX-License-Identifier: Apache-2.0
"""Train with accelerate: use ``ShardedAccelerator`` and ``ShardedAdamW``; the rest of the loop stays the same.

    pip install '.[accelerate]'
    torchrun --nproc-per-node 2 examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py --stock

The optimizer averages gradients; the model is not wrapped in DDP. With --stock, accelerate's own ``Accelerator`` and
torch.optim.AdamW train instead, and print the same.
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shardadam import ShardedAdamW
from shardadam.integrations.accelerate import ShardedAccelerator


def main(stock: bool) -> None:
    kinds = (Accelerator, torch.optim.AdamW) if stock else (ShardedAccelerator, ShardedAdamW)
    accelerator = kinds[0](gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(accelerator.device)
    optimizer = kinds[1](model.named_parameters(), lr=1e-2)
    inputs = torch.randn(512, 16)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=16, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(5):
        for features, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(features), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}  loss {accelerator.reduce(loss.detach(), 'mean').item():.6f}")
    accelerator.end_training()


if __name__ == "__main__":
    main("--stock" in sys.argv)
