# SPDX-License-Identifier: Apache-2.0
"""Gradient shards as NCCL leaves them: sums, not means, in the dtype on the wire, until several rounds are added up.

A transport on the CPU does what NCCL does: it sums in the dtype on the wire, writes the sum to the shard and leaves the
division by the number of ranks to whoever reads it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shardadam import GradScaler, Precision, ShardedAdamW
from shardadam.transport import (
    ByDeviceTransport,
    NcclTransport,
    Pending,
    ReduceScatter,
    SharedMemoryTransport,
    Transport,
    connect,
)
from tests.adversarial import AdversarialTransport
from tests.ranks import on_ranks, rank_and_size

WAYS = (
    "plain",
    "clipped",
    "clip_grad_norm_",
    "clip_grad_value_",
    "inf-norm",
    "some",
    "rounds",
    "no_sync",
    "scaler",
    "rescale",
)


class SumsOnTheWire(AdversarialTransport):
    """Runs transfers when they are waited for, and sums like NCCL."""

    def sum_dtype(self, wire_dtype: torch.dtype, exact_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return wire_dtype

    def scales_sums(self, device: torch.device) -> bool:
        return False

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        assert request.scale == 1
        return super().reduce_scatter(request)


def train(dtype: torch.dtype, gradient_sync: str, way: str, like_nccl: bool) -> dict[str, Any]:
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 7), nn.Linear(7, 90)).to(dtype)
    inner = connect(None, kind="collective")
    options: Any = dict(lr=1e-3, gradient_sync=gradient_sync, bucket_mb=0.003)
    options["transport"] = SumsOnTheWire(inner) if like_nccl else inner
    if way == "clipped":
        options["max_grad_norm"] = 0.05
    optimizer = ShardedAdamW(model.named_parameters(), **options)
    scaler = GradScaler("cpu", init_scale=64.0, enabled=way == "scaler")
    found: dict[str, Any] = {"norms": [], "gradients": [], "dtypes": []}
    for step in range(4):
        for micro in range(3 if way in ("rounds", "no_sync") else 1):
            random = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
            loss = model(torch.randn(8, 20, generator=random).to(dtype)).float().square().mean()
            if way == "no_sync" and micro < 2:
                with optimizer.no_sync():
                    loss.backward()
            else:
                scaler.scale(loss).backward()
        found["dtypes"].append({arena.gradient_shard.dtype for arena in optimizer._engine.parameters.arenas})
        scaler.unscale_(optimizer) if way == "scaler" else None
        found["norms"] += optimizer.gradient_norms().parameters.values()
        if way == "clip_grad_norm_":
            found["norms"].append(optimizer.clip_grad_norm_(0.05))
        elif way == "clip_grad_value_":
            optimizer.clip_grad_value_(1e-3)
        elif way == "inf-norm":
            found["norms"].append(optimizer.clip_grad_norm_(1e-3, norm_type=float("inf")))
        elif way == "some":
            found["norms"].append(optimizer.clip_grad_norm_(0.01, parameters=model[2].parameters()))
        found["gradients"].append(optimizer.full_grad(model[2].weight))
        scaler.step(optimizer)
        scaler.update()
        found["norms"].append(optimizer.grad_norm)
        optimizer.zero_grad()
    found["parameters"] = [parameter.detach().clone() for parameter in model.parameters()]
    return found


CASES = [
    (world_size, gradient_sync, way, dtype)
    for world_size in (2, 3)
    for gradient_sync in ("backward", "step")
    for way in WAYS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if (gradient_sync, way, dtype) != ("step", "scaler", torch.float16)  # refused, as torch does: gradients in float16
]


@pytest.mark.parametrize("way", WAYS)
def test_sums_on_the_wire_train_as_means_in_shards_in_every_way(way: str) -> None:
    check_sums_on_the_wire(3, "backward", way, torch.float32)


@pytest.mark.sweep(5)
@pytest.mark.parametrize(("world_size", "gradient_sync", "way", "dtype"), CASES)
def test_sums_on_the_wire_train_as_means_in_shards(
    world_size: int, gradient_sync: str, way: str, dtype: torch.dtype
) -> None:
    check_sums_on_the_wire(world_size, gradient_sync, way, dtype)


def check_sums_on_the_wire(world_size: int, gradient_sync: str, way: str, dtype: torch.dtype) -> None:
    means = on_ranks(world_size, train, dtype, gradient_sync, way, False)[0]
    # Sums of bfloat16 and float16 are rounded on the wire.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for found in on_ranks(world_size, train, dtype, gradient_sync, way, True):
        for norm, expected in zip(found["norms"], means["norms"], strict=True):
            assert (norm is None) == (expected is None)
            if norm is not None:
                torch.testing.assert_close(norm, expected, rtol=tolerance, atol=0.0)
        for gradient, expected in zip(found["gradients"], means["gradients"], strict=True):
            largest = float(expected.abs().max())
            torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance * largest)
        for parameter, expected in zip(found["parameters"], means["parameters"], strict=True):
            atol = 1e-4 if dtype != torch.float32 else 1e-6  # a tenth and a thousandth of lr
            torch.testing.assert_close(parameter, expected, rtol=tolerance, atol=atol)


def test_gradient_shards_have_the_wires_dtype_until_rounds_or_writes_need_more() -> None:
    for way, before, after in (
        ("plain", torch.bfloat16, torch.bfloat16),
        ("clip_grad_norm_", torch.bfloat16, torch.bfloat16),
        ("no_sync", torch.bfloat16, torch.bfloat16),
        ("rounds", torch.float32, torch.float32),
        ("clip_grad_value_", torch.bfloat16, torch.float32),
    ):
        (found, _) = on_ranks(2, train, torch.bfloat16, "backward", way, True)
        assert found["dtypes"][0] == {before} and found["dtypes"][-1] == {after}, way


@pytest.mark.parametrize("wrapper", [ByDeviceTransport, SharedMemoryTransport])
def test_transports_for_two_kinds_of_devices_ask_the_one_of_the_device(wrapper: type[Transport]) -> None:
    transport: Any = object.__new__(wrapper)
    transport._host, transport._inner = connect(None), object.__new__(NcclTransport)
    transport._stream = transport._inner
    transport._inner._exact_sums = False
    for device, dtype, scales in (("cpu", torch.float32, True), ("cuda", torch.bfloat16, False)):
        assert transport.sum_dtype(torch.bfloat16, torch.float32, torch.device(device)) == dtype
        assert transport.scales_sums(torch.device(device)) == scales


def train_with_gradients_in_bfloat16(gradient_sync: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 7))
    precision = Precision(reduce=torch.bfloat16)
    optimizer = ShardedAdamW(model.parameters(), lr=1e-2, gradient_sync=gradient_sync, precision=precision)
    for step in range(3):
        model(torch.randn(8, 20, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
def test_gradients_are_rounded_to_the_wire_on_one_rank_too(gradient_sync: str) -> None:
    one = train_with_gradients_in_bfloat16(gradient_sync)
    for found in on_ranks(2, train_with_gradients_in_bfloat16, gradient_sync):
        assert all(torch.equal(a, b) for a, b in zip(found, one, strict=True))
