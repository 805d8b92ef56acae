# SPDX-License-Identifier: Apache-2.0
"""Rounds neither hang nor mix buckets, whatever backward does: raises, is skipped, runs twice, runs in another
order.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardadam import ShardedAdamW
from shardadam import transport as transports
from shardadam.engine.reduction import backward_reducer, copy_in
from shardadam.engine.reduction.staging import StagingPool
from shardadam.engine.storage import ShardGroup, gradient_shard
from shardadam.sums.stats import GradStats
from shardadam.transport import Pending, SingleProcessTransport, Transport
from shardadam.transport.base import Finished
from tests.adversarial import AdversarialTransport
from tests.ranks import on_ranks, rank_and_size

BUCKET_MB = 0.002
LR = 1e-2


def connect(kind: str) -> Transport:
    inner = transports.connect(None)
    return AdversarialTransport(inner) if kind == "adversarial" else inner


def build_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(6)))


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1000 * step + rank))


def clone(parameters: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def expect(world_size: int, steps: list[Callable[[nn.Sequential, int], Tensor | None]]) -> list[Tensor]:
    """Train with torch's AdamW in one process; ``steps`` return the loss of a model and rank, or None to skip."""
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    for loss_of in steps:
        losses = [loss_of(model, rank) for rank in range(world_size)]
        if losses[0] is None:
            continue
        for loss in losses:
            loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= world_size
        optimizer.step()
        optimizer.zero_grad()
    return clone(model.parameters())


def assert_all_close(results: list[list[Tensor]], expected: list[Tensor]) -> None:
    for result in results:
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def plain_loss(step: int) -> Callable[[nn.Sequential, int], Tensor]:
    return lambda model, rank: model(batch(step, rank)).square().mean()


class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ArithmeticError("this backward fails")


def train_with_a_failing_backward(kind: str, failing_layer: int) -> list[Tensor]:
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=BUCKET_MB, transport=connect(kind))
    assert len(optimizer._engine.parameters.buckets) > StagingPool.SIZE + 2
    for step in range(6):
        x = batch(step, rank)
        for index, layer in enumerate(model):
            x = layer(x)
            if step in (0, 3) and rank == 0 and index == failing_layer:
                x = Explode.apply(x)  # after the last layer, so it raises before any gradient
        succeeded = torch.ones(())
        try:
            x.square().mean().backward()
        except ArithmeticError:
            succeeded.zero_()
        dist.all_reduce(succeeded, op=dist.ReduceOp.MIN)  # peers have launched buckets that rank 0 has not
        if succeeded:
            optimizer.step()
        optimizer.zero_grad()
    return clone(model.parameters())


@pytest.mark.sweep(4)
@pytest.mark.parametrize("kind", ["collective", "adversarial"])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("failing_layer", [0, 2, 5])
def test_an_exception_in_one_ranks_backward_neither_hangs_nor_mixes_buckets(
    world_size: int, kind: str, failing_layer: int
) -> None:
    """Unfinished rounds were once reset, not completed, so one rank's old bucket was reduced with another's new one. A
    hook that waited for staging while a peer was in the user's own all-reduce was a deadlock.
    """
    results = on_ranks(world_size, train_with_a_failing_backward, kind, failing_layer)
    steps = [plain_loss(step) if step not in (0, 3) else (lambda model, rank: None) for step in range(6)]
    assert_all_close(results, expect(world_size, steps))


def train_and_skip(kind: str, slow_rank: int) -> list[Tensor]:
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=BUCKET_MB, transport=connect(kind))
    for step in range(6):
        loss = plain_loss(step)(model, rank)
        if rank == slow_rank:
            time.sleep(0.03)
        loss.backward()
        if step in (1, 2):
            optimizer.zero_grad()
            continue
        optimizer.step()
        optimizer.zero_grad()
    return clone(model.parameters())


@pytest.mark.parametrize("kind", ["collective", "adversarial"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_batch_skipped_after_backward_leaves_no_gradient(world_size: int, kind: str) -> None:
    results = on_ranks(world_size, train_and_skip, kind, 0)
    steps = [plain_loss(step) if step not in (1, 2) else (lambda model, rank: None) for step in range(6)]
    assert_all_close(results, expect(world_size, steps))


def train_with_rank_dependent_graphs(kind: str) -> tuple[list[Tensor], list[int]]:
    """Each rank uses different branches in a different order."""
    rank, world_size = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=BUCKET_MB, transport=connect(kind))
    for step in range(6):
        branching_loss(step, world_size)(model, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return clone(model.parameters()), list(optimizer._engine.reducer.order)


def branching_loss(step: int, world_size: int) -> Callable[[nn.Sequential, int], Tensor]:
    def loss_of(model: nn.Sequential, rank: int) -> Tensor:
        x = batch(step, rank)
        layers = [layer for index, layer in enumerate(model) if (index + step) % world_size != rank or world_size == 1]
        layers = layers[::-1] if (rank + step) % 2 else layers
        for layer in layers:
            x = layer(x)
        return x.square().mean()

    return loss_of


@pytest.mark.parametrize("kind", ["collective", "adversarial"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_with_different_graphs_reduce_the_same_buckets_together(world_size: int, kind: str) -> None:
    """If ranks left different parameters unused, different buckets of equal size were once silently summed."""
    results = on_ranks(world_size, train_with_rank_dependent_graphs, kind)
    expected = expect(world_size, [branching_loss(step, world_size) for step in range(6)])
    if world_size == 3:
        for parameters, _ in results:
            for a, b in zip(parameters, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    else:
        assert_all_close([parameters for parameters, _ in results], expected)
    assert all(order == results[0][1] for _, order in results)


def learned_order() -> tuple[list[int], list[int]]:
    """Run layers in the reverse of their registration, so backward completes buckets from the last to the first."""
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=BUCKET_MB)
    before = list(optimizer._engine.reducer.order)
    x = batch(0, rank)
    for layer in model if rank else reversed(model):  # all ranks must learn rank 0's order
        x = layer(x)
    x.square().mean().backward()
    optimizer.step()
    return before, list(optimizer._engine.reducer.order)


def test_all_ranks_launch_in_the_order_in_which_rank_0_completed_buckets() -> None:
    for before, after in on_ranks(2, learned_order):
        assert before == sorted(before)
        assert after == before[::-1]


def test_the_recorded_completion_order_does_not_grow_with_every_step() -> None:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=BUCKET_MB, transport=connect("adversarial"))
    for step in range(4):
        plain_loss(step)(model, 0).backward()
        optimizer.step()
    assert optimizer._engine.reducer._completed == optimizer._engine.reducer.order  # type: ignore[attr-defined]


class Blocks(nn.Module):
    """Blocks, one of which is used twice, with or without activation checkpointing."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(16, 1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, self.blocks[1]]:
            x = block(x) if self.how == "plain" else checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return self.head(x)


def train_checkpointed(how: str, kind: str, accumulate: int) -> list[Tensor]:
    rank, _ = rank_and_size()
    model = Blocks(how)
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=BUCKET_MB, transport=connect(kind))
    for step in range(6):
        for micro in range(accumulate):
            model(batch(step + 100 * micro, rank).requires_grad_()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return clone(model.parameters())


@pytest.mark.sweep(5)
@pytest.mark.parametrize("kind", ["collective", "adversarial"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("how", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_activation_checkpointing_changes_no_result(world_size: int, how: str, accumulate: int, kind: str) -> None:
    checkpointed = on_ranks(world_size, train_checkpointed, how, kind, accumulate)
    plain = on_ranks(world_size, train_checkpointed, "plain", kind, accumulate)
    for one, other in zip(checkpointed, plain, strict=True):
        for a, b in zip(one, other, strict=True):
            # Under reentrant checkpointing a parameter used twice is reduced in two parts, which round differently.
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def rounds_of_reentrant_checkpointing() -> tuple[int, bool]:
    model = Blocks("reentrant")
    model.blocks[1] = nn.Tanh()  # no block is used twice
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=BUCKET_MB, transport=connect("adversarial"))
    launches: list[int] = []
    launch = optimizer._engine.reducer._launch
    optimizer._engine.reducer._launch = lambda index, *rest, **kw: (launches.append(index), launch(index, *rest, **kw))  # type: ignore
    model(batch(0, 0).requires_grad_()).square().mean().backward()
    return len(launches), len(launches) == len(optimizer._engine.parameters.buckets)


def test_a_nested_backward_does_not_end_the_round_of_the_outer_one() -> None:
    """Every inner backward of reentrant checkpointing runs end-of-backward callbacks of its own."""
    assert rounds_of_reentrant_checkpointing()[1]


def mixed_accumulation(kind: str) -> tuple[list[Tensor], list[bool]]:
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=BUCKET_MB, transport=connect(kind))
    gradients_left = []
    for step in range(4):
        plain_loss(10 * step)(model, rank).backward()
        with optimizer.no_sync():
            plain_loss(10 * step + 1)(model, rank).backward()
            plain_loss(10 * step + 2)(model, rank).backward()
        gradients_left.append(all(parameter.grad is not None for parameter in model.parameters()))
        if step % 2:  # in other steps step() itself reduces the gradients of no_sync
            plain_loss(10 * step + 3)(model, rank).backward()
        optimizer.step()
        gradients_left.append(any(parameter.grad is not None for parameter in model.parameters()))
    return clone(model.parameters()), gradients_left


@pytest.mark.parametrize("kind", ["collective", "adversarial"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_synchronised_and_local_accumulation_add_up(world_size: int, kind: str) -> None:
    def loss_of(step: int) -> Callable[[nn.Sequential, int], Tensor]:
        micros = range(4 if step % 2 else 3)
        return lambda model, rank: sum(plain_loss(10 * step + micro)(model, rank) for micro in micros)

    results = on_ranks(world_size, mixed_accumulation, kind)
    assert_all_close(
        [parameters for parameters, _ in results], expect(world_size, [loss_of(step) for step in range(4)])
    )
    assert all(left == [True, False] * 4 for _, left in results)


def gradients_by_hand(gradient_sync: str) -> list[Tensor]:
    rank, world_size = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=BUCKET_MB, gradient_sync=gradient_sync)
    for step in range(3):
        total = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for peer in range(world_size):
            gradients = torch.autograd.grad(plain_loss(step)(model, peer), list(model.parameters()))
            if gradient_sync == "external":
                total = [a + b / world_size for a, b in zip(total, gradients, strict=True)]
            elif peer == rank:
                total = list(gradients)
        for parameter, gradient in zip(model.parameters(), total, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    return clone(model.parameters())


@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_written_by_hand_are_reduced(world_size: int, gradient_sync: str) -> None:
    results = on_ranks(world_size, gradients_by_hand, gradient_sync)
    assert_all_close(results, expect(world_size, [plain_loss(step) for step in range(3)]))


def train_under_ddp(max_grad_norm: float | None) -> list[Tensor]:
    rank, _ = rank_and_size()
    model = build_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = ShardedAdamW(
        model.parameters(), lr=LR, bucket_mb=BUCKET_MB, gradient_sync="external", max_grad_norm=max_grad_norm
    )
    for step in range(5):
        wrapped(batch(step, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return clone(model.parameters())


@pytest.mark.parametrize("world_size", [2, 4])
def test_external_gradients_of_ddp_are_used_as_averages(world_size: int) -> None:
    results = on_ranks(world_size, train_under_ddp, None)
    assert_all_close(results, expect(world_size, [plain_loss(step) for step in range(5)]))


def grow_and_shrink() -> tuple[int, int, int]:
    """Rank 0 sleeps before its backward, so rank 1 runs ahead."""
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=BUCKET_MB)
    loss = plain_loss(0)(model, rank)
    dist.barrier()
    if rank == 0:
        time.sleep(0.5)
    loss.backward()
    one = optimizer._engine.transport.allocate_staging(
        optimizer._engine.parameters.buckets[0].numel, torch.float32, torch.device("cpu")
    )
    during = optimizer.memory().staging
    optimizer.step()
    return during, optimizer.memory().staging, one.nbytes


def test_staging_grows_instead_of_waiting_for_a_slow_peer_and_shrinks_after_the_step() -> None:
    (_, after_0, one), (ahead, after_1, _) = on_ranks(2, grow_and_shrink)
    assert ahead > StagingPool.SIZE * one
    assert after_0 <= StagingPool.SIZE * one and after_1 <= StagingPool.SIZE * one


def gradient_of_a_split_parameter(how: str) -> Tensor | None:
    """The second layer is used twice and lies in several buckets; it shares the last one with the first layer."""
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    first, second = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
    optimizer = ShardedAdamW([*first.parameters(), *second.parameters()], bucket_mb=3072 / 2**20)
    assert len(optimizer._engine.parameters.params[0].buckets) > 1
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    for layer in (first, second, second):
        x = layer(x) if how == "plain" else checkpoint(layer, x, use_reentrant=True)
    x.square().mean().backward()
    return optimizer.full_grad(second.weight)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_gradient_of_a_split_parameter_reaches_all_its_buckets(world_size: int) -> None:
    """Its first bucket had already been launched when the second gradient came, so only its other buckets got that."""
    plain = on_ranks(world_size, gradient_of_a_split_parameter, "plain")
    checkpointed = on_ranks(world_size, gradient_of_a_split_parameter, "reentrant")
    for a, b in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def train_with_a_failing_forward() -> list[Tensor]:
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=BUCKET_MB)
    for step in range(5):
        succeeded = torch.ones(())
        try:
            if step in (1, 2) and rank == 0:
                raise MemoryError
            plain_loss(step)(model, rank).backward()
        except MemoryError:
            succeeded.zero_()
        dist.all_reduce(succeeded, op=dist.ReduceOp.MIN)
        if succeeded:
            optimizer.step()
        optimizer.zero_grad()
    return clone(model.parameters())


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_that_never_reached_backward_joins_the_missed_rounds(world_size: int) -> None:
    """The rank had begun no round, so its next round was once matched with the previous one of its peers."""
    results = on_ranks(world_size, train_with_a_failing_forward)
    steps = [plain_loss(step) if step not in (1, 2) else (lambda model, rank: None) for step in range(5)]
    assert_all_close(results, expect(world_size, steps))


def train_with_rounds_that_stop_at_different_places() -> list[Tensor]:
    """In a second backward of one step, rank 0 stops at its first gradient and the others do not start."""
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=BUCKET_MB)
    for step in range(4):
        plain_loss(step)(model, rank).backward()
        if step == 1:
            optimizer.zero_grad()
            plain_loss(step)(model, rank).backward()
            if rank == 0:
                exploding = Explode.apply(model[1:](batch(step, rank))).mean()
                with pytest.raises(ArithmeticError):
                    (exploding + model[0][0].bias.sum()).backward()  # backward begins with what forward computed last
        else:
            optimizer.step()
        optimizer.zero_grad()
    return clone(model.parameters())


def test_ranks_that_stopped_in_different_rounds_are_in_the_same_round_after_zero_grad() -> None:
    """An open round without a launched bucket was not counted when ranks compared their rounds."""
    results = on_ranks(2, train_with_rounds_that_stop_at_different_places)
    steps = [plain_loss(step) if step != 1 else (lambda model, rank: None) for step in range(4)]
    assert_all_close(results, expect(2, steps))


def call_full_grad_between_backwards(gradient_sync: str) -> tuple[list[float], Tensor]:
    rank, world_size = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=BUCKET_MB, gradient_sync=gradient_sync)
    weight = model[0][0].weight
    ranks = range(world_size) if gradient_sync == "external" else [rank]
    norms = []
    for scale in (1.0, 10.0, 100.0):  # a batch is skipped for its norm
        sum(plain_loss(0)(model, r) * scale / len(ranks) for r in ranks).backward()
        norms.append(float(optimizer.clip_grad_norm_(1.0)))
        optimizer.zero_grad() if gradient_sync == "backward" else model.zero_grad()
    for micro in range(2):
        sum(plain_loss(micro)(model, r) / len(ranks) for r in ranks).backward()
        optimizer.full_grad(weight)  # as for logging
    total = optimizer.full_grad(weight)
    assert total is not None
    optimizer.step()
    return [norm / norms[0] for norm in norms], total


@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_full_grad_before_a_further_backward_does_not_fix_the_gradients_of_the_step(
    world_size: int, gradient_sync: str
) -> None:
    """With "step" and "external", step() once used the gradients of the first full_grad() and ignored later ones."""
    model = build_model()
    for rank in range(world_size):
        sum(plain_loss(micro)(model, rank) for micro in range(2)).div(world_size).backward()
    for norms, total in on_ranks(world_size, call_full_grad_between_backwards, gradient_sync):
        assert norms == pytest.approx([1.0, 10.0, 100.0], rel=1e-4)
        torch.testing.assert_close(total, model[0][0].weight.grad, rtol=1e-5, atol=1e-8)


def launches_with_an_unused_parameter() -> tuple[int, int]:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=BUCKET_MB, transport=connect("adversarial"))
    model[:5](batch(0, 0)).square().mean().backward()  # the last layer gets no gradient
    return sum(optimizer._engine.reducer._launches), len(optimizer._engine.parameters.buckets)  # type: ignore[attr-defined]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_end_of_backward_launches_buckets_with_missing_gradients(world_size: int) -> None:
    for launched, buckets in on_ranks(world_size, launches_with_an_unused_parameter):
        assert launched == buckets


def step_with_a_sum_that_overflows(gradient_sync: str) -> tuple[Tensor, int]:
    parameter = nn.Parameter(torch.zeros(64))
    optimizer = ShardedAdamW([parameter], lr=LR, gradient_sync=gradient_sync)
    (parameter * 3e38).sum().backward()  # the sum over two ranks is infinite, and so would be the moments
    optimizer.step()
    return parameter.detach().clone(), int(optimizer.skipped_steps)


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
def test_finite_gradients_whose_sum_overflows_are_skipped(gradient_sync: str) -> None:
    """Gradients in bucket views are checked on each rank, before they are summed."""
    for parameter, skipped in on_ranks(2, step_with_a_sum_that_overflows, gradient_sync):
        assert torch.equal(parameter, torch.zeros(64)) and skipped == 1


def reduce_twice_a_gradient_in_anothers_view() -> tuple[float, float]:
    rank, _ = rank_and_size()
    first, second = (nn.Parameter(torch.zeros(64)) for _ in range(2))
    optimizer = ShardedAdamW([first, second], gradient_sync="step")
    (first.sum() + 3 * (rank + 1) * second.sum()).backward()
    first.grad, second.grad = second.grad, None
    norm = float(optimizer.clip_grad_norm_(1e9))
    gradient = optimizer.full_grad(first)
    assert gradient is not None
    return norm, float(gradient.mean())


def test_a_gradient_in_another_parameters_bucket_view_survives_a_second_reduction() -> None:
    """The first reduction once zeroed that view, and the second one took the zeros for a new gradient."""
    for norm, mean in on_ranks(2, reduce_twice_a_gradient_in_anothers_view):
        assert (norm, mean) == (36.0, 4.5)


@pytest.mark.parametrize("gradient_sync", ["step", "external"])
def test_a_refused_gradient_is_refused_again(gradient_sync: str) -> None:
    """With "external" the second step() did not raise and used stale gradient shards."""
    embedding = nn.Embedding(8, 4, sparse=True)
    optimizer = ShardedAdamW(embedding.parameters(), gradient_sync=gradient_sync)
    embedding(torch.tensor([1, 2])).sum().backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sparse gradient"):
            optimizer.step()


def refuse_on_rank_0(gradient_sync: str, transport: str) -> tuple[str, Tensor]:
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = ShardedAdamW(model.parameters(), lr=LR, gradient_sync=gradient_sync, transport=transport)
    model(torch.ones(2, 8)).sum().backward()
    if rank == 0:
        model.weight.grad = torch.ones(4, 8).to_sparse()
    with pytest.raises(ValueError, match="sparse gradient") as refused:
        optimizer.step()
    optimizer.zero_grad()
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return str(refused.value), clone(model.parameters())[0]


@pytest.mark.parametrize(("gradient_sync", "transport"), [("step", "shared_memory"), ("step", "collective")])
def test_a_gradient_refused_on_one_rank_raises_on_all(gradient_sync: str, transport: str) -> None:
    """Over shared memory rank 0 once raised alone, and its next step went with its peer's first."""
    (_, first), (_, second) = on_ranks(2, refuse_on_rank_0, gradient_sync, transport, deadline_s=30.0)
    assert torch.equal(first, second)


class Tagged(torch.autograd.Function):
    """The identity; its node holds ``tag``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tag: object) -> Tensor:
        ctx.tag = tag
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def test_gradients_taken_out_of_p_grad_do_not_keep_their_graph() -> None:
    model = nn.Linear(8, 4)
    optimizer = ShardedAdamW(model.parameters(), lr=LR)
    tag = nn.Module()
    alive = weakref.ref(tag)
    loss = Tagged.apply(model(torch.ones(2, 8)), tag).square().sum()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of create_graph
        loss.backward(create_graph=True)
    del loss, tag
    assert alive() is None
    optimizer.step()


def test_a_gradient_written_after_clipping_is_an_error_on_one_rank() -> None:
    """It was ignored without a word, as nothing was reduced after the clipping."""
    model = nn.Linear(8, 4)
    optimizer = ShardedAdamW(model.parameters(), lr=LR)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.clip_grad_norm_(1.0)
    model.weight.grad = torch.ones(4, 8)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"has a gradient in p\.grad although"):
            optimizer.step()


def call_full_grad_inside_no_sync() -> Tensor | None:
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), lr=LR, bucket_mb=BUCKET_MB)
    with optimizer.no_sync():
        plain_loss(0)(model, rank).backward()
        optimizer.clip_grad_norm_(1e9)
        plain_loss(1)(model, rank).backward()
    return optimizer.full_grad(model[0][0].weight)


def test_gradients_after_full_grad_inside_no_sync_are_added() -> None:
    model = build_model()
    (plain_loss(0)(model, 0) + plain_loss(1)(model, 0)).backward()
    torch.testing.assert_close(call_full_grad_inside_no_sync(), model[0][0].weight.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
def test_the_newest_optimizer_gets_the_gradients(gradient_sync: str) -> None:
    """An older optimizer that a scheduler still held once took the gradients, and the newer one did not train."""
    model = build_model()
    older = ShardedAdamW(model.parameters(), lr=LR)
    newer = ShardedAdamW(model.parameters(), lr=LR, gradient_sync=gradient_sync)
    plain_loss(0)(model, 0).backward()
    newer.step()
    assert_all_close([clone(model.parameters())], expect(1, [plain_loss(0)]))
    with pytest.raises(RuntimeError, match="Another optimizer has been built over this one's parameters"):
        older.step()


class Stream:
    """A stand-in for a CUDA stream."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_a_copy_waits_for_all_streams_of_its_gradients_and_they_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient freed after the copy returns to the stream that allocated it, which may overwrite it at once."""
    optimizer = ShardedAdamW(build_model().parameters(), transport=connect("adversarial"))
    reducer: Any = optimizer._engine.reducer
    log: list[str] = []
    current, side = Stream("current", log), Stream("side", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current)
    monkeypatch.setattr(backward_reducer, "copy_in", lambda *_: log.append("copy"))
    for streams in ({current, side}, {current}):
        opened = reducer._open_round()
        opened.streams = {0: streams}
        reducer._close_round()
        assert opened.streams == {}
    assert log == ["current waits for side", "copy", "side waits for current", "copy"]


def bucket_of_eight(transport: Transport) -> Any:
    """As much of a bucket as staging needs."""
    group = ShardGroup(transport, 1)
    shard = SimpleNamespace(gradient=torch.empty(8))
    arena = SimpleNamespace(gradient_scale=1.0, shard_group=group, transport=transport)
    options: Any = dict(wire_dtype=torch.float32, parameters=torch.empty(8), numel=8, shard=shard, arena=arena)
    return SimpleNamespace(**options)


class OnAStream(Finished):
    def __init__(self) -> None:
        self.waited_again = 0

    def wait_for_buffer(self) -> None:
        self.waited_again += 1


class OneTransfer(SingleProcessTransport):
    def __init__(self, transfer: Pending) -> None:
        self.transfer = transfer

    def reduce_scatter(self, *args: Any, **kwargs: Any) -> Pending:
        return self.transfer


def test_a_staging_buffer_is_refilled_only_after_its_last_transfer_in_the_same_step() -> None:
    """An earlier wait may have been on another stream. After the step there must be no wait, because CUDA graph capture
    forbids waiting for an event recorded before it.
    """
    transfer = OnAStream()
    pool = StagingPool()
    bucket = bucket_of_eight(OneTransfer(transfer))
    pool.reserve([bucket])
    send = partial(pool.reduce_scatter, bucket, accumulate=False, stats=GradStats(with_squares=False))
    send(pool.acquire(bucket, may_wait=False), gradient_shard(bucket))
    pool.wait_all()
    assert transfer.waited_again == 0
    staging = pool.acquire(bucket, may_wait=False)
    assert transfer.waited_again == 1
    send(staging, gradient_shard(bucket))
    pool.wait_all()
    pool.trim()
    assert pool.acquire(bucket, may_wait=False) is staging and transfer.waited_again == 1


def test_streams_wait_for_the_step_before_their_gradients_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank gradients are not copied: the update is the last to read them."""
    optimizer = ShardedAdamW(build_model().parameters())
    reducer: Any = optimizer._engine.reducer
    log: list[str] = []
    current, side = Stream("current", log), Stream("side", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current)
    reducer._streams = {torch.device("cpu"): {current, side}}
    reducer.reset()
    reducer.reset()
    assert log == ["side waits for current"]


def test_one_concatenation_fills_staging_as_copies_do() -> None:
    """On GPUs; here on the CPU. With padding after parameters and at the end, and an empty parameter."""
    random = torch.Generator().manual_seed(0)
    gradients = [torch.randn(numel, generator=random) for numel in (7, 0, 128, 40)]
    send, expected = torch.full((400,), float("nan")), torch.zeros(400)
    targets = [send[start : start + g.numel()] for start, g in zip((0, 128, 128, 256), gradients, strict=True)]
    for target, gradient in zip(targets, gradients, strict=True):
        expected[target.storage_offset() : target.storage_offset() + target.numel()] = gradient
    out = send[:384]
    copy_in._concatenate(targets[::-1], gradients[::-1], [send[7:128], send[296:384]], out=out)
    assert torch.equal(out, expected[:384]) and send[384:].isnan().all()


class BetweenHosts(Pending):
    """A transfer on a stream that reads its buffer long before its sum is there."""

    on_host = False

    def __init__(self, log: list[str], name: int) -> None:
        self.log, self.name = log, name

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        self.log.append(f"sum {self.name}")

    def wait_for_buffer(self) -> None:
        self.log.append(f"buffer {self.name}")


def test_a_bucket_on_streams_waits_for_a_buffer_not_for_a_sum() -> None:
    """With hybrid sharding, buffers were kept until the all-reduce between hosts was over."""
    log: list[str] = []
    pool = StagingPool()
    transport = OneTransfer(Finished())
    bucket = bucket_of_eight(transport)
    pool.reserve([bucket, bucket])
    for name in range(4):
        transport.transfer = BetweenHosts(log, name)
        staging = pool.acquire(bucket, may_wait=False)
        pool.reduce_scatter(
            bucket, staging, gradient_shard(bucket), accumulate=False, stats=GradStats(with_squares=False)
        )
    assert log == ["buffer 0", "buffer 1"] and len(list(pool.buffers())) == 2 and not pool.is_idle
    pool.wait_all()
    assert log[2:] == ["sum 0", "sum 1", "sum 2", "sum 3"] and pool.is_idle


def test_transfers_on_another_device_are_not_waited_for() -> None:
    """A hook that widens gradient shards must not wait for peers of parameters on the CPU."""
    log: list[str] = []
    pool = StagingPool()
    bucket = bucket_of_eight(OneTransfer(BetweenHosts(log, 0)))
    pool.reserve([bucket])
    staging = pool.acquire(bucket, may_wait=False)
    pool.reduce_scatter(bucket, staging, gradient_shard(bucket), accumulate=False, stats=GradStats(with_squares=False))
    pool.wait_for_device(torch.device("meta"))
    assert log == []
    pool.wait_for_device(torch.device("cpu"))
    assert log == ["sum 0"] and not pool.is_idle
