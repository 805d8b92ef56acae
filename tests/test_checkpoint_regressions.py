# SPDX-License-Identifier: Apache-2.0
"""Bugs that a review of checkpoints found: each lost data silently, hung, or failed without reason."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardadam
from shardadam import CheckpointError, ShardedAdamW
from tests.ranks import on_ranks, processes, rank_and_size
from tests.runs import build, differences


def step(model: nn.Module, optimizer: ShardedAdamW) -> None:
    loss: Any = sum((p.float() ** 2).sum() for p in model.parameters() if p.requires_grad)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def values_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Odd models


def test_an_optimizer_of_another_model_with_equal_names(tmp_path: Path) -> None:
    """The generator's weights were not saved beside the discriminator's optimizer."""
    generator, discriminator = nn.Linear(5, 6), nn.Linear(7, 8)
    optimizer = ShardedAdamW(discriminator.named_parameters())
    step(discriminator, optimizer)
    saved = values_of(generator) + values_of(discriminator)
    shardadam.save(tmp_path, step=1, model=generator, optimizer=optimizer)
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        parameter.detach().zero_()
    shardadam.load(tmp_path, model=generator, optimizer=optimizer)
    assert same(values_of(generator) + values_of(discriminator), saved)


class TensorExtraState(nn.Linear):
    seen = torch.tensor(0)

    def get_extra_state(self) -> Tensor:
        return self.seen.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.seen = state


def cloning_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key, value in state_dict.items():
        state_dict[key] = value.clone()


@pytest.mark.parametrize("how", ["extra state", "hook"])
def test_what_a_model_makes_for_its_state_dict_comes_back(tmp_path: Path, how: str) -> None:
    """It was loaded into copies, which had no effect."""
    model = TensorExtraState(3, 4)
    model.seen = torch.tensor(7)
    if how == "hook":
        model.register_state_dict_post_hook(cloning_hook)
    optimizer = ShardedAdamW(model.parameters())
    step(model, optimizer)
    saved = values_of(model)
    shardadam.save(tmp_path, step=1, model=model, optimizer=optimizer)
    other = TensorExtraState(3, 4)
    if how == "hook":
        other.register_state_dict_post_hook(cloning_hook)
    others_optimizer = ShardedAdamW(other.parameters())
    shardadam.load(tmp_path, model=other, optimizer=others_optimizer)
    assert other.seen == 7 and same(values_of(other), saved)


def test_a_conjugate_view_is_saved_as_what_it_is(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("b", torch.tensor([1 + 2j, 3 - 4j]).conj())
    shardadam.save(tmp_path, step=0, model=model)
    expected, model.b = model.b.resolve_conj().clone(), torch.zeros(2, dtype=torch.complex64)
    shardadam.load(tmp_path, model=model)
    assert torch.equal(model.b, expected)


def test_names_that_only_look_like_a_wrappers_are_kept_apart(tmp_path: Path) -> None:
    model = nn.Module()
    model.x_orig_mod = nn.Linear(2, 2, bias=False)
    model.xweight = nn.Parameter(torch.ones(3))
    saved = values_of(model)
    shardadam.save(tmp_path, step=0, model=model)
    for parameter in model.parameters():
        parameter.detach().zero_()
    shardadam.load(tmp_path, model=model)
    assert same(values_of(model), saved)


def test_an_expanded_buffer_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("mask", torch.ones(1).expand(4))
    with pytest.raises(CheckpointError, match=r"model\.mask cannot be saved: found an expanded tensor"):
        shardadam.save(tmp_path, step=0, model=model)


def save_unequal_buffers(directory: str) -> Tensor:
    rank, _ = rank_and_size()
    model = nn.Linear(3, 3)
    model.register_buffer("seen", torch.full((rank + 1,), 5.0))
    optimizer = ShardedAdamW(model.parameters())
    shardadam.save(directory, step=0, model=model, optimizer=optimizer)
    model.seen = torch.zeros(1)
    shardadam.load(directory, model=model, optimizer=optimizer)
    return model.seen


def test_buffers_of_another_shape_on_other_ranks(tmp_path: Path) -> None:
    assert all(torch.equal(seen, torch.full((1,), 5.0)) for seen in on_ranks(2, save_unequal_buffers, str(tmp_path)))


# Freezing and moving


def unfreeze_in_another_run(directory: str, before_loading: bool) -> Any:
    models = [nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 1)) for _ in range(2)]
    optimizers = []
    for model in models:
        model[0].requires_grad_(False)
        optimizers.append(ShardedAdamW(model.named_parameters()))
    models[0][0].requires_grad_(True)
    step(models[0], optimizers[0])
    shardadam.save(directory, step=1, model=models[0], optimizer=optimizers[0])
    models[1][0].requires_grad_(before_loading)
    try:
        shardadam.load(directory, model=models[1], optimizer=optimizers[1])
    except CheckpointError as error:
        return str(error)
    return [
        torch.equal(one, other)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True)
        for one, other in zip(optimizers[0].full_state(p).values(), optimizers[1].full_state(q).values(), strict=True)
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_of_what_was_unfrozen_is_loaded_or_refused(tmp_path: Path, world_size: int) -> None:
    for equal in on_ranks(world_size, unfreeze_in_another_run, str(tmp_path), True):
        assert len(equal) == 12 and all(equal)
    for said in on_ranks(world_size, unfreeze_in_another_run, str(tmp_path), False):
        assert "frozen here: 0.bias, 0.weight" in said and "before loading" in said


def move_and_load(directory: str) -> bool:
    model = nn.Linear(40, 40)
    optimizer = ShardedAdamW(model.parameters())
    step(model, optimizer)
    model.weight.data = model.weight.data.clone()
    model.weight.detach().add_(1)
    shardadam.save(directory, step=1, model=model, optimizer=optimizer)
    saved = values_of(model)
    model.weight.data = torch.zeros(40, 40)
    shardadam.load(directory, model=model, optimizer=optimizer)
    return same(values_of(model), saved)


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_whose_data_was_replaced(tmp_path: Path, world_size: int) -> None:
    """Each rank saved its half of memory that the model no longer used."""
    assert all(on_ranks(world_size, move_and_load, str(tmp_path)))


# Ranks


def save_without_an_optimizer(directory: str) -> Any:
    rank, _ = rank_and_size()
    said, start = "", time.monotonic()
    if rank == 0:
        try:
            shardadam.save(directory, step=0, model=nn.Linear(2, 2), timeout_s=1)
        except TimeoutError as error:
            said = str(error)
    seconds = time.monotonic() - start
    dist.barrier()
    return said, seconds, shardadam.save(directory, step=1, model=nn.Linear(2, 2), timeout_s=20).name


def test_a_save_without_an_optimizer_names_absent_ranks_too(tmp_path: Path) -> None:
    """The first such save built a process group, and hung."""
    (said, seconds, name), (_, _, others_name) = on_ranks(2, save_without_an_optimizer, str(tmp_path))
    assert "rank 1 did not arrive within 1 s" in said and seconds < 3
    assert name == others_name == "step-00000001"


def save_alone(directory: str) -> list[str]:
    rank, _ = rank_and_size()
    run, said = build(width=40), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("shardadam").addHandler(handler)
    if rank == 0:
        try:
            shardadam.save(directory, step=0, optimizer=run.optimizer, timeout_s=1)
        except TimeoutError as error:
            said.append(str(error))
    logging.getLogger("shardadam").removeHandler(handler)
    dist.barrier()
    return said


def test_a_save_on_one_rank_tells_where_the_others_are_while_it_waits_and_when_it_ends(tmp_path: Path) -> None:
    """It named them only, and only after a minute."""
    said, nothing = on_ranks(2, save_alone, str(tmp_path))
    assert "waiting for rank 1, for" in said[0] and "did not arrive" in said[-1] and not nothing
    for message in (said[0], said[-1]):
        assert "rank 0 (this one): in call 1 of save()" in message and "\n  rank 1: " in message
        assert "save() is collective: call it on all ranks" in message


def arrive_late(directory: str) -> list[str]:
    """Rank 1 shows no heartbeat for longer than rank 0 waits; rank 0 saves again at once."""
    rank, _ = rank_and_size()
    run = build(width=40)
    barrier = run.optimizer._engine.transport.store_barrier
    barrier.heartbeat = nullcontext
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(2.5)
        fsync(descriptor)

    if rank == 1:
        os.fsync = slow
    outcomes = []
    try:
        for step in (1, 2, 3):
            try:
                path = shardadam.save(
                    directory, step=step, model=run.model, optimizer=run.optimizer, timeout_s=1 if step == 1 else 20
                )
                outcomes.append(path.name)
            except (TimeoutError, CheckpointError) as error:
                outcomes.append(str(error))
            os.fsync = fsync
    finally:
        del barrier.heartbeat
    return outcomes


def test_a_rank_that_comes_late_does_not_disturb_the_next_save(tmp_path: Path) -> None:
    """Its message about the old save was read as one about the next save, and all later saves failed."""
    first, second = on_ranks(2, arrive_late, str(tmp_path))
    assert "rank 1 did not arrive" in first[0] and "arrived after the others had given up waiting" in second[0]
    assert first[1:] == second[1:] == ["step-00000002", "step-00000003"]


def save_on_a_slow_disk(directory: str) -> str:
    rank, _ = rank_and_size()
    run = build(width=40)
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(4)
        fsync(descriptor)

    if rank == 1:
        os.fsync = slow
    try:
        return shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer, timeout_s=2.5).name
    finally:
        os.fsync = fsync


def test_a_slow_disk_is_a_sign_of_life(tmp_path: Path) -> None:
    assert on_ranks(2, save_on_a_slow_disk, str(tmp_path)) == ["step-00000001"] * 2


def save_and_end_at_once(rank: int, port: int, directory: str, pipe: Any) -> None:
    """Rank 0's process hosts the store, and ends as soon as ``save`` returns."""
    store = dist.TCPStore("localhost", port, 2, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if rank == 1:  # slower to notice that the others have arrived
        pause = time.sleep
        time.sleep = lambda seconds: pause(seconds + 0.1)
    run = build(width=40)
    try:
        pipe.send(shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer).name)
    except Exception as error:
        pipe.send(repr(error))
    os._exit(0)


def test_rank_0_may_end_as_soon_as_it_has_saved(tmp_path: Path) -> None:
    """The store ended with it, before the other ranks had read the result of the save."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pipes = []
    for rank in range(2):
        mine, theirs = processes.Pipe()
        process = processes.Process(target=save_and_end_at_once, args=(rank, port, str(tmp_path), theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
    for pipe in pipes:
        assert pipe.poll(30)
        assert pipe.recv() == "step-00000001"


class Stubborn(torch.optim.lr_scheduler.ConstantLR):
    def load_state_dict(self, state_dict: Any) -> None:
        if rank_and_size()[0] == 1:
            raise KeyError("stubborn")


def load_stubbornly(directory: str) -> list[str]:
    run = build(width=40)
    scheduler = Stubborn(run.optimizer)
    shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer, scheduler=scheduler)
    said = []
    for attempt in (
        lambda: shardadam.load(directory, model=run.model, optimizer=run.optimizer, scheduler=scheduler),
        lambda: run.train(range(1)),
    ):
        try:
            attempt()  # type: ignore[no-untyped-call]
            said.append("nothing")
        except (CheckpointError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_a_scheduler_that_fails_to_load_on_one_rank_stops_all(tmp_path: Path) -> None:
    for loading, training in on_ranks(2, load_stubbornly, str(tmp_path)):
        assert "stubborn" in loading and "now hold a part of the checkpoint" in loading
        assert "Load a whole checkpoint" in training


# In the background, and on the disk


def test_extra_and_cancel_do_not_reach_a_save_under_way(tmp_path: Path) -> None:
    run = build(width=40)
    extra = {"position": [1]}
    future = shardadam.save(tmp_path, step=1, model=run.model, optimizer=run.optimizer, extra=extra, asynchronous=True)
    extra["position"].append(2)
    assert not future.cancel()
    future.result(30)
    assert shardadam.load(tmp_path, model=run.model, optimizer=run.optimizer).extra == {"position": [1]}


def test_a_checkpoint_that_was_moved_and_linked_is_only_unlinked(tmp_path: Path) -> None:
    run = build(width=40)
    directory, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    arguments: Any = dict(model=run.model, optimizer=run.optimizer, keep=1)
    shardadam.save(directory, step=1, **arguments)
    shutil.move(directory / "step-00000001", elsewhere)
    (directory / "step-00000001").symlink_to(elsewhere)
    for step in (2, 3):
        shardadam.save(directory, step=step, **arguments)
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step-00000003"]
    assert (elsewhere / "checkpoint.json").exists()


def test_a_crash_while_old_checkpoints_are_removed_leaves_none_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build(width=40)
    arguments: Any = dict(model=run.model, optimizer=run.optimizer)
    for step in range(5):
        shardadam.save(tmp_path, step=step, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr("shardadam.checkpoint.directory._remove", lambda path: os.listdir("/missing"))
        with pytest.warns(UserWarning, match="could not be removed"):
            shardadam.save(tmp_path, step=5, keep=2, **arguments)
    shardadam.save(tmp_path, step=6, keep=2, **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005", "step-00000006"]


def test_a_name_alone_makes_no_checkpoint(tmp_path: Path) -> None:
    assert not shardadam.has_checkpoint(tmp_path / "step-00000005")
    directory = tmp_path / "step-20240101"
    run = build(width=40)
    shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer)
    expected = run.everything()
    run.train(range(1))
    shardadam.load(directory, model=run.model, optimizer=run.optimizer)
    assert [name for name in differences(expected, run.everything()) if name != "lr"] == []
