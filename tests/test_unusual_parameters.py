# SPDX-License-Identifier: Apache-2.0
"""Unusual parameters, and unusual settings of torch, train as with torch or are refused when the optimizer is built, by
the parameter's name and with a remedy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardadam
from shardadam import GradScaler, Precision, ShardedAdamW
from shardadam.transport import connect
from tests.ranks import on_ranks, rank_and_size
from tests.test_bad_input import parameter, raised, refuse

GRADIENT_SYNCS = ["backward", "step", "external"]


# p.grad_dtype

HAS_GRAD_DTYPE = hasattr(torch.Tensor, "grad_dtype")


def train_with_grad_dtype(
    gradient_sync: str, transport: str, dtype: torch.dtype, grad_dtype: torch.dtype | None
) -> Any:
    """Return the parameter after steps on gradients that every dtype can hold exactly, and torch's on their mean."""
    rank, world_size = rank_and_size()
    ours, plain = (nn.Parameter(torch.arange(40, dtype=dtype)) for _ in range(2))
    ours.grad_dtype = grad_dtype  # type: ignore[attr-defined]
    optimizer = ShardedAdamW([ours], lr=0.125, gradient_sync=gradient_sync, transport=transport)  # type: ignore[arg-type]
    expected = torch.optim.AdamW([plain], lr=0.125, fused=True)
    for step in range(4):
        for _ in range(2):  # accumulates
            (ours * (rank + 1 + step)).sum().backward()
        if gradient_sync == "external":
            ours.grad = torch.full_like(ours.grad, (world_size + 1 + 2 * step))  # type: ignore[arg-type]
        elif gradient_sync == "step":
            assert grad_dtype is None or ours.grad.dtype == grad_dtype  # type: ignore[union-attr]
        plain.grad = torch.full_like(plain, world_size + 1 + 2 * step)
        optimizer.step()
        optimizer.zero_grad()
        expected.step()
    return ours.detach(), plain.detach()


@pytest.mark.skipif(not HAS_GRAD_DTYPE, reason="torch < 2.10")
@pytest.mark.parametrize("gradient_sync", GRADIENT_SYNCS)
@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
def test_gradients_may_have_a_dtype_of_their_own(gradient_sync: str, transport: str) -> None:
    """With "step" over shared memory, backward raised: bucket views have the parameter's dtype."""
    for grad_dtype in (torch.bfloat16, torch.float64, None):
        for ours, expected in on_ranks(2, train_with_grad_dtype, gradient_sync, transport, torch.float32, grad_dtype):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for ours, expected in on_ranks(2, train_with_grad_dtype, gradient_sync, transport, torch.float64, torch.float32):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


# torch.set_default_device


def use_every_method(directory: str, gradient_sync: str, transport: str, precision: Precision, scaled: bool) -> None:
    """Call everything that makes tensors, on a model on the CPU."""
    rank, _ = rank_and_size()
    with torch.device("cpu"):
        model, x = nn.Sequential(nn.Linear(5, 300), nn.BatchNorm1d(300), nn.Linear(300, 2)), torch.ones(4, 5)
        extra = nn.Parameter(torch.ones(3))
    model[0].bias.requires_grad_(False)
    optimizer = ShardedAdamW(
        model.named_parameters(),
        gradient_sync=gradient_sync,  # type: ignore[arg-type]
        transport=transport,  # type: ignore[arg-type]
        precision=precision,
        bucket_mb=0.001,
        max_grad_norm=None if scaled else 1.0,
    )
    optimizer.sync_module(model)
    scaler = GradScaler("cpu", enabled=scaled)
    weight = model[0].weight
    for step in range(3):
        scaler.scale(model(x).square().mean()).backward()
        if scaled:
            scaler.unscale_(optimizer)
        optimizer.clip_grad_norm_(1.0)
        optimizer.full_grad(weight)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 0:
            optimizer.add_param_group({"params": [("extra", extra)]})
            model[0].bias.requires_grad_(True)
            optimizer.overlap_gather(model)
    optimizer.synchronize()
    optimizer.check_in_sync()
    optimizer.full_state(weight)
    optimizer.memory()
    optimizer.load_state_dict(optimizer.state_dict())
    whole = optimizer.full_state_dict()
    optimizer.consolidate_state_dict()
    if rank == 0:
        optimizer.load_state_dict(whole)
    options: Any = {"model": model, "optimizer": optimizer}
    shardadam.save(directory, step=1, **options)
    future: Any = shardadam.save(directory, step=2, asynchronous=True, **options)
    future.result()
    shardadam.load(directory, **options)


def run_with_default_device(*arguments: Any) -> None:
    torch.set_default_device("meta")  # on a machine with a GPU, "cuda"
    try:
        use_every_method(*arguments)
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("gradient_sync", "transport", "precision", "scaled", "world_size"),
    [
        ("backward", "collective", Precision(), False, 2),
        ("step", "shared_memory", Precision(moments="int8"), False, 2),
        ("backward", "shared_memory", Precision(moments="int8"), True, 2),
        ("external", "collective", Precision(moments="bf16"), True, 1),
    ],
)
def test_the_default_device_may_be_any(
    gradient_sync: str, transport: str, precision: Precision, scaled: bool, world_size: int, tmp_path: Path
) -> None:
    """Tensors that were made without a device were on the default one: a crash, or an address of another device."""
    on_ranks(world_size, run_with_default_device, str(tmp_path), gradient_sync, transport, precision, scaled)


# Parameters that are refused when the optimizer is built


def inference_tensor(*shape: int) -> Tensor:
    with torch.inference_mode():
        return torch.ones(shape)


def test_refuses_trainable_parameters_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 3)
    with refuse(ValueError, "Parameter 'weight' was made under torch.inference_mode", "p.detach().clone()"):
        ShardedAdamW(model.named_parameters())
    model.weight, model.bias = (nn.Parameter(p.detach().clone()) for p in (model.weight, model.bias))
    ShardedAdamW(model.named_parameters())


def test_refuses_to_be_built_under_inference_mode() -> None:
    with torch.inference_mode(), refuse(RuntimeError, "Found torch.inference_mode enabled", "outside of it"):
        ShardedAdamW([parameter(3)])


@pytest.mark.parametrize(
    "build", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.to_mkldnn], ids=lambda build: build.__name__
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_refuses_frozen_parameters_that_are_not_dense(build: Callable[[Tensor], Tensor]) -> None:
    """The message was "Cannot access data pointer of Tensor that doesn't have storage"."""
    value = build(torch.eye(3))
    frozen, layout = nn.Parameter(value, requires_grad=False), f"has layout {value.layout}"
    with refuse(TypeError, "Parameter 'odd' is frozen and", layout, "Do not pass it to the optimizer"):
        ShardedAdamW([("odd", frozen), ("even", parameter(3))])
    optimizer = ShardedAdamW([("even", parameter(3))])
    with refuse(TypeError, "Parameter 'odd' is frozen and", layout):
        optimizer.add_param_group({"params": [("odd", frozen)]})
    module = nn.Module()
    module.register_buffer("odd", value)
    with refuse(TypeError, f"Found a tensor of layout {value.layout} and shape (3, 3) to broadcast", "alike on every"):
        optimizer.sync_module(module)


def test_refuses_fake_parameters() -> None:
    with FakeTensorMode():
        model = nn.Linear(3, 3)
    with refuse(ValueError, "Parameter 'weight' is a FakeTensor, expected one with values", "FakeTensorMode"):
        ShardedAdamW(model.named_parameters())


def build_with_frozen(kind: str) -> tuple[tuple[str, str], list[Any]]:
    rank, _ = rank_and_size()
    if kind == "DTensor":
        value: Tensor = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
    elif kind == "quantized":
        with warnings.catch_warnings(action="ignore"):  # torch will remove it
            value = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    elif kind == "inference":
        value = inference_tensor(4, 6)[:, ::2] if rank == 0 else torch.zeros(4, 6)[:, ::2]
    elif kind == "conjugate":
        value = torch.tensor([1j + rank, 2]).conj()
    else:
        value = torch._neg_view(torch.tensor([1.0 + rank, 2]))
    frozen = nn.Parameter(value, requires_grad=False)
    result = raised(lambda: ShardedAdamW([("odd", frozen), ("even", parameter(3))]))
    return result, [] if result[1] else frozen.detach().flatten().tolist()


def test_refuses_frozen_parameters_that_cannot_be_broadcast() -> None:
    for (error, message), _ in on_ranks(2, build_with_frozen, "quantized"):
        expected = "Parameter 'odd' is frozen and has dtype torch.quint8, expected"
        assert error == "TypeError" and message.startswith(expected)


def test_refuses_frozen_parameters_of_which_data_parallel_ranks_hold_different_parts() -> None:
    for (error, message), _ in on_ranks(2, build_with_frozen, "DTensor"):
        assert error == "ValueError" and message.startswith("Parameter 'odd' is a DTensor on ranks [0, 1]")


@pytest.mark.parametrize("kind", ["inference", "conjugate", "negative"])
def test_broadcasts_frozen_parameters_of_other_kinds(kind: str) -> None:
    first, second = on_ranks(2, build_with_frozen, kind)
    assert first == second and first[0] == ("nothing", "")


# Parameters that train


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("gradient_sync", GRADIENT_SYNCS)
def test_unusual_parameters_train_as_with_torch(gradient_sync: str) -> None:
    def build() -> list[nn.Parameter]:
        return [
            nn.Parameter(torch.ones(3).as_subclass(Subclass)),
            nn.Parameter(torch._neg_view(torch.ones(3))),
            torch.ones(4, 4)[1].requires_grad_(True),  # type: ignore[list-item]
            nn.Parameter(torch.ones(0, 3)),
            nn.Parameter(torch.ones(())),
        ]

    ours, plain = build(), build()
    for parameters, optimizer in (
        (ours, ShardedAdamW(ours, lr=0.1, gradient_sync=gradient_sync)),  # type: ignore[arg-type]
        (plain, torch.optim.AdamW(plain, lr=0.1)),
    ):
        for _ in range(3):
            sum((p**2).sum() for p in parameters).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.detach(), other.detach())


# Swapped tensors


@pytest.mark.parametrize("gradient_sync", GRADIENT_SYNCS)
def test_refuses_to_swap_a_parameter_while_the_optimizer_lives(gradient_sync: str) -> None:
    """torch refused it without a word about the optimizer, and still after the optimizer was gone."""
    model, other = nn.Linear(3, 2), nn.Parameter(torch.zeros(2, 3))
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)  # type: ignore[arg-type]
    before = model.weight.detach().clone()
    words = ("swap_tensors: found a parameter of shape (2, 3)", "before building the optimizer", "p.data.copy_")
    with refuse(RuntimeError, *words):
        torch.utils.swap_tensors(model.weight, other)
    with swapping_on_conversion(), pytest.raises(RuntimeError) as error:
        model.to(torch.float64)
    assert "swap_tensors: found a parameter" in str(error.value.__cause__)
    assert torch.equal(model.weight, before)
    del optimizer, error
    torch.utils.swap_tensors(model.weight, other)
    assert torch.equal(other, before)
    with swapping_on_conversion():
        model.to(torch.float64)
    ShardedAdamW(model.parameters())


@contextmanager
def swapping_on_conversion() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


# Devices that the process group has no backend for


def build_over_other_devices() -> list[tuple[str, str]]:
    transport = connect(None, kind="collective")
    transport.devices = frozenset({"cuda"})  # as with init_process_group("nccl")
    found = [raised(lambda: ShardedAdamW([("frozen", parameter(2).requires_grad_(False))], transport=transport))]
    optimizer = ShardedAdamW([parameter(3)])
    optimizer._engine.transport.devices = frozenset({"cuda"})
    found.append(raised(lambda: optimizer.add_param_group({"params": [parameter(2)]})))
    found.append(raised(lambda: optimizer.sync_module(nn.BatchNorm1d(7))))
    return found


def test_refuses_tensors_on_a_device_that_the_process_group_has_no_backend_for() -> None:
    """A CPU parameter over an NCCL group ended in an error of the broadcast that named nothing."""
    expected = "is on cpu, expected a device that the process group has a backend for: cuda."
    for (_, frozen), (_, added), (_, buffer) in on_ranks(2, build_over_other_devices):
        assert (
            frozen.startswith(f"Parameter 'frozen' {expected}") and 'init_process_group("cpu:gloo,cuda:nccl")' in frozen
        )
        assert added.startswith(f"Parameter \"param_groups[1]['params'][0]\" {expected}")
        assert buffer.startswith(f"A tensor of shape (7,) {expected}")


def test_every_transport_says_which_devices_it_serves() -> None:
    assert on_ranks(2, devices_of_transports) == [[["cpu", "cuda"]] * 2] * 2


def devices_of_transports() -> list[list[str]]:
    return [sorted(connect(None, kind=kind).devices or ()) for kind in ("collective", "shared_memory")]


# Lazy negations


def step_with_lazy_negations(gradient_sync: str, is_lazy: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(256, 256)
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)  # type: ignore[arg-type]
    for p in model.parameters():
        p.grad = torch._neg_view(torch.ones_like(p)) if is_lazy else -torch.ones_like(p)
    if gradient_sync == "backward":
        model(torch.zeros(1, 256)).sum().backward()  # adds to what is there
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("gradient_sync", GRADIENT_SYNCS)
def test_a_lazy_negation_is_carried_out(gradient_sync: str) -> None:
    """Its memory holds the negative of what the tensor is, and bytes are copied from memory."""
    lazy, plain = (on_ranks(2, step_with_lazy_negations, gradient_sync, is_lazy) for is_lazy in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(lazy[0], plain[0], strict=True))
