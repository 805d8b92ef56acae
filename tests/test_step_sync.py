# SPDX-License-Identifier: Apache-2.0
"""Where the host runs ahead of the device, a disagreement of ranks raises one step later, and no rank takes the step on
which they disagreed.

On the CPU the host does not run ahead; the tests make ``StepSync`` act as if it did.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import shardadam
from shardadam import Precision, ShardedAdamW
from shardadam.engine import step_sync
from shardadam.engine.step_sync import GlobalGradStats, HostCopy
from tests.ranks import on_ranks, rank_and_size

SYNCS = ("backward", "step", "external")
host_ahead = mock.patch.object(step_sync, "host_runs_ahead", lambda device: True)


def build(device: str = "cpu", **options: Any) -> tuple[nn.Module, ShardedAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 4)).to(device)
    return model, ShardedAdamW(model.named_parameters(), **{"lr": 1e-2, "bucket_mb": 0.002, **options})


def backward(model: nn.Module, step: int, scale: float = 1.0) -> None:
    weight = next(model.parameters())
    batch = torch.randn(8, 40, generator=torch.Generator().manual_seed(step)).to(weight.device)
    (model(batch).square().mean() * scale).backward()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().cpu().clone() for p in model.parameters()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# Ranks that agree


def train(gradient_sync: str, ahead: bool) -> list[Tensor]:
    with host_ahead if ahead else warnings.catch_warnings():
        model, optimizer = build(gradient_sync=gradient_sync, max_grad_norm=0.5, precision=Precision(moments="int8"))
        for step in range(6):
            backward(model, step, float("nan") if step == 2 else 1.0)
            if step == 4:
                optimizer.clip_grad_norm_(0.25)
                optimizer.full_grad(next(model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
        assert int(optimizer.skipped_steps) == 1
    return values(model)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("gradient_sync", SYNCS)
def test_results_do_not_depend_on_when_host_copies_are_read(gradient_sync: str, world_size: int) -> None:
    now = on_ranks(world_size, train, gradient_sync, False)
    assert all(equal(a, b) for a, b in zip(on_ranks(world_size, train, gradient_sync, True), now, strict=True))


# Ranks that disagree


def disagree(what: str, gradient_sync: str, directory: str, first: str = "step", device: str = "cpu") -> dict[str, Any]:
    """Return the errors of ``first``, step and save, called after a step on which ranks disagreed."""
    rank, _ = rank_and_size()
    with host_ahead:
        model, optimizer = build(device, gradient_sync=gradient_sync, max_grad_norm=10.0)
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
        shardadam.save(directory, step=1, model=model, optimizer=optimizer)
        before = values(model)
        backward(model, 1)
        if rank == 1 and what == "lr":
            optimizer.param_groups[0]["lr"] = 0.5
        if rank == 1 and what == "call":
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        found: dict[str, Any] = {"unchanged": equal(values(model), before), "skipped": int(optimizer.skipped_steps)}
        backward(model, 2)
        calls: dict[str, Callable[[], Any]] = {
            "step": optimizer.step,
            "save": lambda: shardadam.save(directory, step=2, model=model, optimizer=optimizer),
            "check_in_sync": optimizer.check_in_sync,
        }
        for attempt, call in (("first", calls[first]), ("step", optimizer.step), ("save", calls["save"])):
            try:
                call()
            except Exception as error:
                found[attempt] = f"{type(error).__name__}: {error}"
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 1e-2
        shardadam.load(directory, model=model, optimizer=optimizer)
        for step in (1, 2):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.check_in_sync()
        found["went on"] = not equal(values(model), before)
    return found


DISAGREEMENTS = {
    "lr": "ValueError: Ranks disagree on param group 0: lr 0.01 on {others}, 0.5 on rank 1.",
    "call": "ValueError: Ranks disagree on which call they are in: step on {others}, clip_grad_norm_ on rank 1.",
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("gradient_sync", SYNCS)
@pytest.mark.parametrize("what", DISAGREEMENTS)
@pytest.mark.parametrize("first", ["step", "save", "check_in_sync"])
def test_a_step_on_which_ranks_disagree_is_not_taken_and_raises_at_the_next(
    first: str, what: str, gradient_sync: str, world_size: int, tmp_path: Path
) -> None:
    others = {2: "rank 0", 3: "ranks 0, 2"}[world_size]
    for found in on_ranks(world_size, disagree, what, gradient_sync, str(tmp_path), first):
        assert found["unchanged"] and found["skipped"] == 1
        assert found["first"].startswith(DISAGREEMENTS[what].format(others=others))
        assert "No rank has taken that step" in found["first"]
        assert found["step"].startswith("RuntimeError: The optimizer cannot step: ranks have disagreed")
        assert "cannot be saved: ranks have disagreed" in found["save"]
        assert found["went on"]


def load_at_once(directory: str) -> None:
    with host_ahead:
        model, optimizer = build()
        backward(model, 0)
        optimizer.step()
        shardadam.save(directory, step=1, model=model, optimizer=optimizer)
        optimizer.zero_grad()
        backward(model, 1)
        optimizer.param_groups[0]["lr"] = 1e-2 + rank_and_size()[0]
        optimizer.step()
        optimizer.zero_grad()
        shardadam.load(directory, model=model, optimizer=optimizer)
        for step in (1, 2):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        optimizer.check_in_sync()


def test_a_disagreement_before_loading_a_checkpoint_does_not_raise_after_it(tmp_path: Path) -> None:
    on_ranks(2, load_at_once, str(tmp_path))


def read_while_scaling() -> list[tuple[int, int]]:
    """Return pairs (step that read a host copy, step that made it); every step makes two copies."""
    model, optimizer = build()
    scaler = shardadam.GradScaler("cpu")
    made: list[HostCopy] = []
    found: list[tuple[int, int]] = []
    init, wait = HostCopy.__init__, HostCopy._await

    def make(host_copy: HostCopy, *arguments: Any) -> None:
        init(host_copy, *arguments)
        made.append(host_copy)

    def read(host_copy: HostCopy) -> Tensor:
        found.append((step, made.index(host_copy) // 2))
        return wait(host_copy)

    with host_ahead, mock.patch.object(HostCopy, "__init__", make), mock.patch.object(HostCopy, "_await", read):
        for step in range(4):
            scaler.scale(model(torch.full((2, 40), 1.0 + step)).square().mean()).backward()
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert len(made) == 8
    return found


def test_no_host_copy_is_read_in_the_step_that_made_it() -> None:
    for found in on_ranks(2, read_while_scaling):
        assert {made for _, made in found} == {0, 1, 2} and all(step == made + 1 for step, made in found)


def sync_without_a_step() -> int:
    with host_ahead:
        model, optimizer = build()
        for step in range(100):
            backward(model, step)
            optimizer.full_grad(next(model.parameters()))
            optimizer.zero_grad()
        return len(optimizer._engine.step_sync._unread)


def test_unread_host_copies_do_not_accumulate() -> None:
    assert max(on_ranks(2, sync_without_a_step)) <= step_sync._MOST_UNREAD


def write_a_gradient(writers: tuple[int, ...]) -> tuple[bool, list[str]]:
    rank, _ = rank_and_size()
    messages = []
    with host_ahead:
        model, optimizer = build()
        before = values(model)
        backward(model, 0)
        if rank in writers:
            next(model.parameters()).grad = torch.ones(30, 40)
        for _ in range(2):
            try:
                optimizer.step()
                messages.append("")
            except (RuntimeError, ValueError) as error:
                messages.append(str(error))
            is_unchanged = equal(values(model), before)
            optimizer.zero_grad()
            backward(model, 1)
    return is_unchanged, messages


@pytest.mark.parametrize("writers", [(0,), (1,), (0, 1)])
def test_gradients_written_by_hand_raise_on_every_rank_one_step_later(writers: tuple[int, ...]) -> None:
    for is_unchanged, (first, second) in on_ranks(2, write_a_gradient, writers):
        assert is_unchanged and first == "" and "has a gradient in p.grad although" in second


@pytest.mark.parametrize("ranks", [2, 3, 1000, 1 << 14])
@pytest.mark.parametrize("fingerprint", [0, 1, 12_345, 2**17 - 1])
def test_device_and_host_detect_any_different_fingerprint(ranks: int, fingerprint: int) -> None:
    for other in {fingerprint, 0, 2**17 - 1, fingerprint ^ 1}:
        total, squares = ((ranks - 1) * fingerprint**power + other**power for power in (1, 2))
        block = torch.tensor([0.0, 0.0, total, squares, 1.0], dtype=torch.float64)
        found = GlobalGradStats(block, ranks, with_norm=False, compares=True, all_used=True)
        assert bool(found.found_inf) == (other != fingerprint) == (not found.host_copy().agrees)


# Warnings


def warnings_of_steps(what: str) -> list[list[str]]:
    """Return the warnings of each of twelve steps."""
    rank, _ = rank_and_size()
    found = []
    with host_ahead:
        model, optimizer = build()
        for step in range(12):
            if not (what == "no gradient" and rank == 1 and step == 3):
                backward(model, step, float("nan") if what == "never finite" else 1.0)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
                optimizer.zero_grad()
            found.append([f"{one.filename}: {one.message}" for one in caught])
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_that_are_never_taken_are_warned_of_one_step_later(world_size: int) -> None:
    steps, *others = on_ranks(world_size, warnings_of_steps, "never finite")
    assert [len(step) for step in steps] == [0] * 10 + [1, 0]
    assert "last 10 steps were not taken" in steps[10][0] and __file__ in steps[10][0]
    assert others == [[[]] * 12] * (world_size - 1)


def test_a_rank_without_a_gradient_is_warned_of_one_step_later() -> None:
    alike, other = on_ranks(2, warnings_of_steps, "no gradient")
    assert [len(step) for step in alike] == [0] * 12
    assert [len(step) for step in other] == [0] * 4 + [1] + [0] * 7
    assert "this rank has had no gradient" in other[4][0]
