# SPDX-License-Identifier: Apache-2.0
"""The number of calls of torch that a step and a build make from Python, which is most of what the host does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from shardadam import ShardedAdamW

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
def test_a_step_makes_calls_for_each_bucket_and_only_reads_for_each_parameter(
    gradient_sync: Any, most_reads: int, shape: tuple[int, ...]
) -> None:
    """It made 9 to 19 calls for each parameter, a view of every gradient among them."""
    parameters = build_parameters(shape, PARAMETERS)
    optimizer = ShardedAdamW(parameters, gradient_sync=gradient_sync, bucket_mb=13 * 1024 * 4 / 2**20)
    assert len(optimizer._engine.parameters.buckets) == BUCKETS
    for _ in range(2):
        torch.stack([parameter.sum() for parameter in parameters]).sum().backward()
        with CallCounter() as calls:
            optimizer.step()
        optimizer.zero_grad()
    assert calls.others.total() <= 12 * BUCKETS + 20, calls.others
    assert calls.reads.total() <= most_reads * PARAMETERS + 15 * BUCKETS, calls.reads


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
