# SPDX-License-Identifier: Apache-2.0
"""Training resumed in new processes, on as many ranks, equals uninterrupted training bit for bit."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardadam
from shardadam import CheckpointError
from shardadam.checkpoint import background
from tests.ranks import on_ranks, rank_and_size, restart
from tests.runs import FORMATS, build, differences


def straight(directory: str, format: Any, accumulate: int, asynchronous: bool) -> list[dict[str, Tensor]]:
    """Trains 20 steps and saves after 10; a save in the background writes while training continues."""
    rank, _ = rank_and_size()
    run = build(format)
    run.train(range(10), accumulate=accumulate)
    kept = run.everything()
    saved = shardadam.save(
        directory,
        step=10,
        model=run.model,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        extra={"position": 10 * rank},
        asynchronous=asynchronous,
    )
    run.train(range(10, 20), accumulate=accumulate)
    if asynchronous:
        saved = saved.result(timeout=30)  # type: ignore[union-attr]
    assert saved == Path(directory) / "step-00000010"
    return [kept, run.everything()]


def resumed(directory: str, format: Any, accumulate: int) -> list[Any]:
    run = build(format, seed=3, bucket_mb=0.01)
    run.train(range(2))
    loaded = shardadam.load(directory, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    kept = run.everything()
    run.train(range(10, 20), accumulate=accumulate)
    return [kept, run.everything(), loaded]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("format", FORMATS, ids=lambda f: "-".join(map(str, f)))
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resuming_in_new_processes_is_bitwise(
    tmp_path: Path, world_size: int, format: Any, accumulate: int, asynchronous: bool
) -> None:
    expected = on_ranks(world_size, straight, str(tmp_path), format, accumulate, asynchronous)
    restart(world_size)
    found = on_ranks(world_size, resumed, str(tmp_path), format, accumulate)
    for rank in range(world_size):
        for before, after in ((expected[rank][0], found[rank][0]), (expected[rank][1], found[rank][1])):
            differing = [name for name in differences(before, after) if rank == 0 or "running" not in name]
            assert differing == []
        statistics = [name for name in found[rank][0] if "running" in name]  # rank 0's, on all ranks
        assert all(torch.equal(found[rank][0][name], expected[0][0][name]) for name in statistics)
        assert found[rank][2].extra == {"position": 10 * rank}
        assert (found[rank][2].step, found[rank][2].world_size) == (10, world_size)


def write_generations(directory: str) -> list[Any]:
    run = build()
    paths = []
    for step in range(1, 6):
        run.train([step])
        arguments: Any = dict(model=run.model, optimizer=run.optimizer, keep=2, asynchronous=step % 2 == 0)
        path: Any = shardadam.save(directory, step=step, **arguments)
        paths.append(path.result(30) if step % 2 == 0 else path)
    again = shardadam.save(directory, step=5, model=run.model, optimizer=run.optimizer, keep=2)
    rewound = shardadam.save(directory, step=3, model=run.model, optimizer=run.optimizer, keep=2)
    newest = shardadam.load(directory, model=run.model, optimizer=run.optimizer).path
    return [paths, again, rewound, newest]


def test_the_newest_are_kept_and_a_step_may_be_saved_again(tmp_path: Path) -> None:
    for paths, again, rewound, newest in on_ranks(2, write_generations, str(tmp_path)):
        assert [path.name for path in paths] == [f"step-{step:08d}" for step in range(1, 6)]
        assert again.name == "step-00000005-2"
        assert newest == rewound == tmp_path / "step-00000003"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000005-2"]


def fail_in_the_background(directory: str) -> list[str]:
    """Rank 1 cannot write its file, which shows only in the background."""
    rank, _ = rank_and_size()
    run = build()
    said = []
    if rank == 1:
        os.write, write = full_disk, os.write
    try:
        shardadam.save(directory, step=1, model=run.model, optimizer=run.optimizer, asynchronous=True)
        run.train(range(2))
        background._running[0].join()  # type: ignore[index]
    finally:
        if rank == 1:
            os.write = write
    for _ in range(2):
        try:
            said.append(str(shardadam.save(directory, step=2, model=run.model, optimizer=run.optimizer)))
        except CheckpointError as error:
            said.append(str(error))
    return said


def full_disk(descriptor: int, content: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failed_background_save_is_raised_once_at_the_next_call(tmp_path: Path) -> None:
    for first, second in on_ranks(2, fail_in_the_background, str(tmp_path)):
        assert "background" in first and "No space left" in first
        assert second.endswith("step-00000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000002"]


def load_only_what_is_asked_for(directory: str) -> list[Any]:
    run = build()
    run.train(range(3))
    shardadam.save(directory, step=3, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    before = run.everything()
    other = build(seed=5)
    other.train(range(1))
    others = other.everything()
    shardadam.load(directory, model=other.model)
    halfway = other.everything()
    shardadam.load(directory, optimizer=other.optimizer)
    return [before, others, halfway, other.everything()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_model_and_optimizer_load_one_by_one(tmp_path: Path, world_size: int) -> None:
    for before, others, halfway, after in on_ranks(world_size, load_only_what_is_asked_for, str(tmp_path)):
        for name in before.keys() - {"model.norm.running_mean", "model.norm.running_var"}:
            of_model = name.startswith("model.")
            assert torch.equal(halfway[name], (before if of_model else others)[name])
            assert torch.equal(after[name], before[name])


class WithExtraState(torch.nn.Linear):
    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_extra_state_and_wrapped_models_round_trip(tmp_path: Path) -> None:
    def make(seen: int) -> tuple[Any, Any]:
        module = WithExtraState(3, 4)
        module.seen = seen
        return module, shardadam.ShardedAdamW(module.parameters())

    module, optimizer = make(7)
    compiled = torch.compile(module)
    shardadam.save(tmp_path, step=0, model=compiled, optimizer=optimizer)
    other, others_optimizer = make(0)
    shardadam.load(tmp_path, model=other, optimizer=others_optimizer)
    assert other.seen == 7 and torch.equal(other.weight, module.weight)


def test_what_json_or_a_safe_pickle_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = build()
    with pytest.raises(CheckpointError, match="extra: found a value that JSON cannot represent"):
        shardadam.save(tmp_path, step=0, model=run.model, extra={1, 2})
    run.scheduler.somebodys = Path("x")
    with pytest.raises(
        CheckpointError, match=r"scheduler contains something that could only be loaded by running code"
    ):
        shardadam.save(tmp_path, step=0, model=run.model, scheduler=run.scheduler)
    assert list(tmp_path.iterdir()) == []


def change_after_the_call(directory: str) -> list[Any]:
    """A tensor lr and a scheduler change in place while the file is written."""
    parameter = torch.nn.Parameter(torch.ones(300))
    optimizer = shardadam.ShardedAdamW([parameter], lr=torch.tensor(0.5))
    future = shardadam.save(directory, step=0, optimizer=optimizer, asynchronous=True)
    optimizer.param_groups[0]["lr"].fill_(9.0)
    optimizer.state[parameter]["exp_avg"].fill_(9.0)
    future.result(30)
    shardadam.load(directory, optimizer=optimizer)
    return [optimizer.param_groups[0]["lr"], optimizer.full_state(parameter)["exp_avg"]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_asynchronous_save_holds_what_was_there_at_the_call(tmp_path: Path, world_size: int) -> None:
    for lr, exp_avg in on_ranks(world_size, change_after_the_call, str(tmp_path)):
        assert lr == 0.5 and not exp_avg.any()


def test_the_bound_of_int8_moments_is_what_it_was_under_changing_betas(tmp_path: Path) -> None:
    def make() -> tuple[Any, Any]:
        parameter = torch.nn.Parameter(torch.ones(300))
        return parameter, shardadam.ShardedAdamW([parameter], precision=shardadam.Precision(moments="int8"))

    parameter, optimizer = make()
    for betas in ((0.5, 0.6), (0.9, 0.999), (0.9, 0.95)):
        optimizer.param_groups[0]["betas"] = betas
        parameter.sum().backward()
        optimizer.step()
    shardadam.save(tmp_path, step=3, optimizer=optimizer)
    other, loaded = make()
    shardadam.load(tmp_path, optimizer=loaded)
    assert loaded.state[other]["bound"] == optimizer.state[parameter]["bound"] > 0
