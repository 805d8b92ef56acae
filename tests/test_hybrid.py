# SPDX-License-Identifier: Apache-2.0
"""Hybrid sharding trains the same model however ranks are split into replicas and shards, and replicas stay equal bit
for bit, even if ranks are at different points.
"""

from __future__ import annotations

import gc
import math
import time
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import shardadam
from shardadam import ShardedAdamW
from shardadam.sums.stats import GradStats
from shardadam.transport import (
    GlooTransport,
    HybridTransport,
    ReduceScatter,
    SingleProcessTransport,
    Transport,
    connect,
)
from shardadam.transport.groups import timeout_s
from tests import runs, test_parity
from tests.adversarial import AdversarialTransport
from tests.parity import build_parameters, clones, quadratic
from tests.ranks import DEADLINE_S, on_ranks, rank_and_size
from tests.runs import FORMATS, differences
from tests.test_parity import Case, assert_close, groups_of, hyperparameters, loss_of, train_torch

Shape = tuple[int, int]  # replicas, shards
SHAPES: list[Shape] = [(2, 2), (4, 1), (1, 4)]
KINDS = ["collective", "shared_memory", "adversarial", "adversarial within"]
TRANSPORTS = ["collective", "shared_memory"]  # of the shard group


@cache
def mesh_of(shape: Shape, ranks: tuple[int, ...] | None = None) -> DeviceMesh:
    if ranks is not None:
        return DeviceMesh("cpu", torch.tensor(ranks).view(shape))
    return init_device_mesh("cpu", shape)


def connected(shape: Shape, kind: str) -> Transport:
    transport = connect(mesh_of(shape), kind=kind if kind in TRANSPORTS else "collective")
    if kind == "adversarial":
        return AdversarialTransport(transport)
    if kind == "adversarial within" and isinstance(transport, HybridTransport):
        transport._shard = AdversarialTransport(transport._shard)
        transport._replica = AdversarialTransport(transport._replica)
    return transport


# It trains like torch's AdamW


def train(case: Case, shape: Shape, kind: str) -> dict[str, Any]:
    rank, _ = rank_and_size()
    parameters = test_parity.build_parameters(case)
    if rank > 0:  # to be replaced by rank 0's values
        for parameter in parameters:
            parameter.data += rank
    transport = connected(shape, kind)
    optimizer = ShardedAdamW(
        groups_of(case, parameters),
        **hyperparameters(case),
        gradient_sync=case.gradient_sync,  # type: ignore[arg-type]
        bucket_mb=case.bucket_mb,
        transport=transport,
    )
    norms = []
    for step in range(test_parity.STEPS):
        for micro in range(case.accumulate):
            loss = loss_of(case, parameters, rank, step, micro) / case.accumulate
            if case.no_sync and micro < case.accumulate - 1:
                with optimizer.no_sync():
                    loss.backward()
            elif loss.requires_grad:
                loss.backward()
        if case.gradient_sync == "external":
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()  # type: ignore[operator]
        if case.clip is not None:
            norms.append(float(optimizer.clip_grad_norm_(case.clip)))
        optimizer.step()
        optimizer.zero_grad()
    return {
        "parameters": clones(parameters),
        "shard": (
            transport.rank,
            [state.clone() for arena in optimizer._engine.parameters.arenas for state in arena.state.values()],
        ),
        "norms": norms,
    }


CASES = [
    Case(),
    Case(gradient_sync="step", unused="some ranks"),
    Case(gradient_sync="external"),
    Case(accumulate=3, unused="changing", clip=0.5),
    Case(accumulate=2, no_sync=True, unused="some ranks", clip=0.7),
    Case(gradient_sync="step", accumulate=2, clip=0.5, two_groups=True),
    Case(bucket_mb=32, channels_last=True),
    Case(unused="everywhere", two_groups=True),
]
# In the sixth step of the case that is left out, rank 5 has no gradient, and runs no backward.
CASES_OF_EQUAL_ROUNDS = [case for case in CASES if case.accumulate == 1 or case.unused != "changing"]


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("shape", "kind"), [(shape, kind) for shape, kind in product(SHAPES, KINDS) if shape[0] > 1 or kind == "collective"]
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_torch_however_ranks_are_split(case: Case, shape: Shape, kind: str) -> None:
    results = on_ranks(4, train, case, shape, kind)
    assert_close([result["parameters"] for result in results], train_torch(case, 4), case.lr)
    assert_replicas_are_equal(results, shape)


@pytest.mark.long
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (6, 1)])
@pytest.mark.parametrize("case", CASES_OF_EQUAL_ROUNDS, ids=lambda case: case.id)
def test_equals_torch_on_three_replicas_and_more(case: Case, shape: Shape, transport: str) -> None:
    results = on_ranks(6, train, case, shape, transport)
    assert_close([result["parameters"] for result in results], train_torch(case, 6), case.lr)
    assert_replicas_are_equal(results, shape)


def assert_replicas_are_equal(results: list[dict[str, Any]], shape: Shape) -> None:
    shards: dict[int, list[Tensor]] = {}
    for result in results:
        index, state = result["shard"]
        expected = shards.setdefault(index, state)
        assert all(torch.equal(a, b) for a, b in zip(state, expected, strict=True))
    assert sorted(shards) == list(range(shape[1]))


@pytest.mark.long
def test_the_norm_is_that_of_the_averages_over_all_ranks() -> None:
    """Compare norms, as Adam hardly depends on the scale of gradients, and parameters would not show a wrong norm."""
    case = Case(clip=0.5, accumulate=2)
    hybrid, replicated, sharded = (on_ranks(4, train, case, shape, "collective") for shape in SHAPES)
    for result in (*hybrid, *replicated):
        assert result["norms"] == pytest.approx(sharded[0]["norms"], rel=1e-6)
    assert min(sharded[0]["norms"]) > case.clip  # type: ignore[operator]


def gradients_and_norm(shape: Shape, gradient_sync: str, dtype: torch.dtype, transport: str) -> list[Tensor]:
    rank, _ = rank_and_size()
    parameters = [nn.Parameter(torch.ones(300, dtype=dtype)), nn.Parameter(torch.ones(7, dtype=dtype))]
    optimizer = ShardedAdamW(
        parameters, process_group=mesh_of(shape), gradient_sync=gradient_sync, bucket_mb=0.001, transport=transport  # type: ignore[arg-type]
    )  # fmt: skip
    for scale in (1, 2):
        sum((parameter * (rank + 1) * scale * (i + 1)).sum() for i, parameter in enumerate(parameters)).backward()  # type: ignore[union-attr]
    gradients = [optimizer.full_grad(parameter) for parameter in parameters]
    return [optimizer.clip_grad_norm_(1.0), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_averages_over_all_ranks(
    shape: Shape, gradient_sync: str, dtype: torch.dtype, transport: str
) -> None:
    """2.5 is the mean of 1, 2, 3 and 4, and every partial sum is exact. Parameters would not show a wrong divisor, as
    Adam hardly depends on the scale of gradients.
    """
    mean = 2.5 * (1 + 2)
    for norm, first, second in on_ranks(4, gradients_and_norm, shape, gradient_sync, dtype, transport):
        assert torch.equal(first, torch.full((300,), mean)) and torch.equal(second, torch.full((7,), 2 * mean))
        assert float(norm) == pytest.approx(math.sqrt(300 * mean**2 + 7 * (2 * mean) ** 2), rel=1e-6)


def train_bf16(shape: Shape, gradient_sync: str) -> list[Tensor]:
    """Return the master weights after ten steps."""
    rank, _ = rank_and_size()
    parameters = [nn.Parameter(parameter.detach().bfloat16()) for parameter in build_parameters()]
    optimizer = ShardedAdamW(
        parameters, lr=1e-2, process_group=mesh_of(shape), gradient_sync=gradient_sync, bucket_mb=0.001  # type: ignore[arg-type]
    )  # fmt: skip
    for step in range(10):
        quadratic(parameters, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [optimizer.full_state(parameter)["master"] for parameter in parameters]


@pytest.mark.parametrize("gradient_sync", ["backward", pytest.param("step", marks=pytest.mark.long)])
def test_bf16_with_masters_is_the_same_however_ranks_are_split(gradient_sync: str) -> None:
    hybrid, replicated, sharded = (on_ranks(4, train_bf16, shape, gradient_sync) for shape in SHAPES)
    for results in (hybrid, replicated):
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
            for ours, theirs in zip(result, sharded[0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def step_with_a_gradient_that_is_not_finite(poisoned_rank: int, value: float) -> tuple[bool, int, list[Tensor]]:
    rank, _ = rank_and_size()
    parameters = build_parameters()
    optimizer = ShardedAdamW(parameters, lr=1e-2, process_group=mesh_of((2, 2)), bucket_mb=0.001)
    for step in range(3):
        before = clones(parameters)
        loss = quadratic(parameters, rank, step)
        (loss * value if (rank, step) == (poisoned_rank, 1) else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            stayed = all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    return stayed, int(optimizer.skipped_steps), clones(parameters)


@pytest.mark.parametrize(("poisoned_rank", "value"), [(0, math.inf), (3, math.nan)])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(poisoned_rank: int, value: float) -> None:
    results = on_ranks(4, step_with_a_gradient_that_is_not_finite, poisoned_rank, value)
    for stayed, skipped, parameters in results:
        assert stayed and skipped == 1
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(parameters, results[0][2], strict=True))


# What the transport guarantees


class SeenStats(GradStats):
    def __init__(self) -> None:
        super().__init__(with_squares=False)
        self.seen: list[float] = []

    def update(self, gradient: Tensor) -> None:
        self.seen += gradient.tolist()


def reduce_and_record_chunks(shape: Shape, kind: str) -> dict[str, list[Any]]:
    """Rank r contributes r + 1 to three reduce-scatters: two into one shard, and one into another."""
    rank, _ = rank_and_size()
    transport = connected(shape, kind)
    numel = 8
    shards = [torch.full((numel // transport.world_size,), 100.0) for _ in range(2)]
    seen: list[list[float]] = []
    pending = []
    for shard, accumulate in ((0, False), (1, True), (0, True)):
        staging = transport.allocate_staging(numel, torch.float32, torch.device("cpu"))
        staging.send.fill_(rank + 1)

        stats = SeenStats()
        seen.append(stats.seen)
        request = ReduceScatter(staging, numel, shards[shard], scale=0.5, accumulate=accumulate, stats=stats)
        pending.append(transport.reduce_scatter(request))
    for each in pending:
        each.wait()
    transport.fence()
    assert all(each.is_released() for each in pending)
    block = torch.tensor([1.0, rank], dtype=torch.float64)
    transport.all_reduce(block).wait()
    sent = torch.tensor([rank, 7])
    transport.broadcast(sent).wait()
    transport.close(clean=True)
    return {"shards": [shard.unique().tolist() for shard in shards], "seen": [sorted(set(seen[i])) for i in range(3)],
            "block": block.tolist(), "sent": sent.tolist()}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "kind"), [*product(SHAPES[:1], KINDS), ((4, 1), "collective"), ((1, 4), "collective")]
)
def test_statistics_see_final_sums_and_small_transfers_reach_all_ranks(shape: Shape, kind: str) -> None:
    for result in on_ranks(4, reduce_and_record_chunks, shape, kind):
        assert result["shards"] == [[10.0], [105.0]]
        assert result["seen"] == [[5.0], [105.0], [10.0]]
        assert result["block"] == [4.0, 6.0]
        assert result["sent"] == [0, 7]


def train_with_a_late_rank(late: int, transport: str) -> list[Tensor]:
    """Start the late rank's backward when all others have completed theirs; a hook that waited for it would hang."""
    rank, _ = rank_and_size()
    parameters = [nn.Parameter(torch.ones(256)) for _ in range(12)]
    optimizer = ShardedAdamW(
        parameters, lr=0.1, process_group=mesh_of((2, 2)), bucket_mb=1024 / 2**20, transport=transport  # type: ignore[arg-type]
    )  # fmt: skip
    for step in range(3):
        if rank == late:
            dist.barrier()
        sum((parameter**2 * (rank + step + i)).sum() for i, parameter in enumerate(parameters)).backward()  # type: ignore[union-attr]
        if rank != late:
            dist.barrier()
        optimizer.step()
        optimizer.zero_grad()
    return clones(parameters)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_backward_waits_for_no_peer(late: int, transport: str) -> None:
    results = on_ranks(4, train_with_a_late_rank, late, transport, deadline_s=20.0)
    expected = on_ranks(4, train_with_a_late_rank, -1, transport)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected[0], strict=True))


def poll_a_reduce_scatter(late: int, kind: str) -> tuple[list[bool], bool]:
    """Return whether it is done: several times before the late rank starts it, and in the end."""
    rank, _ = rank_and_size()
    transport = connected((2, 2), kind)
    staging = transport.allocate_staging(8, torch.float32, torch.device("cpu"))
    staging.send.fill_(1.0)
    shard = torch.empty(4)
    early = []
    if rank == late:
        dist.barrier()
    pending = transport.reduce_scatter(ReduceScatter(staging, 8, shard, scale=1.0, accumulate=False))
    if rank != late:
        for _ in range(20):
            early.append(pending.done())
            time.sleep(0.005)
        dist.barrier()
    end = time.monotonic() + 10
    while not pending.done() and time.monotonic() < end:
        time.sleep(0.001)
    done = pending.done()
    pending.wait()
    assert shard.tolist() == [4.0] * 4
    transport.close(clean=True)
    return early, done


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_reduce_scatter_is_done_when_all_ranks_have_started_it_without_wait(late: int, transport: str) -> None:
    for rank, (early, done) in enumerate(on_ranks(4, poll_a_reduce_scatter, late, transport)):
        assert not any(early) or rank in (1 - late, 5 - late), "done before the late rank has started it"
        assert done


def broadcast_between_sums(transport: str) -> list[list[Tensor]]:
    """Broadcast between backward and step, when ranks have started different numbers of all-reduces over replicas."""
    rank, _ = rank_and_size()
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)), nn.BatchNorm1d(16))
    trained = list(model[:8].parameters())
    model[8].requires_grad_(False)
    optimizer = ShardedAdamW(
        trained, lr=0.1, process_group=mesh_of((2, 2)), bucket_mb=1088 / 2**20, transport=transport  # type: ignore[arg-type]
    )  # fmt: skip
    synced = []
    for step in range(6):
        nn.init.constant_(model[8].weight, 10 * step + rank)
        generator = torch.Generator().manual_seed(4 * step + rank)
        model(torch.randn(4, 16, generator=generator)).square().sum().backward()
        time.sleep(0.01 * ((rank + step) % 3))
        optimizer._engine.reducer._pool._in_flight[0].pending.done()  # starts the ready ones
        optimizer.sync_module(model)
        synced.append(model[8].weight.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    return [synced, clones(trained)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_broadcast_does_not_mix_with_sums_over_replicas(transport: str) -> None:
    results = on_ranks(4, broadcast_between_sums, transport)
    for synced, trained in results:
        assert [float(weight.unique()) for weight in synced] == [10.0 * step for step in range(6)]
        assert all(torch.equal(a, b) for a, b in zip(trained, results[0][1], strict=True))


def memory_of(shape: Shape) -> tuple[int, int, int]:
    parameters = [nn.Parameter(torch.ones(512 * 3)), nn.Parameter(torch.ones(512, 5))]
    optimizer = ShardedAdamW(parameters, process_group=mesh_of(shape), bucket_mb=1, transport="collective")
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    memory = optimizer.memory()
    return memory.moments, memory.gradient_shard, memory.staging


def test_state_is_one_nth_of_a_shard_group() -> None:
    numel = 512 * 8
    for replicas, shards in SHAPES:
        for moments, gradient_shard, staging in on_ranks(4, memory_of, (replicas, shards)):
            assert (moments, gradient_shard) == (8 * numel // shards, 4 * numel // shards)
            assert staging == 4 * (numel + numel * (shards - 1) // shards)


# Meshes


def kinds_of_transport() -> list[str]:
    gc.collect()
    names, groups = [], dist.distributed_c10d._world.pg_map
    for shape in ((1, 4), (4, 1)):
        mesh = mesh_of(shape)
        connect(mesh.get_group(0 if shape[0] > 1 else 1), kind="collective").close(clean=True)  # caches groups
        before = len(groups)
        transport = connect(mesh, kind="collective")
        names.append(type(transport).__name__)
        if isinstance(transport, HybridTransport):
            names += [type(transport._shard).__name__, type(transport._replica).__name__]
        assert len(groups) == before
        transport.close(clean=True)
    return names


def test_a_mesh_dimension_of_one_needs_no_new_groups() -> None:
    single, collective = SingleProcessTransport.__name__, GlooTransport.__name__
    expected = [collective, HybridTransport.__name__, single, collective]
    assert on_ranks(4, kinds_of_transport) == [expected] * 4


def groups_after_optimizers() -> list[int]:
    counts = []
    for _ in range(3):
        optimizer = ShardedAdamW([nn.Parameter(torch.ones(3))], process_group=mesh_of((2, 2)))
        counts.append(len(dist.distributed_c10d._world.pg_map))
        del optimizer
        gc.collect()
    return counts


def test_groups_of_deleted_optimizers_are_used_again() -> None:
    for counts in on_ranks(4, groups_after_optimizers):
        assert len(set(counts)) == 1


def train_on_a_part_of_the_world() -> list[Tensor] | None:
    """Train on ranks 1, 2, 4 and 5 of six, after a constructor that raised as one of them passed another lr."""
    rank, _ = rank_and_size()
    mesh = mesh_of((2, 2), (1, 2, 4, 5))
    if rank in (0, 3):
        return None
    with pytest.raises(ValueError, match=r"lr 0.1 on ranks 1-2, 5, 0.2 on rank 4\."):
        ShardedAdamW([nn.Parameter(torch.ones(3))], lr=0.2 if rank == 4 else 0.1, process_group=mesh)
    parameters = build_parameters()
    optimizer = ShardedAdamW(parameters, lr=1e-2, process_group=mesh, bucket_mb=0.001)
    for step in range(5):
        quadratic(parameters, rank, step).backward()
        optimizer.step()
    return clones(parameters)


@pytest.mark.long
def test_a_mesh_may_be_a_part_of_the_world() -> None:
    results = on_ranks(6, train_on_a_part_of_the_world)
    parameters = build_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(5):
        for rank in (1, 2, 4, 5):
            (quadratic(parameters, rank, step) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close([result for result in results if result is not None], clones(parameters), 1e-2)


# Checkpoints


def build_run(shape: Shape | None, format: Any = FORMATS[0], seed: int = 0) -> runs.Run:
    return runs.build(format, width=40, seed=seed, process_group=None if shape is None else mesh_of(shape))


def save_run(directory: str, shape: Shape | None, format: Any) -> tuple[dict[str, Tensor], Tensor]:
    rank, _ = rank_and_size()
    run = build_run(shape, format)
    run.train(range(3))
    written = run.everything()
    shardadam.save(
        directory, step=3, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler, extra={"rank": rank}
    )
    return written, torch.rand(3)


def load_run(directory: str, shape: Shape | None, format: Any) -> tuple[dict[str, Tensor], Tensor, Any]:
    run = build_run(shape, format, seed=4)
    found = shardadam.load(directory, model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    drawn = torch.rand(3)
    assert found.world_size == len(found.extras)
    return run.everything(), drawn, found.extra


LAYOUTS: list[Shape | None] = [(2, 2), (4, 1), (1, 4), (1, 3), (3, 1), None]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("format", [FORMATS[0], (torch.bfloat16, "int8", "split")], ids=str)
@pytest.mark.parametrize(
    ("saved", "loaded"), [*product(LAYOUTS[:1], LAYOUTS), *product(LAYOUTS[1:], LAYOUTS[:1]), ((4, 1), (1, 3))]
)
def test_checkpoints_load_however_ranks_are_split(
    tmp_path: Path, saved: Shape | None, loaded: Shape | None, format: Any
) -> None:
    sizes = [1 if shape is None else math.prod(shape) for shape in (saved, loaded)]
    written = on_ranks(sizes[0], save_run, str(tmp_path), saved, format)
    for rank, (everything, drawn, extra) in enumerate(on_ranks(sizes[1], load_run, str(tmp_path), loaded, format)):
        assert differences(written[0][0], everything) == []
        if rank < sizes[0]:
            assert extra == {"rank": rank} and torch.equal(drawn, written[rank][1])


def use_state_dicts(directory: str, shape: Shape) -> dict[str, Any]:
    run, other = build_run(shape), build_run(shape, seed=4)
    run.train(range(3))
    expected = run.everything()
    dcp.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, checkpoint_id=directory)
    found = {"model": other.model.state_dict(), "optimizer": other.optimizer.state_dict()}
    dcp.load(found, checkpoint_id=directory)
    other.model.load_state_dict(found["model"])
    other.optimizer.load_state_dict(found["optimizer"])
    other.scheduler.load_state_dict(run.scheduler.state_dict())
    whole = run.optimizer.full_state_dict()
    run.optimizer.consolidate_state_dict(to=3)
    consolidated = run.optimizer.state_dict()
    is_whole = all(type(value) is Tensor for entry in consolidated["state"].values() for value in entry.values())
    own = ("model.norm.running_mean", "model.norm.running_var")  # differ by rank; DCP saves those of one rank
    differ = [name for name in differences(expected, other.everything()) if name not in own]
    return {"differences": differ, "has all": bool(whole), "consolidated": is_whole}


@pytest.mark.parametrize("shape", [(2, 2), pytest.param((4, 1), marks=pytest.mark.long)])
def test_state_dicts_and_dcp(tmp_path: Path, shape: Shape) -> None:
    results = on_ranks(4, use_state_dicts, str(tmp_path), shape)
    assert [result["differences"] for result in results] == [[]] * 4
    assert [result["has all"] for result in results] == [True, False, False, False]
    if shape == (2, 2):
        assert [result["consolidated"] for result in results] == [False, False, False, True]


# Time limits


def time_limits() -> list[float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    transport = ShardedAdamW(
        [nn.Parameter(torch.ones(8))], process_group=mesh, transport="collective"
    )._engine.transport
    assert isinstance(transport, HybridTransport)
    return [timeout_s(inner._group) for inner in (transport._shard, transport._replica)]  # type: ignore[attr-defined]


def test_groups_of_a_mesh_have_the_time_limit_of_the_default_group() -> None:
    """init_device_mesh builds groups with torch's default timeout: a stopped rank hung the others for 30 minutes."""
    assert on_ranks(4, time_limits) == [[DEADLINE_S] * 2] * 4


class RecordPolls(SingleProcessTransport):
    def __init__(self, can_poll: bool) -> None:
        self.can_poll = can_poll
        self.polled_s: list[float] = []

    def poll(self, seconds: float) -> bool:
        self.polled_s.append(seconds)
        return self.can_poll


@pytest.mark.parametrize("can_poll", [True, False])
def test_polling_the_shard_group_does_not_delay_the_replica_group(can_poll: bool) -> None:
    """``poll`` polled the shard group for all of the pool's patience, while it was waiting for the replica group: every
    other bucket took 0.25 s over shared memory.
    """
    shard, replica = RecordPolls(can_poll), RecordPolls(True)
    hybrid = HybridTransport(shard, replica, control=None, store_barrier=shard.store_barrier)
    assert hybrid.poll(10.0)
    assert shard.polled_s[0] < 0.01 and replica.polled_s == ([] if can_poll else [10.0])
