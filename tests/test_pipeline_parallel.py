# SPDX-License-Identifier: Apache-2.0
"""Pipeline parallelism, alone and beside tensor and data parallelism, equals torch's AdamW on the whole model.

Each stage has an optimizer over its own parameters. The stages agree on one norm and one verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _PipelineSchedule

from tests.parallel_models import (
    Sizes,
    Transformer,
    apply_tensor_parallel,
    batch_of,
    cross_entropy,
    mesh_of,
    part_of,
    stage_of,
)
from tests.parallel_training import (
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
)
from tests.ranks import on_ranks

SIZES = Sizes(blocks=2)
SCHEDULES: dict[str, Any] = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe, "interleaved": ScheduleInterleaved1F1B}


@dataclass(frozen=True)
class Case:
    """A schedule on a mesh with dimensions "dp", "pp" and perhaps "tp".

    Args:
        frozen_stage: the stage whose parameters are frozen, or None.
        sequence_parallel: beside tensor parallelism.
    """

    schedule: str = "1F1B"
    mesh: tuple[Any, ...] = ("dp pp", 2, 2)
    frozen_stage: int | None = None
    sequence_parallel: bool = False
    width: int = SIZES.width

    @property
    def id(self) -> str:
        frozen = "" if self.frozen_stage is None else f",frozen={self.frozen_stage}"
        return f"{self.schedule},{self.mesh[0]}{frozen}{',sequence' if self.sequence_parallel else ''}"

    @property
    def sizes(self) -> Sizes:
        return replace(SIZES, width=self.width, blocks=4 if self.schedule == "interleaved" else 2)

    @property
    def stages(self) -> int:
        pipeline = self.mesh[1 + self.mesh[0].split().index("pp")]
        return int(pipeline * (2 if self.schedule == "interleaved" else 1))

    @property
    def has_idle_stage(self) -> bool:
        """Whether a stage has nothing to train."""
        return self.frozen_stage is not None or self.stages > self.sizes.blocks + 1

    def whole_model(self, dtype: torch.dtype = torch.float32) -> Transformer:
        model = Transformer(self.sizes).to(dtype)
        if self.frozen_stage is not None:
            frozen = stage_of(Transformer(self.sizes), self.frozen_stage, self.stages)
            for name, _ in frozen.named_parameters():
                model.get_parameter(name).requires_grad_(False)
        return model

    def loss(self, model: nn.Module, step: int) -> Tensor:
        tokens, targets = batch_of(self.sizes, step)
        return cross_entropy(model(tokens), targets)


@dataclass
class Parts:
    """What a rank holds: stages, each with its optimizer."""

    models: list[Transformer]
    stages: list[PipelineStage]
    optimizers: list[Any]


def build(case: Case, training: Training) -> Parts:
    mesh, parts = mesh_of(*case.mesh), Parts([], [], [])
    data, pipeline, tensor = mesh["dp"], mesh["pp"], mesh["tp"] if "tp" in case.mesh[0] else None
    for index in range(pipeline.get_local_rank(), case.stages, pipeline.size()):
        model = stage_of(case.whole_model(training.dtype), index, case.stages)
        if tensor is not None:
            apply_tensor_parallel(model, tensor, sequence_parallel=case.sequence_parallel)
        parts.models.append(model)
        parts.stages.append(PipelineStage(model, index, case.stages, torch.device("cpu"), group=pipeline.get_group()))
        parts.optimizers.append(
            adamw(
                training,
                param_groups(model),
                data,
                copies_of_plain=1 if tensor is None else tensor.size(),
                model_parallel_group=pipeline if tensor is None else mesh["pp", "tp"],
            )
        )
    return parts


def backward_of(case: Case, training: Training, parts: Parts) -> Callable[[int], None]:
    """Return the function that runs the schedule with this rank's part of a step's batch."""
    mesh = mesh_of(*case.mesh)
    data, pipeline = mesh["dp"], mesh["pp"]

    # With "backward", gradients leave p.grad before the schedule could divide them: the loss is divided instead.
    divides = training.by_hand is None and training.gradient_sync == "backward"

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets) / (microbatches if divides else 1)

    microbatches = pipeline.size()
    one_or_all = parts.stages if case.schedule == "interleaved" else parts.stages[0]
    schedule: _PipelineSchedule = SCHEDULES[case.schedule](
        one_or_all, microbatches, loss_fn=loss_of, scale_grads=not divides
    )
    is_first, is_last = pipeline.get_local_rank() == 0, pipeline.get_local_rank() == pipeline.size() - 1

    def backward(step: int) -> None:
        tokens, targets = part_of(batch_of(case.sizes, step), data.get_local_rank(), data.size())
        schedule.step(*[tokens] * is_first, target=targets if is_last else None)
        if training.gradient_sync == "external":
            average_by_hand([p for model in parts.models for p in model.parameters()], data.get_group())

    return backward


def train_split(case: Case, training: Training) -> Trained:
    parts = build(case, training)
    return train(training, parts.optimizers, backward_of(case, training, parts), parts.models)


def twin_of(case: Case, training: Training) -> Trained:
    return train_twin(training, case.whole_model(training.dtype), case.loss)


def suited_to(case: Case, training: Training) -> Training:
    if case.schedule == "interleaved" and training.clip == "constructor":
        training = replace(training, clip="call")
    if case.has_idle_stage:  # which returns the norm in float32
        training = replace(training, dtype=torch.float32)
    return training


CASES = [
    Case(),
    Case("GPipe", ("pp dp", 2, 2)),
    Case("1F1B", ("dp pp", 1, 4)),  # the third stage has no parameters
    Case(frozen_stage=1),
    Case("interleaved"),
    Case("1F1B", ("dp pp tp", 1, 2, 2)),
    Case("GPipe", ("dp pp tp", 1, 2, 2), sequence_parallel=True),
]
TRAININGS = [
    *(Training(gradient_sync=sync) for sync in ("backward", "step", "external")),
    Training(dtype=torch.float64),
    Training(clip="constructor", options={"transport": "collective"}),
    Training(gradient_sync="step", dtype=torch.float64, options={"transport": "collective"}),
    Training(options={"bucket_mb": 32}),
]


# The judge


@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_split_models_equal_their_twins_without_the_sharded_optimizer(case: Case) -> None:
    training = Training(dtype=torch.float64, by_hand={}, steps=4)
    assert_equals_twin(on_ranks(4, train_split, case, training), twin_of(case, training))


@pytest.mark.parametrize("wrong", ["copies_count", "norm_of_each_rank"])
def test_the_comparison_refuses_wrong_norms(wrong: str) -> None:
    training = Training(by_hand={wrong: True}, steps=2)
    assert refuses(on_ranks(4, train_split, CASES[0], training), twin_of(CASES[0], training))


@pytest.mark.parametrize("mutant", ["parts of the model stay apart"])
def test_the_comparison_refuses_broken_optimizers(mutant: str) -> None:
    training = Training(steps=2)
    assert refuses(on_ranks(4, broken, mutant, train_split, CASES[0], training), twin_of(CASES[0], training))


# It trains like torch's AdamW


@pytest.mark.sweep(4)
@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.id)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_torch_on_the_whole_model(case: Case, training: Training) -> None:
    training = suited_to(case, training)
    assert_equals_twin(on_ranks(4, train_split, case, training), twin_of(case, training))


@pytest.mark.long
@pytest.mark.parametrize("training", TRAININGS[:4], ids=lambda training: training.id)
@pytest.mark.parametrize(
    "case",
    [
        Case(mesh=("dp pp tp", 2, 2, 2)),
        Case(mesh=("pp dp tp", 2, 2, 2), sequence_parallel=True),
        Case("interleaved", ("dp pp tp", 2, 2, 2)),
        Case("GPipe", ("pp dp tp", 2, 2, 2), frozen_stage=1),
    ],
    ids=lambda case: case.id,
)
def test_equals_torch_on_eight_ranks(case: Case, training: Training) -> None:
    training = replace(suited_to(case, training), steps=6)
    assert_equals_twin(on_ranks(8, train_split, case, training), twin_of(case, training))


@pytest.mark.sweep(1)
@pytest.mark.parametrize("poisoned_rank", [0, 1, 2, 3])
@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=lambda case: case.id)
def test_a_gradient_that_is_nan_on_one_rank_is_skipped_on_all(
    case: Case, gradient_sync: str, poisoned_rank: int
) -> None:
    training = Training(gradient_sync=gradient_sync, poisoned=(5, poisoned_rank), steps=8)
    twin = twin_of(case, training)
    assert twin.skipped == 1
    assert_equals_twin(on_ranks(4, train_split, case, training), twin)


# Memory


def state_bytes(case: Case) -> int:
    return sum(optimizer.memory().state for optimizer in build(case, Training(options={"bucket_mb": None})).optimizers)


@pytest.mark.parametrize("case", [Case(width=256), Case(mesh=("dp pp tp", 1, 2, 2), width=256)], ids=lambda c: c.id)
def test_states_of_all_ranks_take_adamws(case: Case) -> None:
    model = case.whole_model()
    expected = bytes_of_adamw(model, case.loss(model, 0))
    assert sum(on_ranks(4, state_bytes, case)) == pytest.approx(expected, rel=0.01)
