# SPDX-License-Identifier: Apache-2.0
"""Compare the sharded AdamW on every rank with torch's AdamW on averaged gradients in one process.

A scenario is a module-level function that takes an ``Implementation``, trains something and returns tensors.
``assert_equals_torch`` runs it on ``world_size`` ranks with the sharded optimizer and in this process with torch's,
and compares the returned tensors.
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
class Implementation:
    """An implementation of AdamW, and the ranks whose gradients it needs in this process.

    Args:
        sharded: True for the sharded AdamW on this rank, False for torch's in one process.
        ranks: the ranks whose losses this process differentiates: its own, or for torch's AdamW all.
        divisor: the divisor of each loss: 1, or for torch's AdamW the number of ranks.
    """

    sharded: bool
    ranks: tuple[int, ...]
    divisor: int

    def adamw(self, parameters: Any, *, sharded_options: dict[str, Any] | None = None, **options: Any) -> Any:
        """Return an AdamW over ``parameters``. torch's AdamW does not get ``sharded_options``."""
        options = {"lr": LR, **options}
        if not self.sharded:
            return torch.optim.AdamW(parameters, **options)
        return ShardedAdamW(parameters, **options, **{"bucket_mb": BUCKET_MB, **(sharded_options or {})})

    def backward(self, loss_of: Callable[[int], Tensor]) -> None:
        """Add the gradients of ``loss_of(rank)`` for each of ``ranks``."""
        for rank in self.ranks:
            (loss_of(rank) / self.divisor).backward()


def build_parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    """Return parameters of magnitude 1 to 2: near zero, rounding errors would exceed the relative tolerance."""
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(s, generator=generator).sign() * (1 + torch.rand(s, generator=generator)))
        for s in shapes
    ]


def quadratic(parameters: Sequence[Tensor], rank: int, step: int) -> Tensor:
    """Return a loss whose gradients differ for each rank, step and parameter."""
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
    return scenario(Implementation(True, (rank,), 1), *arguments)


def run_torch(scenario: Scenario, world_size: int, *arguments: Any) -> list[Tensor]:
    return scenario(Implementation(False, tuple(range(world_size)), world_size), *arguments)


def assert_equals_torch(scenario: Scenario, world_size: int, *arguments: Any) -> None:
    """Check that ``scenario`` returns the same with the sharded AdamW on ``world_size`` ranks and with torch's."""
    results = on_ranks(world_size, run_sharded, scenario, *arguments)
    assert_close(results, run_torch(scenario, world_size, *arguments))


def assert_close(results: Sequence[Sequence[Tensor]], expected: Sequence[Tensor], lr: float = LR) -> None:
    """Check that all ranks have the same bits, equal to ``expected`` within 1e-6 (3 ranks: 1e-5).

    The tolerance is relative to the value, or to ``lr`` where the value is smaller.
    """
    tolerance = 1e-5 if len(results) == 3 else 1e-6
    for rank, result in enumerate(results):
        for index, (a, b) in enumerate(zip(result, expected, strict=True)):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            excess = (a - b).abs() - tolerance * b.abs().clamp(min=lr)
            assert b.numel() == 0 or excess.max() <= 0, f"rank {rank}, tensor {index}: {(a - b).abs().max()}"
            assert torch.equal(a, results[0][index]), f"ranks 0 and {rank} differ in tensor {index}"
