# SPDX-License-Identifier: Apache-2.0
"""Tensor and sequence parallelism beside data parallelism equal torch's AdamW on the whole model in one process."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from shardadam import Precision, ShardedAdamW
from tests.parallel_models import (
    Grid,
    Sizes,
    Transformer,
    apply_tensor_parallel,
    batch_of,
    cross_entropy,
    grid_batch_of,
    mesh_of,
    part_of,
    place_grid,
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
    local,
    param_groups,
    refuses,
    train,
    train_twin,
    whole,
)
from tests.ranks import on_ranks

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
            return (model(inputs) - targets).square().mean()
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


@pytest.mark.sweep(3)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_split_models_equal_their_twins_without_the_sharded_optimizer(case: Case) -> None:
    training = Training(dtype=torch.float64, by_hand={}, steps=4)
    assert_equals_twin(on_ranks(4, train_split, case, training), twin_of(case, training))


@pytest.mark.parametrize("wrong", ["copies_count", "norm_of_each_rank"])
def test_the_comparison_refuses_wrong_norms(wrong: str) -> None:
    training = Training(by_hand={wrong: True}, steps=2)
    assert refuses(on_ranks(4, train_split, TRANSFORMER, training), twin_of(TRANSFORMER, training))


# It trains like torch's AdamW


@pytest.mark.sweep(6)
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


@pytest.mark.sweep(2)
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
