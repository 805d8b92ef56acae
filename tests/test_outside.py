# SPDX-License-Identifier: Apache-2.0
"""Parameters of the model that another optimizer trains: averaged as DDP would, and noticed where nobody averages."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from shardadam import ShardedAdamW
from shardadam.checks import misuse
from tests.ranks import on_ranks, rank_and_size


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 6, sparse=True)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.extra = nn.Parameter(torch.ones(3))  # used by odd ranks only
        self.unused = nn.Parameter(torch.ones(2))

    def loss(self, step: int, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * step + rank)
        words = torch.randint(0, 20, (8,), generator=generator)
        hidden = self.body(self.words(words))
        return (hidden * self.extra if rank % 2 else hidden).square().mean()


def optimizers_of(model: Model) -> list[torch.optim.Optimizer]:
    """Three for parameters that ShardedAdamW does not train in these tests."""
    return [
        torch.optim.Muon([model.body[0].weight, model.body[2].weight], lr=1e-2),
        torch.optim.SparseAdam([model.words.weight], lr=1e-2),
        torch.optim.SGD([model.extra, model.unused], lr=0.1),
    ]


def train(gradient_sync: str, mesh: tuple[int, int] | None) -> tuple[list[Tensor], bool, list[str]]:
    rank, _ = rank_and_size()
    misuse._warned.clear()
    model = Model()
    with torch.no_grad():
        model.extra += rank  # sync_module must repair it
    others = optimizers_of(model)
    outside = [p for optimizer in others for group in optimizer.param_groups for p in group["params"]]
    group = None if mesh is None else init_device_mesh("cpu", mesh)
    biases = [model.body[0].bias, model.body[2].bias]
    adam = ShardedAdamW(biases, lr=1e-2, gradient_sync=gradient_sync, process_group=group)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adam.sync_module(model)
        for step in range(5):
            model.loss(step, rank).backward()
            adam.average_gradients(outside)
            for optimizer in (*others, adam):
                optimizer.step()
                optimizer.zero_grad()
        adam.check_in_sync(model)
    unused_has_none = model.unused.grad is None
    texts = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    return [p.detach().clone() for p in model.parameters()], unused_has_none, texts


@pytest.mark.parametrize(
    ("world_size", "gradient_sync", "mesh"),
    [(1, "backward", None), (2, "backward", None), (3, "step", None), (4, "backward", (2, 2))],
)
def test_equals_one_process_that_trains_on_all_batches(
    world_size: int, gradient_sync: str, mesh: tuple[int, int] | None
) -> None:
    model = Model()
    others = optimizers_of(model)
    adam = torch.optim.AdamW([model.body[0].bias, model.body[2].bias], lr=1e-2)
    for step in range(5):
        (sum(model.loss(step, rank) for rank in range(world_size)) / world_size).backward()
        for optimizer in (*others, adam):
            optimizer.step()
            optimizer.zero_grad()
    results = on_ranks(world_size, train, gradient_sync, mesh)
    for parameters, unused_has_none, texts in results:
        assert unused_has_none and texts == []
        for ours, first, expected in zip(parameters, results[0][0], model.parameters(), strict=True):
            assert torch.equal(ours, first)
            torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)


def average(dtype: torch.dtype, size: int) -> list[Tensor | None]:
    rank, _ = rank_and_size()
    generator = torch.Generator().manual_seed(rank)
    optimizer = ShardedAdamW(nn.Linear(2, 2).parameters())
    parameters = [nn.Parameter(torch.zeros(size, 3, dtype=dtype)) for _ in range(3)]
    parameters[0].grad = torch.randn(3, size, generator=generator).to(dtype).t()  # not contiguous
    if rank == 1:
        parameters[1].grad = torch.ones(size, 3, dtype=dtype)
    for _ in range(2):  # the average of averages is the average
        optimizer.average_gradients(parameters)
    return [p.grad for p in parameters]


@pytest.mark.parametrize("size", [5, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_averages_in_float32_at_least(dtype: torch.dtype, size: int) -> None:
    drawn = [torch.randn(3, size, generator=torch.Generator().manual_seed(rank)).to(dtype).t() for rank in range(2)]
    for first, second, third in on_ranks(2, average, dtype, size):
        wide = torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(first, ((drawn[0].to(wide) + drawn[1].to(wide)) / 2).to(dtype), rtol=1e-3, atol=1e-6)
        assert torch.equal(second, torch.full((size, 3), 0.5, dtype=dtype)) and third is None


# Where nobody averages


def warned(what: str) -> tuple[list[str], str]:
    """Return the warnings of three steps, and the error of ``check_in_sync(model)`` after them."""
    rank, _ = rank_and_size()
    misuse._warned.clear()
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    reference = copy.deepcopy(model)
    wrapped = DistributedDataParallel(copy.deepcopy(model)) if what == "another model, in DDP" else None
    sync = "external" if what == "external" else "backward"
    adam = ShardedAdamW([(n, p) for n, p in model.named_parameters() if p.ndim == 1], gradient_sync=sync)
    matrices = [model[0].weight, model[2].weight]
    if what == "frozen":
        for matrix in matrices:
            matrix.requires_grad_(False)
    if what in ("by hand", "frozen"):
        adam.sync_module(model)
    other: torch.optim.Optimizer | None = {
        "Muon": lambda: torch.optim.Muon(matrices, lr=1e-2),
        "external": lambda: torch.optim.Muon(matrices, lr=1e-2),
        "another model": lambda: torch.optim.SGD(reference.parameters(), lr=1e-2),
        "another model, in DDP": lambda: torch.optim.SGD(wrapped.parameters(), lr=1e-2),
        "another ShardedAdamW": lambda: ShardedAdamW(matrices),
    }.get(what, lambda: None)()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            x = torch.full((2, 4), 1.0 + rank + step)
            model(x).square().mean().backward()
            if what.startswith("another model"):
                (reference if wrapped is None else wrapped)(x).square().mean().backward()
            if other is not None:
                other.step()
                other.zero_grad()
            elif what == "by hand":
                with torch.no_grad():
                    for matrix in matrices:
                        matrix -= 0.01 * matrix.grad
            adam.step()
            adam.zero_grad()
            if other is None:
                model.zero_grad()
    try:
        adam.check_in_sync(model)
        error = ""
    except RuntimeError as found:
        error = str(found)
    dist.barrier()
    return [str(one.message) for one in caught if issubclass(one.category, UserWarning)], error


@pytest.mark.parametrize(("what", "by"), [("Muon", "Muon"), ("by hand", "the code that trains them")])
def test_one_warning_where_nobody_averages_and_check_in_sync_names_the_parameter(what: str, by: str) -> None:
    for texts, error in on_ranks(2, warned, what):
        assert len(texts) == 1 and "'0.weight', '2.weight': parameters" in texts[0] and f"So {by} writes" in texts[0]
        assert "optimizer.average_gradients" in texts[0]
        assert "'0.weight', which this optimizer does not have (see average_gradients)" in error


@pytest.mark.parametrize("what", ["another model", "another model, in DDP", "another ShardedAdamW", "frozen"])
def test_no_warning_where_somebody_averages(what: str) -> None:
    for texts, error in on_ranks(2, warned, what):
        assert texts == [] and error == ""


def part_in_ddp() -> list[str]:
    """Only a part of the model is in DDP, which leaves out one of its parameters."""
    misuse._warned.clear()
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, ["1.bias"])
    model = nn.Sequential(DistributedDataParallel(inner), nn.Linear(4, 2))
    adam = ShardedAdamW(model[1].named_parameters())
    adam.sync_module(model)
    others = [
        torch.optim.SGD([*inner[0].parameters(), inner[1].weight], lr=1e-2),
        torch.optim.SGD([inner[1].bias], lr=1e-2),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.ones(2, 4)).square().mean().backward()
        for other in others:
            other.step()
    dist.barrier()
    return [str(one.message) for one in caught if issubclass(one.category, UserWarning)]


def test_ddp_averages_what_is_in_it_and_not_left_out() -> None:
    for texts in on_ranks(2, part_in_ddp):
        assert len(texts) == 1 and texts[0].startswith("'0.module.1.bias': parameters of the model")


def test_no_warning_where_gradients_are_averaged_elsewhere() -> None:
    for texts, _ in on_ranks(2, warned, "external"):
        assert texts == []


def test_parameters_of_the_optimizer_itself_are_refused() -> None:
    for message in on_ranks(2, refuse):
        assert "found parameter 'weight' of this optimizer" in message and "averages their gradients itself" in message


def refuse() -> str:
    model = nn.Linear(2, 2)
    optimizer = ShardedAdamW(model.named_parameters())
    try:
        optimizer.average_gradients(model.parameters())
    except ValueError as error:
        return str(error)
    return ""


def average_one_tensor() -> tuple[list[float], str]:
    rank, _ = rank_and_size()
    model = nn.Linear(3, 2)
    optimizer = ShardedAdamW([model.bias])
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.full((2, 3), float(rank))
    optimizer.average_gradients(weight)
    try:
        optimizer.average_gradients(list(weight))  # type: ignore[call-overload]
    except ValueError as error:
        return weight.grad.flatten().tolist(), str(error)
    return [], ""


def test_one_tensor_is_one_parameter_and_its_rows_are_none() -> None:
    for averages, message in on_ranks(2, average_one_tensor):
        assert averages == [0.5] * 6
        assert "tensor 0 of (3,) is computed from others, expected parameters" in message
