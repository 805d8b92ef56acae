# SPDX-License-Identifier: Apache-2.0
"""``gradient_norms`` and ``update_ratios`` equal those of the whole model, computed in float64 in one process."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import shardadam
from shardadam import DiskOffload, GradScaler, Precision, ShardedAdam, ShardedAdamW
from shardadam.engine.norms import GradientNorms
from tests import test_expert_parallel, test_fully_shard, test_hybrid, test_pipeline_parallel, test_tensor_parallel
from tests.parallel_models import Sizes, mesh_of
from tests.parallel_training import LR, ParamGroups, Training, average_by_hand, group_of, param_groups
from tests.ranks import on_ranks, rank_and_size


class Net(nn.Module):
    """A parameter with odd sizes, a tied one, a frozen one, one that no rank uses, and one that rank 1 alone uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Linear(9, 130)
        self.tied = nn.Linear(9, 130, bias=False)
        self.tied.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(130), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.of_rank_1 = nn.Parameter(torch.randn(7))
        self.head = nn.Linear(130, 5)

    def forward(self, x: Tensor, rank: int) -> Tensor:
        y = self.head(torch.tanh(self.embedding(x)) + self.tied(x) + self.frozen)
        return y.square().mean() + (self.of_rank_1.sin().sum() if rank == 1 else 0.0)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices with weight decay, and everything else without; in this order."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, p) for name, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(name, p) for name, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]


def batch(model: nn.Module, step: int, rank: int) -> Tensor:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(100 * step + rank))
    return x.to(next(model.parameters()).dtype)


def backward(model: nn.Module, optimizer: ShardedAdam, gradient_sync: str, step: int, scale: float = 1.0) -> None:
    """Two micro-batches."""
    rank, size = rank_and_size()
    with optimizer.no_sync():
        (model(batch(model, 2 * step, rank), rank) * scale / 2).backward()
    (model(batch(model, 2 * step + 1, rank), rank) * scale / 2).backward()
    if gradient_sync == "external" and size > 1:
        average_by_hand(model.parameters(), group_of(None))


def true_gradients(step: int, world_size: int, model: Net | None = None) -> dict[str, Tensor]:
    """By name, in float64."""
    model = Net().double() if model is None else model
    for rank in range(world_size):
        for micro in (2 * step, 2 * step + 1):
            (model(batch(model, micro, rank), rank) / (2 * world_size)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def norm(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def assert_norms(found: GradientNorms, gradients: dict[str, Tensor], rel: float = 1e-6) -> None:
    assert found.parameters == pytest.approx({name: norm([one]) for name, one in gradients.items()}, rel=rel)
    matrices = [one for one in gradients.values() if one.dim() > 1]
    others = [one for one in gradients.values() if one.dim() <= 1]
    assert found.groups == pytest.approx([norm(matrices), norm(others)], rel=rel)
    assert found.total == pytest.approx(norm(gradients.values()), rel=rel)


def measure(gradient_sync: str, transport: str) -> list[GradientNorms]:
    model = Net()
    optimizer = ShardedAdamW(
        groups_of(model), lr=0.0, bucket_mb=0.001, gradient_sync=gradient_sync, transport=transport
    )
    found = []
    for step in range(2):
        backward(model, optimizer, gradient_sync, step)
        found.append(optimizer.gradient_norms())
        total = float(optimizer.clip_grad_norm_(0.1))
        assert found[-1].total == pytest.approx(total, rel=1e-6)
        assert optimizer.gradient_norms() == found[-1], "norms are those before clipping"
        before = float(optimizer.clip_grad_norm_(1e9))
        assert before == pytest.approx(0.1, rel=1e-4), "looking has not undone clipping"
        optimizer.step()
        optimizer.zero_grad()
    warns = pytest.warns(UserWarning, match="a call between backward and step")
    with warns if rank_and_size()[0] == 0 else nullcontext():
        assert optimizer.gradient_norms() == GradientNorms({}, [0.0, 0.0], 0.0)
    in_order = [name for group in optimizer.param_groups for name in group["param_names"] if name != "frozen"]
    assert list(found[0].parameters) == [name for name in in_order if name in found[0].parameters]
    assert list(optimizer.update_ratios()) == in_order
    return found


@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
def test_norms_are_those_of_the_mean_gradients(gradient_sync: str, transport: str) -> None:
    for found in on_ranks(2, measure, gradient_sync, transport):
        for step in range(2):
            assert_norms(found[step], true_gradients(step, 2))


@pytest.mark.parametrize("gradient_sync", ["backward", "external"])
def test_norms_on_one_rank(gradient_sync: str) -> None:
    found = measure(gradient_sync, "auto")
    assert_norms(found[1], true_gradients(1, 1))
    assert "of_rank_1" not in found[1].parameters


def measure_scaled(gradient_sync: str, max_grad_norm: float | None) -> tuple[GradientNorms, GradientNorms, Any]:
    model = Net()
    optimizer = ShardedAdamW(groups_of(model), lr=0.0, gradient_sync=gradient_sync, max_grad_norm=max_grad_norm)
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # as the loss would be
    backward(model, optimizer, gradient_sync, 0, scale=1024.0)
    scaled = optimizer.gradient_norms()
    scaler.unscale_(optimizer)
    unscaled = optimizer.gradient_norms()
    scaler.step(optimizer)
    return scaled, unscaled, optimizer.grad_norm


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
def test_norms_are_without_the_loss_scale_once_it_is_unscaled(gradient_sync: str) -> None:
    expected = true_gradients(0, 2)
    for scaled, unscaled, grad_norm in on_ranks(2, measure_scaled, gradient_sync, 0.01):
        assert_norms(unscaled, expected)
        assert_norms(scaled, {name: one * 1024 for name, one in expected.items()})
        assert float(grad_norm) == pytest.approx(unscaled.total, rel=1e-6)


def measure_clipped_values() -> tuple[GradientNorms, GradientNorms]:
    model = Net()
    optimizer = ShardedAdamW(groups_of(model))
    backward(model, optimizer, "backward", 0)
    before = optimizer.gradient_norms()
    optimizer.clip_grad_value_(1e-3)
    return before, optimizer.gradient_norms()


def test_norms_are_those_after_clipping_by_value() -> None:
    expected = true_gradients(0, 2)
    for before, after in on_ranks(2, measure_clipped_values):
        assert_norms(before, expected)
        assert_norms(after, {name: one.clamp(-1e-3, 1e-3) for name, one in expected.items()})


def measure_non_finite() -> tuple[GradientNorms, dict[str, float]]:
    model, (rank, _) = Net(), rank_and_size()
    optimizer = ShardedAdamW(groups_of(model), gradient_sync="step")
    backward(model, optimizer, "step", 0)
    if rank == 1:
        model.head.weight.grad[2, 3] = math.inf
    found = optimizer.gradient_norms()
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    return found, optimizer.update_ratios()


def test_a_gradient_that_is_infinite_on_one_rank_is_infinite_on_all_and_updates_nothing() -> None:
    for found, ratios in on_ranks(2, measure_non_finite):
        assert found.parameters["head.weight"] == found.groups[0] == found.total == math.inf
        assert found.parameters["head.bias"] < math.inf
        assert set(ratios.values()) == {0.0}


def refuse_in_backward() -> list[str]:
    model = Net()
    optimizer = ShardedAdamW(groups_of(model), update="backward")
    model(batch(model, 0, 0), 1).backward()
    messages = []
    with pytest.raises(ValueError) as caught:
        optimizer.gradient_norms()
    messages.append(str(caught.value))
    with pytest.raises(RuntimeError) as in_step:
        optimizer.update_ratios()
    messages.append(str(in_step.value))
    optimizer.step()
    assert optimizer.update_ratios()["head.weight"] > 0
    return messages


def test_gradients_that_backward_has_used_are_refused_on_all_ranks() -> None:
    first, second = on_ranks(2, refuse_in_backward)
    assert first == second
    assert 'gradient_norms: found update="backward"' in first[0]
    assert "half-way through a step" in first[1]


def test_parameters_of_two_models_with_the_same_names_all_count() -> None:
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    optimizer = ShardedAdamW([{"params": list(model.named_parameters())} for model in models])
    (models[0](torch.ones(1, 3)) + 2 * models[1](torch.ones(1, 3))).sum().backward()
    names = {f"param_groups[{index}].{name}" for index in range(2) for name in ("weight", "bias")}
    found = optimizer.gradient_norms()
    assert found.parameters.keys() == names == optimizer.update_ratios().keys()
    assert norm_of(found.parameters) == pytest.approx(found.total)


def differ_in_call() -> str:
    model, (rank, _) = Net(), rank_and_size()
    optimizer = ShardedAdamW(groups_of(model))
    backward(model, optimizer, "backward", 0)
    with pytest.raises(ValueError) as caught:
        optimizer.gradient_norms() if rank == 0 else optimizer.step()
    return str(caught.value)


def test_ranks_that_do_not_all_look_are_told() -> None:
    first, second = on_ranks(2, differ_in_call)
    assert first == second
    assert "gradient_norms on rank 0, step on rank 1" in first


# Updates


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, over torch.distributed": {"transport": "collective", "gradient_sync": "step"},
    "external": {"gradient_sync": "external"},
    "update in backward": {"update": "backward"},
    "update in backward, step": {"update": "backward", "transport": "collective"},
    "bf16 split": {"dtype": torch.bfloat16, "precision": Precision(master="split")},
    "bf16 with masters": {"dtype": torch.bfloat16, "precision": Precision(master="fp32")},
    "float64": {"dtype": torch.float64},
    "maximize": {"maximize": True, "max_grad_norm": 0.01},
    "tensor lr": {"lr": "tensor"},
    "without eps": {"eps": 0.0},
    "L2 decay": {"decoupled_weight_decay": False},
    "disk": {"offload": "disk"},
    "int8": {"precision": Precision(moments="int8")},
    "bf16 moments": {"precision": Precision(moments="bf16")},
    "int8, bf16 split": {"dtype": torch.bfloat16, "precision": Precision(moments="int8", master="split")},
}
TOLERANCE = {"int8": 0.03, "bf16 moments": 0.03, "int8, bf16 split": 0.03}
"""Of ratios; elsewhere 2e-5: a weight near 1 is rounded by up to 6e-8, and an update is about 1e-2."""


def train(
    options: dict[str, Any], directory: Path, mesh: tuple[int, int] | None = None
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """The ratios after each step, and those of copies of the exact weights from before and after it."""
    options = dict(options)
    options["process_group"] = None if mesh is None else test_hybrid.mesh_of(mesh)
    model = Net().to(options.pop("dtype", torch.float32))
    is_decoupled = options.pop("decoupled_weight_decay", True)
    options["offload"] = DiskOffload(directory) if options.get("offload") == "disk" else options.get("offload")
    lr: Any = 1e-2
    if options.pop("lr", None) is not None:
        lr = torch.tensor(1e-2)
    kind = ShardedAdamW if is_decoupled else ShardedAdam
    optimizer = kind(groups_of(model), lr=lr, bucket_mb=0.001, **options)
    gradient_sync = options.get("gradient_sync", "backward")
    assert set(optimizer.update_ratios().values()) == {0.0}
    found = []
    before = exact_weights(model, optimizer)
    for step in range(4):
        backward(model, optimizer, gradient_sync, step)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(lr, Tensor):  # a scheduler changes it before anyone asks
            optimizer.param_groups[0]["lr"].mul_(0.5)
        else:
            optimizer.param_groups[0]["lr"] *= 0.5
        ratios = optimizer.update_ratios()
        assert optimizer.update_ratios() == ratios
        after = exact_weights(model, optimizer)
        found.append((ratios, {one: norm([after[one] - before[one]]) / norm([after[one]]) for one in after}))
        before = after
    return found


def exact_weights(model: nn.Module, optimizer: ShardedAdam) -> dict[str, Tensor]:
    weights = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            weights[name] = optimizer.full_state(p).get("master", p.detach()).double().clone()
    return weights


@pytest.mark.sweep(16)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ratios_are_those_of_copies_before_and_after_the_step(name: str, world_size: int, tmp_path: Path) -> None:
    assert_ratios(on_ranks(world_size, train, CONFIGURATIONS[name], tmp_path), rel=TOLERANCE.get(name, 2e-5))


def test_ratios_of_replicas_that_are_updated_in_backward(tmp_path: Path) -> None:
    assert_ratios(on_ranks(4, train, {"update": "backward"}, tmp_path, (2, 2)), rel=2e-5)


def assert_ratios(of_ranks: list[list[tuple[dict[str, float], dict[str, float]]]], rel: float) -> None:
    for found in of_ranks:
        for ratios, expected in found:
            assert ratios == pytest.approx(expected, rel=rel, abs=0)
            assert ratios["unused"] == 0
            assert ratios["head.weight"] > 1e-4
            assert (ratios["of_rank_1"] > 0) == (len(of_ranks) > 1)


def ratios_of_rounded_weights() -> tuple[float, float]:
    """Weights in bfloat16 without masters: the update, and what rounding made of it."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(300, 128, dtype=torch.bfloat16))
    optimizer = ShardedAdamW([("weight", weight)], lr=1e-4, weight_decay=0, precision=Precision(master="none"))
    weight.square().sum().backward()
    before = weight.detach().double().clone()
    optimizer.step()
    return optimizer.update_ratios()["weight"], norm([weight.detach() - before]) / norm([weight.detach()])


def test_ratios_do_not_count_stochastic_rounding_as_updates() -> None:
    for ratio, of_rounded in on_ranks(2, ratios_of_rounded_weights):
        assert ratio == pytest.approx(1e-4, rel=0.02), "all weights of a normal distribution move by lr"
        assert of_rounded > 3 * ratio


def reset_by_load() -> None:
    model = Net()
    optimizer = ShardedAdamW(groups_of(model))
    backward(model, optimizer, "backward", 0)
    optimizer.step()
    assert optimizer.update_ratios()["head.weight"] > 0
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.update_ratios()["head.weight"] == 0
    with pytest.raises(RuntimeError, match="averages"):
        averaged = ShardedAdamW([nn.Parameter(torch.ones(3))], ema_decay=0.9)
        with averaged.averaged_parameters():
            averaged.update_ratios()


def test_a_load_forgets_the_last_update() -> None:
    on_ranks(2, reset_by_load)


# Replicas, and other parts of the model on other ranks


@dataclass
class Parts:
    """What a rank holds, or the twin in one process: optimizers over named parameters, and the backward of a step."""

    optimizers: list[Any]
    backward: Callable[[int], object]


def replicas(gradient_sync: str, is_split: bool) -> Parts:
    model = Net().double()
    if not is_split:
        return Parts([adamw(groups_of(model), False)], lambda step: true_gradients(step, 4, model))
    group = test_hybrid.mesh_of((2, 2))
    optimizer = adamw(groups_of(model), True, process_group=group, gradient_sync=gradient_sync)
    return Parts([optimizer], lambda step: backward(model, optimizer, gradient_sync, step))


def tensor_parallel(mesh: tuple[Any, ...], is_split: bool) -> Parts:
    case = test_tensor_parallel.Case(mesh=mesh)
    if not is_split:
        model = case.whole_model(torch.float64)
        return Parts([adamw(param_groups(model), False)], lambda step: case.loss(model, step).backward())
    model, whole = case.split_model(torch.float64), mesh_of(*case.mesh)
    data = whole["replicas", "dp"] if "replicas" in mesh[0] else whole["dp"]
    index, count = dist.get_rank() // whole["tp"].size(), data.size()
    return Parts(
        [adamw(param_groups(model), True, process_group=data)],
        lambda step: case.loss(model, step, index, count).backward(),
    )


def expert_parallel(copies: int, is_split: bool) -> Parts:
    case = test_expert_parallel.Case(mesh=("copies experts", copies, 2), hybrid=copies > 1)
    if not is_split:
        model = case.whole_model(torch.float64)
        groups = test_expert_parallel.with_experts_apart(param_groups(model), None)  # type: ignore[arg-type]
        return Parts([adamw(groups, False)], lambda step: case.loss(model, step).backward())
    model, groups = test_expert_parallel.split_model(case, torch.float64)
    group = test_expert_parallel.data_parallel(case)
    return Parts(
        [adamw(groups, True, process_group=group)], lambda step: case.loss(model, step, *rank_and_size()).backward()
    )


def sharded_by_fsdp(is_split: bool) -> Parts:
    case = test_fully_shard.Case(mesh=("shard", 2), sizes=Sizes(blocks=1, vocabulary=13, hidden=7))
    model = case.whole_model(torch.float64)
    rank, size = rank_and_size() if is_split else (0, 1)
    if is_split:
        for block in model.blocks.values():
            fully_shard(block, mesh=mesh_of("shard", 2))
        fully_shard(model, mesh=mesh_of("shard", 2))
    optimizer = adamw(param_groups(model), is_split, gradient_sync="external")
    return Parts([optimizer], lambda step: case.loss(model, step, rank, size).backward())


def pipeline(case: test_pipeline_parallel.Case, is_split: bool) -> Parts:
    if not is_split:
        model = case.whole_model(torch.float64)
        return Parts([adamw(param_groups(model), False)], lambda step: case.loss(model, step).backward())
    training = Training(dtype=torch.float64)
    parts = test_pipeline_parallel.build(case, training)
    return Parts(parts.optimizers, test_pipeline_parallel.backward_of(case, training, parts))


def adamw(groups: ParamGroups, is_split: bool, **options: Any) -> torch.optim.Optimizer:
    if is_split:
        return ShardedAdamW(groups, lr=LR, bucket_mb=0.001, **options)
    for group in groups:
        group.pop("process_group", None)
    return torch.optim.AdamW(groups, lr=LR)


BUILDERS: dict[str, tuple[int, Callable[[bool], Parts]]] = {  # on how many ranks
    "replicas": (4, partial(replicas, "backward")),
    "replicas, step": (4, partial(replicas, "step")),
    "replicas, external": (4, partial(replicas, "external")),
    "tensor": (2, partial(tensor_parallel, ("dp tp", 1, 2))),
    "tensor, replicas": (4, partial(tensor_parallel, ("replicas dp tp", 2, 1, 2))),
    "experts": (2, partial(expert_parallel, 1)),
    "experts, replicas": (4, partial(expert_parallel, 2)),
    "fully_shard": (2, sharded_by_fsdp),
    "pipeline": (4, partial(pipeline, test_pipeline_parallel.Case())),
    "pipeline, frozen": (4, partial(pipeline, test_pipeline_parallel.Case(frozen_stage=1))),
    "pipeline, two stages a rank": (4, partial(pipeline, test_pipeline_parallel.Case("interleaved"))),
    "pipeline, tensor": (4, partial(pipeline, test_pipeline_parallel.Case("GPipe", ("dp pp tp", 1, 2, 2)))),
}


def look_at_parts(kind: str) -> list[tuple[GradientNorms, float, dict[str, float]]]:
    """In each step, the norms of the rank's optimizers together, the norm that clips, and the ratios."""
    parts = BUILDERS[kind][1](True)
    found = []
    for step in range(2):
        parts.backward(step)
        norms = [optimizer.gradient_norms() for optimizer in parts.optimizers]
        total = float(shardadam.clip_grad_norm_(parts.optimizers, 1e9))
        for optimizer in parts.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ratios = [optimizer.update_ratios() for optimizer in parts.optimizers]
        together = GradientNorms(
            dict(ChainMap(*(one.parameters for one in norms))),
            [math.hypot(*of_group) for of_group in zip_longest(*(one.groups for one in norms), fillvalue=0.0)],
            math.hypot(*(one.total for one in norms)),
        )
        found.append((together, total, dict(ChainMap(*ratios))))
    return found


def look_at_whole(kind: str) -> list[tuple[dict[str, float], list[float], dict[str, float]]]:
    parts = BUILDERS[kind][1](False)
    (optimizer,) = parts.optimizers
    pairs = (pair for one in optimizer.param_groups for pair in zip(one["param_names"], one["params"], strict=True))
    named = {name: p for name, p in pairs if p.requires_grad}
    found = []
    for step in range(2):
        optimizer.zero_grad()
        parts.backward(step)
        gradients = {name: norm([p.grad]) for name, p in named.items() if p.grad is not None}
        of_groups = [norm(p.grad for p in one["params"] if p.grad is not None) for one in optimizer.param_groups]
        before = {name: p.detach().clone() for name, p in named.items()}
        optimizer.step()
        ratios = {name: norm([p.detach() - before[name]]) / norm([p.detach()]) for name, p in named.items()}
        found.append((gradients, of_groups, ratios))
    return found


@pytest.mark.parametrize("kind", BUILDERS)
def test_replicas_and_parts_on_other_ranks_count_once(kind: str) -> None:
    expected = look_at_whole(kind)
    names: set[str] = set()
    for found in on_ranks(BUILDERS[kind][0], look_at_parts, kind):
        for (norms, total, ratios), (gradients, of_groups, whole_ratios) in zip(found, expected, strict=True):
            names |= set(norms.parameters)
            if not kind.startswith(("experts", "pipeline")):  # where each rank has its own
                assert set(norms.parameters) == set(gradients)
            assert norms.parameters == pytest.approx({name: gradients[name] for name in norms.parameters}, rel=1e-9)
            assert norms.groups == pytest.approx(of_groups[: len(norms.groups)], rel=1e-9)
            assert norms.total == pytest.approx(total, rel=1e-9) == pytest.approx(norm_of(gradients), rel=1e-9)
            assert ratios == pytest.approx({name: whole_ratios[name] for name in ratios}, rel=1e-5)
    assert names == set(expected[0][0])


def norm_of(gradients: dict[str, float]) -> float:
    return math.sqrt(sum(value**2 for value in gradients.values()))
