# SPDX-License-Identifier: Apache-2.0
"""The communication of a step: which collectives, in which order, how many bytes, on which process group, and when."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardadam import ShardedAdamW
from shardadam.transport import connect
from shardadam.transport.base import own_slice
from tests.ranks import on_ranks, rank_and_size

BUCKET_MB = 0.004  # 1048 elements


class RecordCollectives(TorchDispatchMode):
    """Record every collective of torch's dispatcher as (name, bytes of its tensors, whether on the default group)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            flat = torch.utils._pytree.tree_leaves(args)
            sizes = [leaf.nbytes for leaf in flat if isinstance(leaf, torch.Tensor)]
            groups = [
                dist.ProcessGroup.unbox(leaf)
                for leaf in flat
                if isinstance(leaf, torch.ScriptObject) and is_group(leaf)
            ]
            on_default = any(group.group_name == dist.group.WORLD.group_name for group in groups)
            self.calls.append((func._schema.name.removeprefix("c10d::"), sum(sizes), on_default))
        return func(*args, **(kwargs or {}))


def is_group(leaf: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(leaf._type())


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 50), nn.Linear(50, 1)
    )


def batch(seed: int) -> torch.Tensor:
    return torch.randn(8, 20, generator=torch.Generator().manual_seed(seed))


def record_a_step(gradient_sync: str, accumulate: int, clip: bool) -> dict[str, Any]:
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(
        model.parameters(),
        bucket_mb=BUCKET_MB,
        gradient_sync=gradient_sync,
        max_grad_norm=1.0 if clip else None,
        transport="collective",
    )
    for step in range(2):  # the launch order is learned in the first
        with RecordCollectives() as record:
            for micro in range(accumulate):
                model(batch(100 * step + 10 * micro + rank)).sum().backward()
            in_backward = len(record.calls)
            optimizer.step()
            optimizer.zero_grad()
    return {
        "calls": record.calls,
        "in_backward": in_backward,
        "bucket_bytes": [bucket.parameters.nbytes for bucket in optimizer._engine.parameters.buckets],
        "order": list(optimizer._engine.reducer.order),
        "parameters": len(list(model.parameters())),
    }


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("gradient_sync", "accumulate"), [("backward", 1), ("backward", 3), ("step", 1), ("step", 3)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_reduces_each_bucket_once_and_gathers_it_once(
    world_size: int, gradient_sync: str, accumulate: int, clip: bool
) -> None:
    """On Gloo a reduce-scatter is two all-to-alls, an all-gather is point-to-point, and a peer gets only its slice."""
    peers = world_size - 1
    results = on_ranks(world_size, record_a_step, gradient_sync, accumulate, clip)
    for result in results:
        bucket_bytes, order = result["bucket_bytes"], result["order"]
        assert len(bucket_bytes) > 3
        rounds = accumulate if gradient_sync == "backward" else 1
        block_bytes = 8 * (4 + result["parameters"])  # norm, flag, and two of the fingerprint
        shard_bytes = {index: nbytes // world_size for index, nbytes in enumerate(bucket_bytes)}
        there = [("alltoall_base_", peers * shard_bytes[index], False) for index in order for _ in range(2)] * rounds
        back = [
            (name, shard_bytes[index], False)
            for index in reversed(order)
            for name in peers * ["recv_"] + peers * ["send"]
        ]
        assert result["calls"] == [*there, ("allreduce_", block_bytes, False), *back]
        assert result["in_backward"] == (len(there) if gradient_sync == "backward" else 0)
        assert result["calls"] == results[0]["calls"]


def record_timeline() -> list[str]:
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=BUCKET_MB)
    timeline: list[str] = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: timeline.append("gradient"))
    transport = optimizer._engine.transport
    reduce_scatter = transport.reduce_scatter

    def recorded(*arguments: Any, **options: Any) -> Any:
        timeline.append("launch")
        return reduce_scatter(*arguments, **options)

    transport.reduce_scatter = recorded  # type: ignore[method-assign]
    for step in range(2):
        timeline.clear()
        model(batch(rank + step)).sum().backward()
        timeline.append("end of backward")
        optimizer.step()
    return timeline


def test_the_hook_that_completes_a_bucket_launches_its_reduction() -> None:
    for timeline in on_ranks(2, record_timeline):
        last_gradient = len(timeline) - 1 - timeline[::-1].index("gradient")
        before = timeline[:last_gradient].count("launch")
        assert before >= timeline.count("launch") - 1, timeline
        assert "launch" not in timeline[timeline.index("end of backward") :]


def profile_a_step(transport: str) -> dict[str, list[tuple[float, float]]]:
    """Return the start and end of every profiled range, in microseconds, by its name."""
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=BUCKET_MB, transport=transport)  # type: ignore[arg-type]
    optimizer.overlap_gather(model)
    for step in range(3):
        with torch.profiler.profile() if step == 2 else nullcontext() as profiler:
            with torch.profiler.record_function("forward"):
                loss = model(batch(rank + step)).sum()
            with torch.profiler.record_function("backward"):
                loss.backward()
            optimizer.step()
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in profiler.events():
        spans.setdefault(event.name, []).append((event.time_range.start, event.time_range.end))
    return {name: sorted(spans[name]) for name in spans if name in ("forward", "backward") or "shardadam" in name}


@pytest.mark.parametrize("transport", ["collective", "shared_memory"])
def test_the_profiler_shows_reductions_under_backward_and_gathers_under_forward(transport: str) -> None:
    for spans in on_ranks(2, profile_a_step, transport):
        backward_start, backward_end = spans["backward"][0]
        reductions = spans["shardadam.reduce_scatter"]
        assert len([start for start, _ in reductions if backward_start < start < backward_end]) >= 4
        forward_start, forward_end = spans["forward"][0]
        gathers = [start for start, _ in spans["shardadam.all_gather"] if forward_start < start < forward_end]
        assert len(gathers) >= 4
        assert all(start > backward_end for start, _ in spans["shardadam.update"])


def train_with_user_collectives(traffic: bool) -> list[torch.Tensor]:
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=BUCKET_MB)
    for step in range(5):
        loss = model(batch(10 * step + rank)).square().mean()
        loss.backward()
        if traffic:
            dist.all_reduce(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_users_collectives_between_backward_and_step_do_not_mix_with_ours() -> None:
    for with_traffic, without in zip(
        on_ranks(2, train_with_user_collectives, True),
        on_ranks(2, train_with_user_collectives, False),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(with_traffic, without, strict=True))


def step_against_the_fused_kernel(adamw: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs of our shard and a copy stepped by torch's fused kernel, on gradients summed here in rank order."""
    from shardadam import ShardedAdam

    rank, world_size = rank_and_size()
    model = build_model()
    optimizer = (ShardedAdamW if adamw else ShardedAdam)(
        model.parameters(), lr=1e-2, weight_decay=0.1, bucket_mb=BUCKET_MB
    )
    kernel = torch._fused_adamw_ if adamw else torch._fused_adam_
    shards = [
        [t.clone() for t in (bucket.shard.parameter, bucket.shard.exp_avg, bucket.shard.exp_avg_sq)]
        for bucket in optimizer._engine.parameters.buckets
    ]
    for step in range(10):
        gradients = []  # every rank computes those of all ranks
        for peer in range(world_size):
            model.zero_grad()
            with optimizer.no_sync():
                model(batch(100 * step + peer)).square().mean().backward()
            gradients.append({parameter: parameter.grad for parameter in model.parameters()})
        model.zero_grad()
        model(batch(100 * step + rank)).square().mean().backward()
        optimizer.step()
        for bucket, (parameter, exp_avg, exp_avg_sq) in zip(optimizer._engine.parameters.buckets, shards, strict=True):
            total = torch.zeros(bucket.numel)
            for peer in range(world_size):
                for member, segment in bucket.segments:
                    flat = gradients[peer][member.parameter].flatten()
                    total[segment.offset : segment.offset + segment.numel] += flat[
                        segment.start : segment.start + segment.numel
                    ]
            mean = total.chunk(world_size)[rank] / world_size
            kernel(
                [parameter], [mean], [exp_avg], [exp_avg_sq], [], [torch.tensor(step + 1.0)], lr=1e-2, beta1=0.9,
                beta2=0.999, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip
    return [
        pair
        for bucket, expected in zip(optimizer._engine.parameters.buckets, shards, strict=True)
        for shard in (bucket.shard,)
        for pair in zip((shard.parameter.clone(), shard.exp_avg, shard.exp_avg_sq), expected, strict=True)
    ]


@pytest.mark.parametrize("adamw", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_torchs_fused_kernel_bit_for_bit(world_size: int, adamw: bool) -> None:
    for pairs in on_ranks(world_size, step_against_the_fused_kernel, adamw):
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
        assert any(bool(ours.count_nonzero()) for ours, _ in pairs)


def gather_in_any_order() -> list[torch.Tensor]:
    """Start all-gathers of unequal sizes and wait for them in a different order on each rank."""
    rank, world_size = rank_and_size()
    transport = connect(None, kind="collective")
    flats = [torch.full((numel * world_size,), -1.0) for numel in (1, 1000, 3, 70_000, 3)]
    for index, flat in enumerate(flats):
        own_slice(flat, rank, world_size).fill_(10 * index + rank)
    pending = [transport.all_gather(flat) for flat in flats]
    for index in range(len(flats)):
        pending[(index * (rank + 1) + rank) % len(flats)].wait()
    transport.close(clean=True)
    return flats


@pytest.mark.parametrize("world_size", [2, 3])
def test_concurrent_all_gathers_do_not_mix(world_size: int) -> None:
    for flats in on_ranks(world_size, gather_in_any_order):
        for index, flat in enumerate(flats):
            assert [set(part.tolist()) for part in flat.chunk(world_size)] == [
                {10.0 * index + rank} for rank in range(world_size)
            ]


def staging_of_a_bucket() -> tuple[int, int]:
    transport = connect(None, kind="collective")
    staging = transport.allocate_staging(1200, torch.float32, torch.device("cpu"))
    assert staging.receive is not None
    transport.close(clean=True)
    return staging.send.nbytes, staging.receive.nbytes


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_receive_buffer_holds_exactly_the_slices_from_peers(world_size: int) -> None:
    expected = (4800, 4800 // world_size * (world_size - 1))
    assert on_ranks(world_size, staging_of_a_bucket) == [expected] * world_size
