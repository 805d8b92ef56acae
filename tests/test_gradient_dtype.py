# SPDX-License-Identifier: Apache-2.0
"""``Precision(gradients=...)``: a bfloat16 gradient shard holds exact sums, rounded once in each round.

Gradients are such that sums of four ranks and of several rounds are exact in float32, so that one sum in float64,
rounded by ``nearest``, must be found bit for bit. A third of them makes ties.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardadam import Precision, ShardedAdamW
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.sums.stats import GradStats, are_finite, sum_of_squares
from shardadam.transport import NcclTransport, ReduceScatter, Transport, connect, nccl
from shardadam.transport.base import Finished, scale_for_mean_
from tests.ranks import on_ranks, rank_and_size
from tests.test_wire_sums import SumsOnTheWire

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((300,), (7, 40), (), (0,), (129,), (3, 4, 5, 2), (1000,))
BUCKET_MB = 0.001
BF16 = Precision(gradients="bf16")


def gradient_of(rank: int, index: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return numbers below 2^8 with 17 digits, or with those of a narrower ``dtype``; a third of the means are ties."""
    largest, unit = {torch.float32: (2**17, -9), torch.bfloat16: (2**8, -2), torch.float16: (2**11, -4)}[dtype]
    own = torch.Generator().manual_seed(100 * index + rank)
    found = torch.randint(-largest + 1, largest, tuple(shape), generator=own).double()
    found = torch.ldexp(found, unit - torch.randint(0, 3, tuple(shape), generator=own))
    common = torch.Generator().manual_seed(1000 + index)
    tie = torch.randint(2**7, 2**8, tuple(shape), generator=common).double() + 0.5  # 9 digits
    is_tie = torch.randint(0, 3, tuple(shape), generator=common) == 0
    if dtype == torch.bfloat16:  # 256 and 257 of them: ranks' means are ties
        tie = tie - 0.5 + rank % 2
    return torch.where(is_tie, tie, found).to(dtype)


def nearest(exact: Tensor) -> Tensor:
    """Return float64 ``exact`` rounded to the 8 digits of bfloat16, ties to even; without torch's conversion."""
    mantissa, exponent = torch.frexp(exact)
    return torch.ldexp(torch.round(torch.ldexp(mantissa, torch.tensor(8))), exponent - 8)


def reference(world_size: int, rounds: Sequence[Sequence[int]], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return what a whole bfloat16 gradient shard must hold after these rounds, as float64.

    Args:
        rounds: for each the backwards that accumulate in ``p.grad``, in ``dtype``.
    """
    shard = torch.zeros(tuple(shape), dtype=torch.float64)
    for backwards in rounds:
        of_ranks = []
        for rank in range(world_size):
            gradients = [gradient_of(rank, index, shape, dtype) for index in backwards]
            of_ranks.append(sum(gradients[1:], start=gradients[0]).double())
        exact = shard + sum(of_ranks[1:], start=of_ranks[0]) / world_size
        assert torch.equal(exact, exact.float().double()), "gradients must be such that float32 sums are exact"
        shard = nearest(exact)
    return shard


# Transports


def like_nccl(stack: ExitStack, *, exact_sums: bool) -> Transport:
    """Return ``NcclTransport`` on the CPU: without streams, over Gloo, with sums in the dtype that is sent."""

    def reduce_scatter(output: Tensor, send: Tensor, *, group: Any) -> None:
        sent = [torch.empty_like(send) for _ in range(dist.get_world_size(group))]
        kept = [send.clone().view(torch.uint8) for _ in sent]
        received = [torch.empty_like(each) for each in kept]
        dist.all_gather(received, kept[0], group=group)
        sent = [each.view(send.dtype) for each in received]
        total = sent[0].clone()
        for other in sent[1:]:
            total += other
        output.copy_(total.chunk(len(sent))[dist.get_rank(group)])

    inner: Any = connect(None, kind="collective")
    transport = NcclTransport(inner._comm_groups, exact_sums=exact_sums)
    stack.enter_context(mock.patch.object(transport._streams, "on", lambda device: nullcontext()))
    stack.enter_context(mock.patch.object(nccl, "OnStream", lambda stream: Finished()))
    stack.enter_context(mock.patch.object(nccl, "_reduce_scatter", reduce_scatter))
    return transport


def connected(kind: str, stack: ExitStack) -> Transport:
    if kind.startswith("nccl"):
        return like_nccl(stack, exact_sums=kind == "nccl, exact")
    if kind.startswith("hybrid"):
        within: Any = kind.partition(", ")[2]
        return connect(init_device_mesh("cpu", (2, 2)), kind=within)
    return connect(None, kind=kind)  # type: ignore[arg-type]


NUMEL = 2 * 4 * ALIGNMENT_NUMEL
ROUNDS = 3
LARGEST = 3.3999e38
"""Finite in float32; rounded to bfloat16, infinite."""


def reduce_rounds(kinds: Sequence[str]) -> dict[tuple[str, torch.dtype], tuple[int, list[Tensor], list[float], bool]]:
    """Reduce some rounds into a bfloat16 shard over each kind of transport, from each dtype on the wire.

    Returns:
        By kind and dtype: the position of this rank's shard among all; the shard after each round; the squared norms
        that were measured; and whether they find the sum ``LARGEST`` finite.
    """
    rank, _ = rank_and_size()
    found = {}
    for kind, dtype in itertools.product(kinds, DTYPES):
        with ExitStack() as stack:
            transport = connected(kind, stack)
            world_size = transport.world_size * transport.replicas
            scales = transport.scales_sums(torch.device("cpu"))
            shard = torch.full((NUMEL // transport.world_size,), float("nan"), dtype=torch.bfloat16)
            staging = transport.allocate_staging(NUMEL, dtype, torch.device("cpu"))

            def reduce(
                gradient: Tensor,
                *,
                scale: float,
                accumulate: bool,
                transport: Transport = transport,
                staging: Any = staging,
                shard: Tensor = shard,
                world_size: int = world_size,
            ) -> GradStats:
                stats = GradStats(with_squares=True)
                staging.send.copy_(gradient)
                if gradient.dtype == torch.float16:
                    scale = scale_for_mean_(staging.send, world_size)
                request = ReduceScatter(staging, NUMEL, shard, scale=scale, accumulate=accumulate, stats=stats)
                pending = transport.reduce_scatter(request)
                pending.wait()
                pending.await_release()
                return stats

            shards, squares = [], []
            is_sum = not scales and dtype != torch.float16
            for round in range(ROUNDS):
                gradient = gradient_of(rank, round, (NUMEL,), dtype)
                stats = reduce(gradient, scale=1 / world_size if scales else 1.0, accumulate=round > 0)
                shards.append(shard.double() / (world_size if is_sum else 1))
                squares.append(float(sum_of_squares([stats], shard.device)) / (world_size**2 if is_sum else 1))
            value = LARGEST if dtype == torch.float32 else 1.0
            stats = reduce(torch.full((NUMEL,), value / world_size, dtype=dtype), scale=1.0, accumulate=False)
            is_finite = bool(are_finite([stats], shard.device))
            found[kind, dtype] = (transport.rank, shards, squares, is_finite)
            transport.fence()
            transport.close(clean=True)
    return found


EXACT_KINDS = ["collective", "shared_memory", "nccl, exact"]


@pytest.mark.parametrize(
    ("world_size", "kinds"),
    [(2, [*EXACT_KINDS, "nccl"]), (4, [*EXACT_KINDS, "nccl", "hybrid, collective", "hybrid, shared_memory"])],
)
def test_a_bfloat16_shard_holds_exact_sums_rounded_once_a_round(world_size: int, kinds: list[str]) -> None:
    for found in on_ranks(world_size, reduce_rounds, kinds):
        for (kind, dtype), (index, shards, squares, is_finite) in found.items():
            assert is_finite == (dtype != torch.float32), (kind, dtype)
            for round, (shard, square) in enumerate(zip(shards, squares, strict=True)):
                # The statistics are those of what is stored.
                assert square == pytest.approx(float(shard.square().sum()), rel=1e-6), (kind, dtype)
                if kind == "nccl" and dtype != torch.float32:
                    continue  # NCCL itself rounds sums in the dtype on the wire
                whole = reference(world_size, [[index] for index in range(round + 1)], (NUMEL,), dtype)
                start = index * len(shard)
                assert torch.equal(shard, whole[start : start + len(shard)]), (kind, dtype, round)


# The optimizer


def build(dtype: torch.dtype, precision: Precision = BF16, **options: Any) -> tuple[list[nn.Parameter], ShardedAdamW]:
    random = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in SHAPES]
    options = {"lr": 1e-2, "bucket_mb": BUCKET_MB, **options}
    return parameters, ShardedAdamW(parameters, precision=precision, **options)


def backward(parameters: Sequence[Tensor], index: int) -> None:
    """Run a backward that makes this rank's ``gradient_of``, exactly."""
    rank, _ = rank_and_size()
    losses = [(p * gradient_of(rank, index, p.shape, p.dtype)).sum() for p in parameters]
    torch.autograd.backward(losses)


def shard_dtypes(optimizer: ShardedAdamW) -> set[torch.dtype | None]:
    shards = [arena.gradient_shard for arena in optimizer._engine.parameters.arenas]
    return {None if shard is None else shard.dtype for shard in shards}


def full_grads(optimizer: ShardedAdamW, parameters: Sequence[Tensor]) -> list[Tensor]:
    found = [optimizer.full_grad(parameter) for parameter in parameters]
    return [gradient.double() for gradient in found if gradient is not None]


def train(dtype: torch.dtype, gradient_sync: str, transport: str, rounds: int, local: int) -> dict[str, Any]:
    """Take two steps of ``rounds`` backwards, of which the first ``local`` are in ``no_sync``."""
    parameters, optimizer = build(dtype, gradient_sync=gradient_sync, transport=transport)
    assert shard_dtypes(optimizer) <= {torch.bfloat16, None}
    found: dict[str, Any] = {"gradients": [], "parameters": []}
    for step in range(2):
        for round in range(rounds):
            context: AbstractContextManager[None] = optimizer.no_sync() if round < local else nullcontext()
            with context:
                backward(parameters, 10 * step + round)
        found["gradients"].append(full_grads(optimizer, parameters))
        found["dtypes"] = shard_dtypes(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        found["parameters"].append([parameter.detach().clone() for parameter in parameters])
    found["exp_avg"] = [optimizer.full_state(parameter)["exp_avg"] for parameter in parameters]
    return found


def trained_by_torch(dtype: torch.dtype, gradients: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Take a step of torch's AdamW in float32 with each list of gradients.

    Returns:
        The parameters after each step, rounded to ``dtype``, and exp_avg after the last one.
    """
    parameters, _ = build(dtype)
    exact = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    optimizer = torch.optim.AdamW(exact, lr=1e-2)
    found = []
    for of_step in gradients:
        for parameter, gradient in zip(exact, of_step, strict=True):
            parameter.grad = gradient.float()
        optimizer.step()
        found.append([parameter.detach().clone().to(dtype) for parameter in exact])
    return found, [optimizer.state[parameter]["exp_avg"] for parameter in exact]


@pytest.mark.sweep(12)
@pytest.mark.parametrize(
    ("world_size", "transport", "gradient_sync", "dtype", "rounds", "local"),
    [
        (world_size, transport, gradient_sync, dtype, rounds, local)
        for world_size in (2, 4)
        for transport in ("shared_memory", "collective")
        for dtype in DTYPES
        for gradient_sync, rounds, local in (
            ("backward", 1, 0),
            ("backward", 3, 0),
            ("backward", 3, 1),
            ("step", 1, 0),
            ("step", 2, 0),
        )
    ],
)
def test_steps_use_sums_that_are_rounded_once_a_round(
    world_size: int, transport: str, gradient_sync: str, dtype: torch.dtype, rounds: int, local: int
) -> None:
    expected = []
    for step in range(2):
        backwards = [10 * step + round for round in range(rounds)]
        in_grad = rounds if gradient_sync == "step" else local + 1
        of_step = [backwards[:in_grad], *([index] for index in backwards[in_grad:])]
        expected.append([reference(world_size, of_step, shape, dtype) for shape in SHAPES])
    by_torch, exp_avg = trained_by_torch(dtype, expected)
    for found in on_ranks(world_size, train, dtype, gradient_sync, transport, rounds, local):
        assert found["dtypes"] == {torch.bfloat16}
        for ours, truth in zip(found["gradients"], expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
        for ours, truth in zip(found["parameters"], by_torch, strict=True):
            for a, b in zip(ours, truth, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=1e-7)
        for a, b in zip(found["exp_avg"], exp_avg, strict=True):
            # Gradients are in the hundreds, and some of those of the two steps cancel out.
            largest = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * largest)


def read_without_a_shard(gradient_sync: str) -> tuple[set[Any], list[Tensor], int]:
    parameters, optimizer = build(torch.float32, gradient_sync=gradient_sync)
    backward(parameters, 0)
    optimizer.step()
    exp_avg = [optimizer.full_state(parameter)["exp_avg"] for parameter in parameters]
    return shard_dtypes(optimizer), exp_avg, optimizer.memory().gradient_shard


@pytest.mark.parametrize(
    ("world_size", "gradient_sync"), [(1, "backward"), (1, "step"), (1, "external"), (2, "step"), (4, "step")]
)
def test_gradients_that_the_update_reads_without_a_shard_are_not_rounded(world_size: int, gradient_sync: str) -> None:
    means = [
        sum(gradient_of(rank, 0, shape, torch.float32) for rank in range(world_size)) / world_size for shape in SHAPES
    ]
    for dtypes, exp_avg, nbytes in on_ranks(world_size, read_without_a_shard, gradient_sync):
        assert dtypes == {None} and nbytes == 0
        for found, mean in zip(exp_avg, means, strict=True):
            torch.testing.assert_close(found, 0.1 * mean, rtol=1e-6, atol=1e-6)  # type: ignore[operator]


def train_in_backward(transport: str, gradients: Any, update: Any) -> tuple[list[Tensor], int, int]:
    """Return parameters and moments after three steps, and the bytes of gradient shards before and after a backward."""
    precision = Precision(gradients=gradients)
    parameters, optimizer = build(torch.float32, precision, transport=transport, update=update)
    before = optimizer.memory().gradient_shard
    for step in range(3):
        backward(parameters, step)
        optimizer.step()
        optimizer.zero_grad()
    moments = [optimizer.full_state(parameter)["exp_avg"] for parameter in parameters]
    found = [*(parameter.detach().clone() for parameter in parameters), *moments]
    return found, before, optimizer.memory().gradient_shard


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
def test_updates_in_backward_read_bfloat16_shards(transport: str) -> None:
    expected, *_ = on_ranks(2, train_in_backward, transport, "bf16", "step")[0]
    rounded = on_ranks(2, train_in_backward, transport, "bf16", "backward")
    exact = on_ranks(2, train_in_backward, transport, "auto", "backward")
    for (found, *nbytes), (other, *twice) in zip(rounded, exact, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
        assert [2 * n for n in nbytes] == twice and min(nbytes) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_one_rank_a_second_backward_is_added_to_a_bfloat16_shard(dtype: torch.dtype) -> None:
    parameters, optimizer = build(dtype)
    for step in range(2):
        for round in range(3):
            backward(parameters, 10 * step + round)
            assert shard_dtypes(optimizer) == {torch.bfloat16 if round or step else None}
        expected = [reference(1, [[10 * step + r] for r in range(3)], shape, dtype) for shape in SHAPES]
        for ours, truth in zip(full_grads(optimizer, parameters), expected, strict=True):
            assert torch.equal(ours, truth)
        optimizer.step()
        optimizer.zero_grad()


# Clipping


def clip(way: str, gradient_sync: str) -> tuple[list[Tensor], float, set[Any]]:
    max_norm = 10.0 if way == "max_grad_norm" else None
    parameters, optimizer = build(torch.float32, gradient_sync=gradient_sync, max_grad_norm=max_norm)
    backward(parameters, 0)
    norm: Any = 0.0
    if way == "value":
        optimizer.clip_grad_value_(20.7)
    elif way == "some":
        norm = optimizer.clip_grad_norm_(10.0, parameters=[parameters[0], parameters[1]])
    elif way == "3-norm":
        norm = optimizer.clip_grad_norm_(10.0, norm_type=3.0)
    elif way == "2-norm":
        norm = optimizer.clip_grad_norm_(10.0)
    gradients = [] if way == "max_grad_norm" else full_grads(optimizer, parameters)
    optimizer.step()
    if way == "max_grad_norm":
        norm = optimizer.grad_norm
    return gradients, float(norm), shard_dtypes(optimizer)


@pytest.mark.parametrize("way", ["value", "some", "3-norm", "2-norm", "max_grad_norm"])
@pytest.mark.parametrize(
    ("world_size", "gradient_sync"), [(1, "backward"), (1, "external"), (2, "backward"), (2, "step")]
)
def test_clipping_works_on_bfloat16_shards(world_size: int, gradient_sync: str, way: str) -> None:
    is_scattered = world_size == 1 and way in ("2-norm", "max_grad_norm")  # the norm is measured where gradients lie
    exact = [
        sum(gradient_of(rank, 0, shape, torch.float32).double() for rank in range(world_size)) / world_size
        for shape in SHAPES
    ]
    shards = [nearest(one) for one in exact]  # type: ignore[arg-type]
    measured: Any = (exact if is_scattered else shards)[: 2 if way == "some" else None]
    flat = torch.cat([one.flatten() for one in measured])
    expected_norm = float(torch.linalg.vector_norm(flat, 3.0 if way == "3-norm" else 2.0))
    for gradients, norm, dtypes in on_ranks(world_size, clip, way, gradient_sync):
        assert dtypes == {None if is_scattered and way == "max_grad_norm" else torch.bfloat16}
        if way != "value":
            assert norm == pytest.approx(expected_norm, rel=1e-6)
        if way == "max_grad_norm":
            continue
        coefficient = torch.tensor(10.0) / (torch.tensor(norm) + 1e-6)  # float32, as the optimizer's
        for index, (found, shard) in enumerate(zip(gradients, shards, strict=True)):
            if way == "value":
                limit = float(nearest(torch.tensor(20.7, dtype=torch.float64)))
                assert torch.equal(found, shard.clamp(-limit, limit))
            elif way == "some":
                scaled = shard.float() * coefficient
                assert torch.equal(found, nearest(scaled.double()) if index < 2 else shard)
            else:
                torch.testing.assert_close(found, (shard.float() * coefficient).double(), rtol=2e-7, atol=0.0)


def skipped_after_overflow(precision: Precision) -> int:
    """Return the skipped steps after two backwards whose means are 1.69995e38 each."""
    rank, _ = rank_and_size()
    parameters, optimizer = build(torch.float32, precision)
    for _ in range(2):
        (parameters[0] * (LARGEST if rank == 0 else 0.0)).sum().backward()
    optimizer.step()
    return int(optimizer.skipped_steps)


def test_a_sum_that_only_float32_can_hold_skips_the_step() -> None:
    assert on_ranks(2, skipped_after_overflow, Precision()) == [0, 0]
    assert on_ranks(2, skipped_after_overflow, BF16) == [1, 1]


# Sums on the wire


def dtypes_over_the_wire(gradients: Any) -> list[set[Any]]:
    transport: Any = SumsOnTheWire(connect(None, kind="collective"))
    parameters, optimizer = build(torch.bfloat16, Precision(gradients=gradients), transport=transport)
    found = []
    for step in range(2):
        backward(parameters, step)
        found.append(shard_dtypes(optimizer))
        if step == 0:
            backward(parameters, 5)
            found.append(shard_dtypes(optimizer))
        else:
            optimizer.clip_grad_value_(1.0)
            found.append(shard_dtypes(optimizer))
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_only_auto_shards_become_exact_when_rounds_or_writes_need_it() -> None:
    low, high = {torch.bfloat16}, {torch.float32}
    for gradients, expected in (("auto", [low, high, high, high]), ("fp32", [high] * 4), ("bf16", [low] * 4)):
        for found in on_ranks(2, dtypes_over_the_wire, gradients):
            assert found == expected, gradients


# Arguments


def test_only_known_formats_are_taken() -> None:
    with pytest.raises(
        ValueError, match=r"Precision.gradients: found 'fp16', expected one of \('auto', 'fp32', 'bf16'\)"
    ):
        Precision(gradients="fp16")  # type: ignore[arg-type]


def test_float64_parameters_have_exact_gradient_shards() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"'weight' is float64, .* with Precision\(gradients='bf16'\)\. Convert it"):
        ShardedAdamW([("weight", parameter)], precision=BF16)
    optimizer = ShardedAdamW([("weight", parameter)], precision=Precision(gradients="fp32"))
    parameter.sum().backward()
    parameter.sum().backward()
    assert shard_dtypes(optimizer) == {torch.float64}


def build_differently() -> str:
    rank, _ = rank_and_size()
    try:
        build(torch.float32, Precision(gradients="bf16" if rank else "auto"))
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_must_agree_on_the_format() -> None:
    for message in on_ranks(2, build_differently):
        assert "precision" in message and "gradients='bf16'" in message
