# SPDX-License-Identifier: Apache-2.0
"""A failure at any place on one rank never makes ranks start different transfers with each other.

The place is a tensor operation: memory may run out in each, in the user's forward and backward as in the optimizer's
copy-in, sum, statistics, update and gather. Every rank's transfers are recorded: after the failure one rank has started
the first ones of the other. Then training goes on as if the batch had not been, or every rank refuses by name.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from shardadam import ShardedAdamW
from tests.ranks import ANSWER_S, on_ranks, rank_and_size, ranks_of

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
                self.started.append(
                    (name, request.numel, str(request.send.dtype), shards.get(request.shard.data_ptr()))
                )
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
    """Fail at each place of forward and backward that is a multiple of ``step``; return how many there were."""
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


CASES: list[tuple[int, str, dict[str, Any]]] = [
    (2, "once", {"transport": "collective"}),
    (2, "no_sync", {"transport": "shared_memory"}),
    (4, "once", {"mesh": (2, 2)}),
    (2, "accumulated", {"transport": "collective", "max_grad_norm": 0.1}),
    (4, "accumulated", {"mesh": (2, 2)}),
    (2, "once", {"transport": "collective", "gradient_sync": "step"}),
    (2, "accumulated", {"transport": "shared_memory", "gradient_sync": "step"}),
]


@pytest.mark.parametrize(
    ("world_size", "how", "options", "failure"),
    [
        *((*case, "memory") for case in CASES[:3]),
        (*CASES[3], "signal"),
        *(pytest.param(*case, "memory", marks=pytest.mark.long) for case in CASES[3:]),
        *(pytest.param(*case, "signal", marks=pytest.mark.long) for case in (*CASES[:3], *CASES[4:])),
    ],
)
def test_a_batch_that_fails_in_backward_is_skipped(
    world_size: int, how: str, options: dict[str, Any], failure: str, request: pytest.FixtureRequest
) -> None:
    step, deadline_s = (1, 110.0) if request.config.getoption("--long") else (11, 50.0)
    counts = on_ranks(world_size, fail_in_backward, how, failure, options, step, deadline_s=deadline_s)
    assert min(counts) * step > 5 * LAYERS


def refuse_a_gradient() -> list[str]:
    """Rank 1's embedding has a sparse gradient in the second of three batches."""
    rank, _ = rank_and_size()
    messages = []

    def build() -> tuple[nn.Sequential, ShardedAdamW]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(32, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
        return model, ShardedAdamW(model.parameters(), lr=1e-2, bucket_mb=BUCKET_MB, transport="collective")

    def backward(model: nn.Sequential, batch: int) -> None:
        model(torch.arange(3) + 3 * batch + rank).square().mean().backward()

    (model, optimizer), (twin, twin_optimizer) = build(), build()
    for batch in range(3):
        model[0].sparse = rank == VICTIM and batch == 1
        error = ""
        try:
            backward(model, batch)
        except RuntimeError as refused:
            error = str(refused)
        if everybody_succeeded(not error):
            try:
                optimizer.step()
            except (RuntimeError, ValueError) as refused:  # on every rank
                error = str(refused)
        messages.append(error)
        optimizer.zero_grad()
        if batch != 1:
            backward(twin, batch)
            twin_optimizer.step()
            twin_optimizer.zero_grad()
    optimizer.check_in_sync()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    return messages


def test_a_gradient_that_is_refused_does_not_skip_the_turn_of_its_bucket() -> None:
    for messages in on_ranks(2, refuse_a_gradient, deadline_s=30.0):
        assert messages[0] == messages[2] == ""
    assert "sparse gradient" in messages[1]  # of rank 1


# In step

TIMEOUT_S = 2.0


@dataclass(frozen=True)
class FailInStep:
    """Fail at a place of ``step``, then go on as if nothing had been."""

    place: int
    options: dict[str, Any]

    def __call__(self, rank: int, pipe: Connection) -> None:
        trained = Trained(**self.options)
        trained.backward(0)
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        dist.barrier()
        trained.started.clear()
        mode = FailAt(self.place, run_out_of_memory)
        trained.backward(1)
        with mode if rank == VICTIM else nullcontext():
            errors = [raised(trained.optimizer.step)]
        started = list(trained.started)
        for batch in range(2, 4):

            def train(batch: int = batch) -> None:
                trained.optimizer.zero_grad()
                trained.backward(batch)
                trained.optimizer.step()

            errors.append(raised(train))
        pipe.send((started, errors, [p.tolist() for p in trained.parameters()]))
        time.sleep(ANSWER_S)


def raised(call: Callable[[], Any]) -> str:
    start = time.monotonic()
    try:
        call()
        return ""
    except Exception as error:
        assert time.monotonic() - start < 4 * TIMEOUT_S + 5, "hangs"
        return f"{type(error).__name__}: {error}"


@pytest.mark.sweep(3)
@pytest.mark.parametrize("place", [0, 1, 2, 4, 6, 9, 12, 16, 20, 25, 30, 36, 42, 49, 56, 64, 72, 81])
@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("transport", ["collective", "shared_memory"])
def test_a_step_that_fails_leaves_equal_ranks_or_ranks_that_refuse(
    place: int, gradient_sync: str, transport: str, tmp_path: Path
) -> None:
    scenario = FailInStep(place, {"gradient_sync": gradient_sync, "transport": transport, "max_grad_norm": 1.0})
    with ranks_of(2, tmp_path / "store", scenario, timeout_s=TIMEOUT_S) as ranks:
        (started, errors, parameters), (others, other_errors, other_parameters) = (ranks.hear(rank) for rank in (0, 1))
    assert is_prefix(started, others)
    if not any((*errors, *other_errors)):
        assert parameters == other_parameters
        return
    assert "out of memory, for a test" in other_errors[0] or not other_errors[0]
    for error in (errors[-1], other_errors[-1]):
        assert re.search(r"Status of the ranks|cannot (step|continue together)|Ranks disagree", error), (error, errors)
