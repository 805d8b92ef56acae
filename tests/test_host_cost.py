# SPDX-License-Identifier: Apache-2.0
"""The number of calls of torch that a step and a build make from Python, which is most of what the host does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shardadam import Precision, ShardedAdamW

PARAMETERS, BUCKETS = 500, 39
READS = {
    "__get__",
    "__set__",
    "element_size",
    "is_inference",
    "data_ptr",
    "dim",
    "is_contiguous",
    "is_neg",
    "numel",
    "stride",
}
"""Calls that compute nothing and make no tensor."""


class CallCounter(TorchFunctionMode):
    """Counts calls through torch's Python interface by name."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        (self.reads if name in READS else self.others)[name] += 1
        return func(*args, **(kwargs or {}))


def build_parameters(shape: tuple[int, ...], count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full(shape, 1.0)) for _ in range(count)]


@pytest.mark.parametrize("shape", [(1000,), (25, 40)], ids=str)
@pytest.mark.parametrize(("gradient_sync", "most_reads"), [("backward", 6), ("step", 10), ("external", 11)])
def test_a_step_on_one_rank_makes_few_calls_and_only_reads_for_each_parameter(
    gradient_sync: Any, most_reads: int, shape: tuple[int, ...]
) -> None:
    """It made 9 to 19 calls for each parameter, a view of every gradient among them; later, 9 for each bucket."""
    parameters = build_parameters(shape, PARAMETERS)
    optimizer = ShardedAdamW(parameters, gradient_sync=gradient_sync, bucket_mb=13 * 1024 * 4 / 2**20)
    assert len(optimizer._engine.parameters.buckets) == BUCKETS
    for _ in range(2):
        torch.stack([parameter.sum() for parameter in parameters]).sum().backward()
        with CallCounter() as calls:
            optimizer.step()
        optimizer.zero_grad()
    assert calls.others.total() <= 100, calls.others
    assert calls.reads.total() <= most_reads * PARAMETERS + 60, calls.reads


@pytest.mark.parametrize(
    "precision", [Precision(), Precision(moments="int8"), Precision(master="fp32")], ids=["fp32", "int8", "master"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
def test_buckets_that_are_updated_together_get_the_bits_of_a_single_one(
    gradient_sync: Any, dtype: torch.dtype, precision: Precision
) -> None:
    """Parameters without gradients in some steps cut the buckets into runs."""

    def train(bucket_mb: float) -> tuple[int, list[Tensor]]:
        random = torch.Generator().manual_seed(0)
        numels = (700, 3, 5000, 129, 2048, 0, 40)
        parameters = [nn.Parameter(torch.randn(numel, generator=random).to(dtype)) for numel in numels]
        options: dict[str, Any] = dict(gradient_sync=gradient_sync, precision=precision, ema_decay=0.9)
        optimizer = ShardedAdamW(parameters, lr=0.01, bucket_mb=bucket_mb, **options)
        for without in ((), (2, 4), (), (0,), (0, 2, 3, 4, 5, 6), ()):
            for index, parameter in enumerate(parameters):
                gradient = torch.randn(parameter.shape, generator=random).to(dtype)
                parameter.grad = None if index in without else gradient
            optimizer.step()
            optimizer.zero_grad()
        states = [tensor for parameter in parameters for tensor in optimizer.state[parameter].values()]
        return len(optimizer._engine.parameters.buckets), [*(p.detach() for p in parameters), *states]

    (many, found), (one, expected) = train(0.002), train(1)
    assert many > 5 and one == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_building_makes_few_calls_for_each_parameter() -> None:
    """It made 40 calls for each parameter: all tensors of ``optimizer.state`` among them, which few programs read."""
    calls = {}
    for count in (100, 300):
        parameters = build_parameters((1000,), count)
        with CallCounter() as calls[count]:
            ShardedAdamW(parameters)
    others = (calls[300].others.total() - calls[100].others.total()) / 200
    reads = (calls[300].reads.total() - calls[100].reads.total()) / 200
    assert others <= 10, calls[300].others
    assert reads <= 40, calls[300].reads


def test_state_that_was_not_read_yet_is_that_of_the_optimizer() -> None:
    """Views are made at the first access, of any kind."""
    ways = [
        lambda state: state["exp_avg"],
        lambda state: dict(state)["exp_avg"],
        lambda state: {**state}["exp_avg"],
        lambda state: state.copy()["exp_avg"],
        lambda state: (state | {})["exp_avg"],
        lambda state: ({} | state)["exp_avg"],
        lambda state: dict(state.items())["exp_avg"],
        lambda state: list(state.values())[1],
        lambda state: state.get("exp_avg"),
        lambda state: state.setdefault("exp_avg"),
    ]
    for way in ways:
        (parameter,) = build_parameters((300,), 1)
        optimizer = ShardedAdamW([parameter])
        parameter.sum().backward()
        optimizer.step()
        state = optimizer.state[parameter]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"] and len(state) == 3 and "exp_avg" in state
        assert torch.equal(way(state), torch.full((300,), 0.1))
        assert "tensor(1.)" in repr(optimizer.state[parameter])
