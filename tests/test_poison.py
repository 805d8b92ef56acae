# SPDX-License-Identifier: Apache-2.0
"""With any values in gradients, losses and inputs, and a signal at any time, parameters and state of all ranks stay
finite and equal, and the next step works or raises.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardadam
from shardadam import Precision, ShardedAdamW
from shardadam.ranks.signals import defer_signals
from tests.ranks import ANSWER_S, on_ranks, rank_and_size, ranks_of, restart

INJECTIONS = 30  # in each case
FORMATS: dict[str, tuple[torch.dtype, Precision]] = {
    "fp32": (torch.float32, Precision()),
    "fp32, int8": (torch.float32, Precision(moments="int8")),
    "bf16": (torch.bfloat16, Precision()),
    "bf16, none, int8": (torch.bfloat16, Precision(moments="int8", master="none")),
}
POISONS = ("nan", "inf", "-inf", "loss", "input", "sum", "huge")


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 9)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).float().square().mean()


def poison(kind: str, model: Net, x: Tensor, choose: random.Random, world_size: int) -> Tensor:
    """Return a loss with a value that is infinite, NaN or huge."""
    parameters = list(model.parameters())
    parameter = choose.choice(parameters)
    element = choose.randrange(parameter.numel())
    largest = torch.finfo(parameter.dtype).max
    value = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "sum": largest, "huge": 1e15}.get(kind)
    if value is not None:
        # In the gradient of one element; "sum" is finite on every rank and infinite in the sum.
        return model(x) + (parameter.flatten()[element] * value).float()
    if kind == "input":
        x = x.clone()
        x[0, choose.randrange(x.shape[1])] = float("nan")
    return model(x) * (float("nan") if kind == "loss" else 1.0)


def inject(format: str, gradient_sync: str, transport: str, seed: int, count: int) -> list[Any]:
    """Alternate poisoned and ordinary steps; return values that must be equal on all ranks."""
    dtype, precision = FORMATS[format]
    rank, world_size = rank_and_size()
    model = Net(dtype)
    options: dict[str, Any] = {"gradient_sync": gradient_sync, "transport": transport, "precision": precision}
    optimizer = ShardedAdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0, bucket_mb=0.001, **options)
    alike, skipped = random.Random(seed), 0
    for _ in range(count):
        kind, victims = alike.choice(POISONS), {alike.randrange(world_size)}
        if kind == "sum":
            victims = set(range(world_size))
        choose = random.Random(alike.random())
        x = torch.full((3, 24), 0.1 * (rank + 1), dtype=dtype)
        before = [p.detach().clone() for p in model.parameters()]
        (poison(kind, model, x, choose, world_size) if rank in victims else model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
        is_skipped = int(optimizer.skipped_steps) > skipped
        skipped = int(optimizer.skipped_steps)
        assert is_skipped == (kind != "huge" and (kind != "sum" or world_size > 1)), kind
        unchanged = all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        assert unchanged == is_skipped, kind
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(bool(p.isfinite().all()) for p in model.parameters()), kind
        for parameter in model.parameters():
            state = optimizer.full_state(parameter)
            assert all(bool(value.isfinite().all()) for value in state.values()), kind
    return [skipped, *(p.float().tolist() for p in model.parameters())]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 10))])
@pytest.mark.parametrize(
    ("format", "gradient_sync", "transport", "world_size"),
    [
        ("fp32", "backward", "shared_memory", 2),
        ("bf16", "backward", "collective", 2),
        ("fp32, int8", "step", "shared_memory", 3),
        ("bf16, none, int8", "step", "collective", 2),
        pytest.param("fp32", "step", "shared_memory", 4, marks=pytest.mark.long),
        pytest.param("fp32, int8", "backward", "collective", 3, marks=pytest.mark.long),
        ("bf16", "backward", "auto", 1),
    ],
)
def test_values_that_are_not_finite_never_reach_parameters_or_state(
    format: str, gradient_sync: str, transport: str, world_size: int, seed: int
) -> None:
    results = on_ranks(world_size, inject, format, gradient_sync, transport, seed, INJECTIONS)
    assert all(result == results[0] for result in results)


# Signals


def test_a_signal_is_deferred_to_the_end() -> None:
    happened: list[str] = []

    def interrupt() -> None:
        with defer_signals():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            happened.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert happened == ["the rest"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_is_not_deferred() -> None:
    happened: list[str] = []

    def interrupt() -> None:
        with defer_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            happened.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert happened == [] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_are_deferred_only_in_the_main_thread_and_with_python_handlers() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    found: list[Any] = []

    def look() -> None:
        with defer_signals():
            found.append({number: signal.getsignal(number) for number in before})

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]
    look()
    assert found[1][signal.SIGTERM] == signal.SIG_DFL and found[1][signal.SIGINT] != before[signal.SIGINT]


def ignore_signals() -> int:
    """Ignore further signals; return how many arrived before."""
    for arrived in range(5):
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            return arrived
        except (KeyboardInterrupt, SystemExit):
            continue
    raise AssertionError("signals do not end")


def interrupt_every_launch() -> tuple[int, int, list[float]]:
    """Return the number of interrupts, the buckets launched before them, and the parameters after a step."""
    parameters = [nn.Parameter(torch.ones(300)) for _ in range(4)]
    optimizer = ShardedAdamW(parameters, lr=0.1, bucket_mb=0.001)
    start = optimizer._engine.transport.reduce_scatter
    arrived = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # an undeferred signal would interrupt here
        return start(*args, **kwargs)

    optimizer._engine.transport.reduce_scatter = interrupted  # type: ignore[method-assign]
    try:
        sum(p.sum() for p in parameters).backward()
    except KeyboardInterrupt:
        arrived += 1
    optimizer._engine.transport.reduce_scatter = start  # type: ignore[method-assign]
    launched = sum(optimizer._engine.reducer._launches)  # type: ignore[attr-defined]
    optimizer.step()
    return arrived, launched, [float(p.detach().mean()) for p in parameters]


def test_a_signal_does_not_prevent_the_launch_of_a_bucket() -> None:
    """If one launch were missing, later collectives of this rank would be matched with wrong ones of the others."""
    for arrived, launched, values in on_ranks(2, interrupt_every_launch):
        assert (arrived, launched) == (1, 1)
        assert values == pytest.approx([1.0] * 3 + [0.899], abs=1e-4)  # backward had reached only one bucket


class Interrupted:
    """A rank that trains until a signal arrives, then steps and saves."""

    def __init__(self, gradient_sync: str, transport: str, directory: str) -> None:
        self.options: dict[str, Any] = {"gradient_sync": gradient_sync, "transport": transport}
        self.directory = directory

    def __call__(self, rank: int, pipe: Connection) -> None:
        model = Net(torch.float32)
        optimizer = ShardedAdamW(model.parameters(), lr=1e-3, bucket_mb=0.001, **self.options)
        signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(3)))
        batch, arrived = torch.full((3, 24), 0.1 * (rank + 1)), 0
        pipe.send("trains")
        end = ""
        try:
            while not pipe.poll():
                model(batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        except (KeyboardInterrupt, SystemExit):
            arrived += 1
        except (RuntimeError, TimeoutError) as error:  # a signal may arrive while the optimizer is built
            end = str(error)
        arrived += ignore_signals()
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        try:  # works if all ranks are equal, else raises
            optimizer.step()
            optimizer.zero_grad()
            after = "stepped"
        except (RuntimeError, TimeoutError, ValueError) as error:
            after = f"raised {type(error).__name__}"
        steps = int(optimizer.state[next(model.parameters())]["step"])  # a count in this loop could be one behind
        try:
            shardadam.save(self.directory, step=steps, model=model, optimizer=optimizer, timeout_s=2.0)
            after += ", saved"
        except (RuntimeError, TimeoutError) as error:
            after += f", not saved {type(error).__name__}"
        pipe.send((arrived, end, finite, after, [p.tolist() for p in model.parameters()]))
        time.sleep(ANSWER_S)


@pytest.mark.filterwarnings("ignore:.*has had (no|a) gradient")  # a rank may take a step more than it had backwards
@pytest.mark.parametrize(
    ("all_ranks", "transport", "number"),
    [
        (True, "shared_memory", signal.SIGINT),
        (False, "shared_memory", signal.SIGTERM),
        (True, "collective", signal.SIGTERM),
        *(
            pytest.param(all_ranks, transport, number, marks=pytest.mark.long)
            for all_ranks, transport, number in (
                (True, "shared_memory", signal.SIGTERM),
                (False, "shared_memory", signal.SIGINT),
                (True, "collective", signal.SIGINT),
                (False, "collective", signal.SIGINT),
                (False, "collective", signal.SIGTERM),
            )
        ),
    ],
)
def test_after_a_signal_ranks_are_equal_or_refuse_to_go_on(
    all_ranks: bool, transport: str, number: int, tmp_path: Path
) -> None:
    scenario = Interrupted("backward", transport, str(tmp_path / "checkpoints"))
    with ranks_of(2, tmp_path / "store", scenario) as ranks:
        assert [ranks.hear(rank) for rank in range(2)] == ["trains"] * 2
        time.sleep(0.3 + random.Random(str((all_ranks, transport, number))).random() * 0.2)
        for rank in range(2) if all_ranks else [1]:
            os.kill(ranks.processes[rank].pid, number)
        outcomes = [ranks.hear(rank) for rank in range(2)]
    assert sum(arrived for arrived, *_ in outcomes) >= 1
    assert all(finite for _, _, finite, _, _ in outcomes)
    afters = [after for _, _, _, after, _ in outcomes]
    # One rank may be interrupted after a step and another before it: their next calls differ.
    assert afters == ["stepped, saved"] * 2 or not any(after.endswith(", saved") for after in afters), afters
    assert outcomes[0][4] == outcomes[1][4]


# Interrupted updates


def interrupt_the_update(error: type[BaseException], transport: str, directory: str) -> list[str]:
    """Interrupt rank 0's update; return the errors of the next calls; with one rank, check that loading repairs it."""
    model = Net(torch.float32)
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=0.001, transport=transport)
    shardadam.save(directory, step=0, model=model, optimizer=optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    messages = []
    if rank_and_size()[0] == 0:
        dispatch, optimizer._engine.gatherer.dispatch = optimizer._engine.gatherer.dispatch, _raise(error)  # type: ignore[method-assign]
    for call in ("step", "step", "save"):
        try:
            if call == "step":
                model(torch.ones(1, 24)).backward()
                optimizer.step()
            else:
                shardadam.save(directory, step=1, model=model, optimizer=optimizer, timeout_s=5.0)
            messages.append("nothing")
        except (Exception, KeyboardInterrupt) as problem:
            messages.append(str(problem) or type(problem).__name__)
    if rank_and_size()[1] == 1:
        optimizer._engine.gatherer.dispatch = dispatch  # type: ignore[method-assign]
        optimizer.zero_grad()
        shardadam.load(directory, model=model, optimizer=optimizer)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        with pytest.warns(UserWarning, match="no parameter has had a gradient on any rank"):
            optimizer.step()
        shardadam.save(directory, step=1, model=model, optimizer=optimizer)
    return messages


def _raise(error: type[BaseException]) -> Any:
    def dispatch(*_: Any) -> None:
        raise error("for a test")

    return dispatch


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_optimizer_refuses_step_and_save_until_a_checkpoint_is_loaded(
    error: type[BaseException], tmp_path: Path
) -> None:
    first, second, saving = interrupt_the_update(error, "auto", str(tmp_path))
    assert first == "for a test" and "did not complete" in second and "Load a whole checkpoint" in second
    assert "cannot be saved" in saving


def test_other_ranks_refuse_to_go_on_with_an_interrupted_rank(tmp_path: Path) -> None:
    restart(2)  # these ranks cannot continue together
    first, other = on_ranks(2, interrupt_the_update, KeyboardInterrupt, "shared_memory", str(tmp_path))
    restart(2)
    assert first[0] == "for a test" and "cannot continue together" in first[1] and "cannot be saved" in first[2]
    assert "rank 0" in other[0] and "cannot continue together" in other[1] and "cannot be saved" in other[2], other
