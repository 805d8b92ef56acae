# SPDX-License-Identifier: Apache-2.0
"""One scenario under two optimizers: the sharded one on every rank, and torch's on averaged gradients in one process.

A scenario is a module-level function of a ``Twin`` that trains something and returns tensors. ``assert_twins_agree``
runs it on ``world_size`` ranks with the sharded optimizer, and here with torch's, and compares what they return.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardadam import ShardedAdamW
from tests.ranks import on_ranks, rank_and_size

LR = 1e-2
BUCKET_MB = 0.001
SHAPES = ((), (0,), (1,), (7, 15), (129,), (3, 4, 5, 2), (300,))

Scenario = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Twin:
    """Which optimizer a scenario gets, and whose gradients it computes.

    Args:
        sharded: the sharded AdamW on this rank, or torch's for all ranks at once.
        ranks: the ranks whose losses are differentiated here.
        divisor: what each loss is divided by.
    """

    sharded: bool
    ranks: tuple[int, ...]
    divisor: int

    def adamw(self, parameters: Any, *, sharded_options: dict[str, Any] | None = None, **options: Any) -> Any:
        """An AdamW over ``parameters``; ``sharded_options`` are those that torch's does not have."""
        options = {"lr": LR, **options}
        if not self.sharded:
            return torch.optim.AdamW(parameters, **options)
        return ShardedAdamW(parameters, **options, **{"bucket_mb": BUCKET_MB, **(sharded_options or {})})

    def backward(self, loss_of: Callable[[int], Tensor]) -> None:
        """Adds the gradients of ``loss_of(rank)``, of this side's ranks."""
        for rank in self.ranks:
            (loss_of(rank) / self.divisor).backward()


def build_parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    """Values of magnitude 1 to 2: far from zero, where the rounding of where an element has been would dwarf it."""
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(s, generator=generator).sign() * (1 + torch.rand(s, generator=generator)))
        for s in shapes
    ]


def quadratic(parameters: Sequence[Tensor], rank: int, step: int) -> Tensor:
    """A loss whose gradients are different for each rank, step and parameter."""
    total = torch.zeros(())
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(10_000 * step + 100 * rank + index)
        target = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        total = total + ((parameter - target) ** 2 * (index + 1)).sum() + (parameter * target).sum() * 3
    return total


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def run_sharded(scenario: Scenario, *arguments: Any) -> list[Tensor]:
    rank, _ = rank_and_size()
    return scenario(Twin(True, (rank,), 1), *arguments)


def run_torch(scenario: Scenario, world_size: int, *arguments: Any) -> list[Tensor]:
    return scenario(Twin(False, tuple(range(world_size)), world_size), *arguments)


def assert_twins_agree(scenario: Scenario, world_size: int, *arguments: Any) -> None:
    results = on_ranks(world_size, run_sharded, scenario, *arguments)
    assert_close(results, run_torch(scenario, world_size, *arguments))


def assert_close(results: Sequence[Sequence[Tensor]], expected: Sequence[Tensor], lr: float = LR) -> None:
    """Each rank's tensors equal the expected ones to 1e-6 (1e-5 on 3 ranks) of their value or of ``lr``, and each
    other exactly."""
    tolerance = 1e-5 if len(results) == 3 else 1e-6
    for rank, result in enumerate(results):
        for index, (a, b) in enumerate(zip(result, expected, strict=True)):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            excess = (a - b).abs() - tolerance * b.abs().clamp(min=lr)
            assert b.numel() == 0 or excess.max() <= 0, f"rank {rank}, tensor {index}: {(a - b).abs().max()}"
            assert torch.equal(a, results[0][index]), f"ranks 0 and {rank} differ in tensor {index}"
