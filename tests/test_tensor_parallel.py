# SPDX-License-Identifier: Apache-2.0
"""Tensor and sequence parallelism beside data parallelism equal torch's AdamW on the whole model in one process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from shardadam import GradScaler, Precision, ShardedAdamW
from tests.parallel_models import (
    TENSOR_PLACEMENTS,
    Grid,
    Quadratics,
    Sizes,
    Transformer,
    apply_tensor_parallel,
    batch_of,
    cross_entropy,
    grid_batch_of,
    mesh_of,
    part_of,
    place_grid,
    place_quadratics,
)
from tests.parallel_training import (
    BUCKET_MB,
    LR,
    MAX_NORM,
    Trained,
    Training,
    adamw,
    assert_equals_twin,
    average_by_hand,
    broken,
    bytes_of_adamw,
    param_groups,
    refuses,
    train,
    train_twin,
    whole,
)
from tests.ranks import on_ranks
from tests.runs import differences

EVEN = Sizes(blocks=1, vocabulary=36, hidden=28)
UNEVEN = Sizes(blocks=1, vocabulary=13, hidden=7)
LARGE = Sizes(blocks=1, vocabulary=600, width=128, hidden=512, length=4, batch=2)


@dataclass(frozen=True)
class Case:
    """A model on a mesh.

    Args:
        model: "transformer": norms are plain modules. "sequence": the transformer with sequence parallelism. "grid":
            linear layers on a model mesh of two dimensions.
        mesh: names and sizes of the mesh.
    """

    model: str = "transformer"
    tied: bool = False
    sizes: Sizes = UNEVEN
    mesh: tuple[Any, ...] = ("dp tp", 2, 2)

    @property
    def id(self) -> str:
        return f"{self.model}{',tied' if self.tied else ''}{',even' if self.sizes is EVEN else ''},{self.mesh[0]}"

    def whole_model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return (Grid() if self.model == "grid" else Transformer(self.sizes, self.tied)).to(dtype)

    def loss(self, model: nn.Module, step: int, index: int = 0, count: int = 1) -> Tensor:
        """The loss of one of ``count`` equal parts of a batch."""
        if self.model == "grid":
            dtype = model.get_parameter("scale").dtype
            inputs, targets = part_of([tensor.to(dtype) for tensor in grid_batch_of(step)], index, count)
            return F.mse_loss(model(inputs), targets)
        tokens, targets = part_of(batch_of(self.sizes, step), index, count)
        return cross_entropy(model(tokens), targets)

    def split_model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Collective over the mesh."""
        mesh, model = mesh_of(*self.mesh), self.whole_model(dtype)
        if isinstance(model, Grid):
            return place_grid(model, mesh["a", "b"])
        assert isinstance(model, Transformer)
        return apply_tensor_parallel(model, mesh["tp"], sequence_parallel=self.model == "sequence")


TRANSFORMER, SEQUENCE = Case(), Case("sequence")
GRID = Case("grid", mesh=("dp a b", 1, 2, 2))
CASES = [
    TRANSFORMER,
    Case(tied=True),
    Case(sizes=EVEN),
    SEQUENCE,
    Case("sequence", tied=True),
    Case("sequence", mesh=("tp dp", 2, 2)),
    GRID,
]
TRAININGS = [
    *(Training(gradient_sync=sync) for sync in ("backward", "step", "external")),
    Training(dtype=torch.float64),
    Training(accumulate=2),
    Training(gradient_sync="step", accumulate=2, dtype=torch.float64),
    Training(gradient_sync="external", clip="constructor"),
    Training(clip="constructor", options={"transport": "collective"}),
    Training(gradient_sync="step", options={"transport": "collective"}),
    Training(options={"bucket_mb": 32}),
    Training(overlap=True),
]


def train_split(case: Case, training: Training) -> Trained:
    model, mesh = case.split_model(training.dtype), mesh_of(*case.mesh)
    data = mesh["dp"]
    optimizer = adamw(training, param_groups(model), data, copies_of_plain=4 // data.size())

    def backward(step: int) -> None:
        for micro in range(training.accumulate):
            index = micro * data.size() + data.get_local_rank()
            loss = case.loss(model, step, index, training.accumulate * data.size()) / training.accumulate
            if training.by_hand is None and step % 2 and micro < training.accumulate - 1:
                with optimizer.no_sync():
                    loss.backward()
            else:
                loss.backward()
        if training.gradient_sync == "external":
            average_by_hand(model.parameters(), data.get_group())

    return train(training, [optimizer], backward, [model])


def twin_of(case: Case, training: Training) -> Trained:
    return train_twin(training, case.whole_model(training.dtype), case.loss)


# The judge


@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_split_models_equal_their_twins_without_the_sharded_optimizer(case: Case) -> None:
    training = Training(dtype=torch.float64, by_hand={}, steps=4)
    assert_equals_twin(on_ranks(4, train_split, case, training), twin_of(case, training))


@pytest.mark.parametrize("wrong", ["copies_count", "norm_of_each_rank"])
def test_the_comparison_refuses_wrong_norms(wrong: str) -> None:
    training = Training(by_hand={wrong: True}, steps=2)
    assert refuses(on_ranks(4, train_split, TRANSFORMER, training), twin_of(TRANSFORMER, training))


@pytest.mark.parametrize(
    "mutant",
    [
        "each copy counts in the norm",
        "parts of the model stay apart",
        "partial gradients are not summed up",
    ],
)
def test_the_comparison_refuses_broken_optimizers(mutant: str) -> None:
    training = Training(steps=2)
    assert refuses(on_ranks(4, broken, mutant, train_split, SEQUENCE, training), twin_of(SEQUENCE, training))


# It trains like torch's AdamW


@pytest.mark.sweep(4)
@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.id)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_torch_on_the_whole_model(case: Case, training: Training) -> None:
    assert_equals_twin(on_ranks(4, train_split, case, training), twin_of(case, training))


@pytest.mark.long
@pytest.mark.parametrize("training", TRAININGS[:5], ids=lambda training: training.id)
@pytest.mark.parametrize(
    "case",
    [
        Case("grid", mesh=("dp a b", 2, 2, 2)),
        Case("grid", mesh=("a dp b", 2, 2, 2)),
        Case("sequence", mesh=("dp tp", 4, 2), sizes=Sizes(blocks=2)),
        Case("sequence", mesh=("dp tp", 2, 4), sizes=Sizes(blocks=2)),
        Case("transformer", mesh=("tp dp", 4, 2), tied=True, sizes=Sizes(blocks=2)),
    ],
    ids=lambda case: f"{case.id},{case.mesh}",
)
def test_equals_torch_on_eight_ranks(case: Case, training: Training) -> None:
    training = replace(training, steps=6)
    assert_equals_twin(on_ranks(8, train_split, case, training), twin_of(case, training))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("poisoned_rank", [0, 1, 2, 3])
@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize("case", [TRANSFORMER, SEQUENCE, GRID], ids=lambda case: case.id)
def test_a_gradient_that_is_nan_on_one_rank_is_skipped_on_all(
    case: Case, gradient_sync: str, poisoned_rank: int
) -> None:
    training = Training(gradient_sync=gradient_sync, poisoned=(5, poisoned_rank), steps=8)
    twin = twin_of(case, training)
    assert twin.skipped == 1
    assert_equals_twin(on_ranks(4, train_split, case, training), twin)


# Other ways to clip, and loss scaling

WAYS: dict[str, dict[str, Any]] = {
    "1": {"norm_type": 1.0},
    "3.5": {"norm_type": 3.5},
    "inf": {"norm_type": float("inf")},
    "some": {"parameters": ["norm.weight", "logit_scale", "head.weight", "blocks.0.attention.out.bias"]},
    "value": {},
}
SMALL = 0.002


def clip_some_way(way: str, model: nn.Module, optimizer: ShardedAdamW | None) -> float:
    options = dict(WAYS[way])
    parameters = [model.get_parameter(name) for name in options.pop("parameters", [])] or None
    if way == "value":
        if optimizer is not None:
            optimizer.clip_grad_value_(SMALL)
        else:
            nn.utils.clip_grad_value_(model.parameters(), SMALL)
        return 0.0
    if optimizer is not None:
        return float(optimizer.clip_grad_norm_(SMALL, parameters=parameters, **options))
    return float(nn.utils.clip_grad_norm_(parameters or model.parameters(), SMALL, **options))


def train_clipping(case: Case, way: str, gradient_sync: str | None) -> Trained:
    """Train on this rank, or with ``gradient_sync`` None the twin."""
    optimizer: Any
    if gradient_sync is None:
        model, index, count = case.whole_model(torch.float64), 0, 1
        optimizer = torch.optim.AdamW(param_groups(model), lr=LR)
    else:
        model, mesh = case.split_model(torch.float64), mesh_of(*case.mesh)
        index, count = mesh["dp"].get_local_rank(), mesh["dp"].size()
        optimizer = ShardedAdamW(
            param_groups(model), lr=LR, process_group=mesh["dp"], gradient_sync=gradient_sync, bucket_mb=BUCKET_MB  # type: ignore[arg-type]
        )  # fmt: skip
    norms = []
    for step in range(4):
        case.loss(model, step, index, count).backward()
        norms.append(clip_some_way(way, model, None if gradient_sync is None else optimizer) or 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return Trained({name: whole(p) for name, p in model.named_parameters()}, {}, norms, 0)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_clip_equals_torchs(way: str, gradient_sync: str) -> None:
    results = on_ranks(4, train_clipping, SEQUENCE, way, gradient_sync)
    twin = train_clipping(SEQUENCE, way, None)
    assert min(twin.norms) > SMALL
    assert_equals_twin(results, twin, max_norm=SMALL)


def train_scaled(case: Case, poisoned_rank: int) -> list[float]:
    """Return loss scales and the number of skipped steps; a gradient of one rank is infinite in the third step."""
    mesh, model = mesh_of(*case.mesh), case.split_model()
    optimizer = ShardedAdamW(param_groups(model), lr=LR, process_group=mesh["dp"], bucket_mb=BUCKET_MB)
    scaler, scales = GradScaler("cpu", init_scale=1024.0, growth_interval=3), []
    for step in range(6):
        poison = None
        if (step, torch.distributed.get_rank()) == (2, poisoned_rank):
            poison = next(iter(model.parameters())).register_hook(lambda gradient: gradient * float("inf"))
        scaler.scale(case.loss(model, step, mesh["dp"].get_local_rank(), mesh["dp"].size())).backward()
        if poison is not None:
            poison.remove()
        if step % 2:
            scaler.unscale_(optimizer)
            assert MAX_NORM < optimizer.clip_grad_norm_(MAX_NORM) < 10
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return [*scales, float(optimizer.skipped_steps)]


@pytest.mark.parametrize("poisoned_rank", [1, pytest.param(2, marks=pytest.mark.long)])
def test_ranks_scale_losses_alike(poisoned_rank: int) -> None:
    for found in on_ranks(4, train_scaled, SEQUENCE, poisoned_rank):
        assert found == [1024.0, 1024.0, 512.0, 512.0, 512.0, 1024.0, 1.0]


# Gradients may have other placements than their parameters


def train_quadratics(names: list[str], training: Training, shape: tuple[int, int] = (7, 10)) -> Trained:
    mesh = mesh_of("dp tp", 2, 2)
    model = place_quadratics(Quadratics(names, shape), mesh["tp"])
    optimizer = adamw(training, param_groups(model), mesh["dp"])

    def backward(step: int) -> None:
        model(step, mesh["dp"].get_local_rank()).backward()
        if training.gradient_sync == "external":
            average_by_hand(model.parameters(), mesh["dp"].get_group())

    return train(training, [optimizer], backward, [model])


@pytest.mark.sweep(2)
@pytest.mark.parametrize("training", [Training(by_hand={}, steps=3), *TRAININGS[:3]], ids=lambda training: training.id)
def test_gradients_arrive_in_any_placement(training: Training) -> None:
    names = [f"{mine},{gradients}" for mine in list(TENSOR_PLACEMENTS)[:3] for gradients in TENSOR_PLACEMENTS]
    twin = train_twin(training, Quadratics(names, (7, 10)), lambda model, step: (model(step, 0) + model(step, 1)) / 2)
    assert_equals_twin(on_ranks(4, train_quadratics, names, training), twin)


# Formats


def train_in_format(precision: Precision, dtype: torch.dtype, is_split: bool) -> dict[str, Tensor]:
    """Return parameters and masters after training on 2 ranks, or on 2 x 2 with tensor parallelism."""
    model = Quadratics(["rows", "columns", "replicate"], (33, 40)).to(dtype)
    process_group = None
    if is_split:
        mesh = mesh_of("dp tp", 2, 2)
        process_group = mesh["dp"]
        place_quadratics(model, mesh["tp"])
    index = torch.distributed.get_rank() // (2 if is_split else 1)
    optimizer = ShardedAdamW(
        param_groups(model), lr=LR, process_group=process_group, precision=precision, bucket_mb=BUCKET_MB
    )
    for step in range(12):
        model(step, index).backward()
        assert optimizer.clip_grad_norm_(MAX_NORM) > MAX_NORM
        optimizer.step()
        optimizer.zero_grad()
    found = {name: whole(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{kind}": whole(value) for kind, value in optimizer.full_state(parameter).items()}
    return found


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [
        (torch.bfloat16, Precision(), 5e-6),
        (torch.bfloat16, Precision(master="fp32"), 5e-6),
        (torch.float16, Precision(master="split"), 5e-6),
        (torch.float32, Precision(moments="bf16"), 0.02 * 12 * LR),
        (torch.float32, Precision(moments="int8"), 0.08 * 12 * LR),
        (torch.bfloat16, Precision(moments="int8"), 0.08 * 12 * LR),
    ],
    ids=str,
)
def test_formats_are_kept_for_local_tensors(dtype: torch.dtype, precision: Precision, tolerance: float) -> None:
    """Exact formats give what data parallelism alone gives. Random rounding of other parts gives something close."""
    expected = on_ranks(2, train_in_format, precision, dtype, False)[0]
    exact = "{}.master" if dtype != torch.float32 else "{}"
    for found in on_ranks(4, train_in_format, precision, dtype, True):
        assert found.keys() == expected.keys()
        for name in ("rows", "columns", "replicate"):
            error = float((found[exact.format(name)] - expected[exact.format(name)]).abs().max())
            assert error <= (tolerance if name != "replicate" else 1e-5), f"{name}: differs by {error:.3g}"


# Everything stays what it was


def build_and_train(case: Case, path: Path) -> None:
    mesh, model = mesh_of(*case.mesh), case.split_model()
    calls: Counter[str] = Counter()
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: calls.update([f"after {name}"]))  # type: ignore[misc]
        p.register_hook(lambda _, name=name: calls.update([f"before {name}"]))

    def described() -> dict[str, Any]:
        tensors = {**dict(model.named_parameters()), **{f"state_dict.{n}": v for n, v in model.state_dict().items()}}
        return {
            name: (
                id(tensor) if isinstance(tensor, nn.Parameter) else None,
                type(tensor),
                getattr(tensor, "placements", None),
                getattr(tensor, "device_mesh", None),
                (tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad),
            )
            for name, tensor in tensors.items()
        }

    before = described()
    first_values = {name: whole(value) for name, value in model.state_dict().items()}
    optimizer = ShardedAdamW(param_groups(model), lr=LR, process_group=mesh["dp"], bucket_mb=BUCKET_MB)
    assert described() == before
    assert not differences(first_values, {name: whole(value) for name, value in model.state_dict().items()})
    for step in range(2):
        case.loss(model, step, mesh["dp"].get_local_rank(), mesh["dp"].size()).backward()
        assert all(
            calls[f"{when} {n}"] == step + 1 for when in ("before", "after") for n, _ in model.named_parameters()
        )
        optimizer.step()
        optimizer.zero_grad()
    assert described() == before
    trained = {name: whole(value) for name, value in model.state_dict().items()}
    assert len(differences(first_values, trained)) == len(trained)

    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=path)
    other = case.split_model()
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(other, state["model"])
    assert not differences(trained, {name: whole(value) for name, value in other.state_dict().items()})

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    set_model_state_dict(model, state["model"])  # into the bound parameters
    assert described() == before
    assert not differences(trained, {name: whole(value) for name, value in model.state_dict().items()})


@pytest.mark.sweep(2)
@pytest.mark.parametrize("case", [TRANSFORMER, CASES[4], GRID], ids=lambda case: case.id)
def test_parameters_hooks_and_state_dicts_stay_what_they_were(case: Case, tmp_path: Path) -> None:
    on_ranks(4, build_and_train, case, tmp_path)


def gradients_and_state(case: Case, gradient_sync: str) -> dict[str, Tensor]:
    mesh, model = mesh_of(*case.mesh), case.split_model(torch.float64)
    optimizer = ShardedAdamW(
        param_groups(model), lr=LR, process_group=mesh["dp"], bucket_mb=BUCKET_MB, gradient_sync=gradient_sync  # type: ignore[arg-type]
    )  # fmt: skip
    for step in range(3):
        case.loss(model, step, mesh["dp"].get_local_rank(), mesh["dp"].size()).backward()
        if gradient_sync == "external":
            average_by_hand(model.parameters(), mesh["dp"].get_group())
        if step < 2:
            optimizer.step()
            optimizer.zero_grad()
    found = {}
    for name, parameter in model.named_parameters():
        values = {"grad": optimizer.full_grad(parameter), **optimizer.full_state(parameter)}
        for kind, value in values.items():
            assert value is not None
            if isinstance(parameter, DTensor) and kind != "step":
                assert isinstance(value, DTensor), (name, kind)
                assert (value.placements, value.device_mesh) == (parameter.placements, parameter.device_mesh)
                assert value.shape == parameter.shape
            found[f"{name}.{kind}"] = whole(value)
    return found


@pytest.mark.sweep(2)
@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize("case", [CASES[4], GRID], ids=lambda case: case.id)
def test_full_gradients_and_states_are_placed_as_parameters(case: Case, gradient_sync: str) -> None:
    model = case.whole_model(torch.float64)
    optimizer = torch.optim.AdamW(param_groups(model), lr=LR)
    for step in range(3):
        optimizer.zero_grad()
        case.loss(model, step).backward()
        if step < 2:
            optimizer.step()
    expected: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected |= {f"{name}.{kind}": value for kind, value in optimizer.state[parameter].items()}
        expected[f"{name}.grad"] = parameter.grad
    for found in on_ranks(4, gradients_and_state, case, gradient_sync):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-12, check_dtype=False)


# Memory


def state_bytes(case: Case) -> int:
    mesh, model = mesh_of(*case.mesh), case.split_model()
    optimizer = ShardedAdamW(param_groups(model), process_group=mesh["dp"])
    case.loss(model, 0, mesh["dp"].get_local_rank(), mesh["dp"].size()).backward()
    optimizer.step()
    return optimizer.memory().state


@pytest.mark.parametrize("model", ["transformer", "sequence"])
def test_state_takes_a_fourth_of_adamws(model: str) -> None:
    case = Case(model, sizes=LARGE)
    whole_model = case.whole_model()
    expected = bytes_of_adamw(whole_model, case.loss(whole_model, 0)) / 4
    for found in on_ranks(4, state_bytes, case):
        assert found == pytest.approx(expected, rel=0.01)
