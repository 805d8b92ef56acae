# SPDX-License-Identifier: Apache-2.0
"""A small training run for the tests of checkpoints, whose whole state can be read as tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardadam import Precision, ShardedAdamW
from tests.ranks import rank_and_size

FORMATS: list[tuple[torch.dtype, str, str]] = [
    (torch.float32, "fp32", "auto"),
    (torch.float32, "bf16", "auto"),
    (torch.float32, "int8", "auto"),
    (torch.float64, "fp32", "auto"),
    *[
        (dtype, moments, master)
        for dtype in (torch.bfloat16, torch.float16)
        for moments in ("fp32", "bf16", "int8")
        for master in ("fp32", "split", "none")
    ],
]


class Net(nn.Module):
    """Awkward parameters: channels_last, scalar, empty, tied and frozen; and buffers and dropout."""

    def __init__(self, width: int = 257) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.tied = nn.Linear(width, width, bias=False)
        self.again = nn.Linear(width, width)
        self.again.weight = self.tied.weight
        self.dropout = nn.Dropout(0.2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.conv(x)).relu().mean((2, 3))
        hidden = self.dropout(self.frozen(self.first(hidden).relu()))
        return self.again(self.tied(hidden).relu()).float().pow(2).mean() * self.scale.float() + self.empty.sum()


@dataclass
class Run:
    model: Any
    optimizer: Any
    scheduler: Any

    def train(self, steps: Iterable[int], *, accumulate: int = 1) -> None:
        rank, _ = rank_and_size()
        for step in steps:
            generator = torch.Generator().manual_seed(1000 * step + rank)
            for i in range(accumulate):
                x = torch.randn(4, 3, 6, 6, generator=generator).to(self.model.scale)
                with nullcontext() if i + 1 == accumulate else self.optimizer.no_sync():
                    self.model(x).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def everything(self) -> dict[str, Tensor]:
        """Return all state that a checkpoint must restore, whole on every rank. Collective."""
        found = {f"model.{name}": value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                for kind, value in self.optimizer.full_state(parameter).items():
                    found[f"{name}.{kind}"] = value.cpu()
        found["lr"] = torch.tensor([float(group["lr"]) for group in self.optimizer.param_groups])
        found["skipped"] = self.optimizer.skipped_steps.cpu().clone()
        return found


def build(
    format: tuple[torch.dtype, str, str] = FORMATS[0],
    *,
    bucket_mb: float = 0.05,
    seed: int = 0,
    width: int = 257,
    device: str = "cpu",
    **options: Any,
) -> Run:
    dtype, moments, master = format
    rank, _ = rank_and_size()
    torch.manual_seed(seed)
    model = Net(width).to(device, dtype)
    torch.manual_seed(100 * seed + rank)  # dropout differs between ranks
    named = [(name, p) for name, p in model.named_parameters()]
    groups = [
        {"params": [entry for entry in named if entry[1].ndim > 1]},
        {"params": [entry for entry in named if entry[1].ndim <= 1], "weight_decay": 0.0},
    ]
    precision = Precision(moments=moments, master=master)  # type: ignore[arg-type]
    optimizer = ShardedAdamW(groups, lr=1e-2, precision=precision, bucket_mb=bucket_mb, **options)
    return Run(model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40))


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names of the entries that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]


def digest(everything: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(everything):
        value = everything[name].contiguous().reshape(-1)
        whole.update(name.encode() + bytes(value.view(torch.uint8).tolist()))
    return whole.hexdigest()
