# SPDX-License-Identifier: Apache-2.0
"""A failure at any place on one rank never makes ranks start different transfers with each other.

The place is a tensor operation: memory may run out in each, in the user's forward and backward as in the optimizer's
copy-in, sum, statistics, update and gather. Every rank's transfers are recorded: after the failure one rank has started
the first ones of the other. Then training goes on as if the batch had not been, or every rank refuses by name.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from shardadam import ShardedAdamW
from tests.ranks import on_ranks, rank_and_size

LAYERS = 4
WIDTH = 24
BUCKET_MB = 0.003  # a bucket for each layer
VICTIM = 1


class FailAt(TorchDispatchMode):
    """Call ``fail`` in place of the operation number ``place`` that is no view and no transfer.

    Attributes:
        is_over: whether there were as many.
    """

    def __init__(self, place: int, fail: Callable[[], None]) -> None:
        super().__init__()
        self.left = place
        self.fail = fail
        self.is_over = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view:
            self.left -= 1
            if self.left == -1:
                self.is_over = True
                self.fail()
        return func(*args, **(kwargs or {}))


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("out of memory, for a test")


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


FAILURES = {"memory": run_out_of_memory, "signal": interrupt}


class Trained:
    """A model and its optimizer, whose transfers are recorded in ``started``."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
        self.model = nn.Sequential(*layers)
        self.optimizer = ShardedAdamW(self.model.parameters(), lr=1e-2, bucket_mb=BUCKET_MB, **options)
        engine = self.optimizer._engine
        assert len(engine.parameters.buckets) == LAYERS
        shards = {}
        for bucket in engine.parameters.buckets:
            if bucket.shard.gradient is not None:
                shards[bucket.shard.gradient.data_ptr()] = bucket.index
        self.started: list[tuple[Any, ...]] = []
        for name in ("reduce_scatter", "all_gather", "all_reduce", "broadcast"):
            self._record(engine.transport, name, shards)

    def _record(self, transport: Any, name: str, shards: dict[int, int]) -> None:
        start = getattr(transport, name)

        def record(request: Any) -> Any:
            pending = start(request)
            if isinstance(request, Tensor):
                self.started.append((name, request.numel(), str(request.dtype)))
            else:
                self.started.append((name, request.numel, str(request.send.dtype), shards.get(request.shard.data_ptr())))
            return pending

        setattr(transport, name, record)

    def backward(self, batch: int) -> None:
        rank, _ = rank_and_size()
        x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(100 * batch + rank))
        self.model(x).square().mean().backward()

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def backwards(trained: Trained, batch: int, how: str) -> None:
    """Run the backward passes of one step."""
    for index in range(2 if how in ("accumulated", "no_sync") else 1):
        context: AbstractContextManager[None] = nullcontext()
        if how == "no_sync" and index == 0:
            context = trained.optimizer.no_sync()
        with context:
            trained.backward(2 * batch + index)


def all_equal(mine: Any) -> bool:
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return all(one == everybody[0] for one in everybody)


def everybody_succeeded(succeeded: bool) -> bool:
    flag = torch.tensor(float(succeeded))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def is_prefix(one: list[Any], other: list[Any]) -> bool:
    return one == other[: len(one)] or other == one[: len(other)]


def fail_in_backward(how: str, failure: str, options: dict[str, Any], step: int) -> int:
    """Fail at every place of forward and backward whose number is a multiple of ``step``; return how many there were."""
    rank, world_size = rank_and_size()
    if "mesh" in options:
        options = {**options, "process_group": init_device_mesh("cpu", options["mesh"])}
        del options["mesh"]
    twin, trained = Trained(**options), Trained(**options)
    trained.started.clear()
    count = 0
    for place in range(0, 10_000, step):
        mode = FailAt(place, FAILURES[failure])
        caught: BaseException | None = None
        before = len(trained.started)
        try:
            with mode if rank == VICTIM else nullcontext():
                backwards(trained, place, how)
        except (torch.OutOfMemoryError, KeyboardInterrupt) as error:
            caught = error
        started = trained.started[before:]
        everybody: list[Any] = [None] * world_size
        dist.all_gather_object(everybody, started)
        assert all(is_prefix(one, everybody[0]) for one in everybody), (place, everybody)
        if everybody_succeeded(caught is None):
            trained.optimizer.step()
            backwards(twin, place, how)
            twin.optimizer.step()
        trained.optimizer.zero_grad()
        twin.optimizer.zero_grad()
        assert all_equal(trained.started[before:]), (place, trained.started[before:])
        for one in (trained, twin):  # and the next step is right
            backwards(one, place + 1, how)
            one.optimizer.step()
            one.optimizer.zero_grad()
        assert all_equal(trained.started[before:]), (place, trained.started[before:])
        for mine, expected in zip(trained.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, expected), place
        if everybody_succeeded(rank != VICTIM or not mode.is_over):
            break
        count += 1
    trained.optimizer.check_in_sync()
    return count


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(
    ("world_size", "how", "options"),
    [
        (2, "once", {"transport": "collective"}),
        (2, "accumulated", {"transport": "collective", "max_grad_norm": 0.1}),
        (2, "no_sync", {"transport": "shared_memory"}),
        (2, "once", {"transport": "collective", "gradient_sync": "step"}),
        (2, "accumulated", {"transport": "shared_memory", "gradient_sync": "step"}),
        (4, "once", {"mesh": (2, 2)}),
    ],
)
def test_a_batch_that_fails_in_backward_is_skipped(
    world_size: int, how: str, options: dict[str, Any], failure: str, request: pytest.FixtureRequest
) -> None:
    step, deadline_s = (1, 110.0) if request.config.getoption("--long") else (7, 50.0)
    counts = on_ranks(world_size, fail_in_backward, how, failure, options, step, deadline_s=deadline_s)
    assert min(counts) * step > 8 * LAYERS
