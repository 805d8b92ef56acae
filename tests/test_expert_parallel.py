# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism inside data parallelism equals torch's AdamW on the whole model in one process.

Experts are spread over ranks, tokens travel to them by all-to-all, and each expert's parameters are in a param group
whose "process_group" is the ranks that hold the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardadam import ShardedAdamW
from tests.parallel_models import (
    ExpertModel,
    Sizes,
    apply_expert_parallel,
    batch_of,
    cross_entropy,
    mesh_of,
    part_of,
)
from tests.parallel_training import (
    ParamGroups,
    Trained,
    Training,
    adamw,
    assert_equals_twin,
    average_by_hand,
    broken,
    bytes_of_adamw,
    group_of,
    param_groups,
    refuses,
    train,
    train_twin,
)
from tests.ranks import on_ranks, rank_and_size

SIZES = Sizes(vocabulary=40, hidden=7)
COUNT = 4
TOKENS = torch.arange(SIZES.vocabulary)
TABLES = {
    "equal": [TOKENS % COUNT, TOKENS // 10],
    "unequal": [(TOKENS % 7).clamp(max=3), TOKENS.sqrt().long().clamp(max=3)],
    "unused": [TOKENS % 2 * 3, TOKENS % 3],  # experts 1 and 2, and expert 3: no tokens in any batch
    # Few tokens go to experts 1 to 3: in some steps on some ranks, or on none.
    "rare": [(TOKENS - 36).clamp(min=0), torch.where(TOKENS < 39, 0, 2)],
}


@dataclass(frozen=True)
class Case:
    """Which expert each token goes to, and how experts are spread.

    Args:
        mesh: "copies" of each expert, the ranks that split the "experts", and "tp", which splits embedding and head.
        stacked: experts are parts of DTensors over the mesh "experts".
        hybrid: the state of dense parameters has replicas, as experts have copies.
    """

    table: str = "unequal"
    mesh: tuple[Any, ...] = ("copies experts", 2, 2)
    stacked: bool = False
    hybrid: bool = False
    sizes: Sizes = SIZES

    @property
    def id(self) -> str:
        options = [name for name in ("stacked", "hybrid") if getattr(self, name)]
        return ",".join([self.table, self.mesh[0], "x".join(map(str, self.mesh[1:])), *options])

    @property
    def tensor_parallel(self) -> int:
        return int(self.mesh[-1]) if "tp" in self.mesh[0] else 1

    def whole_model(self, dtype: torch.dtype = torch.float32) -> ExpertModel:
        return ExpertModel(TABLES[self.table], self.sizes, COUNT, self.stacked).to(dtype)

    def loss(self, model: nn.Module, step: int, index: int = 0, count: int = 1) -> Tensor:
        """The loss of one of ``count`` equal parts of a batch."""
        tokens, targets = part_of(batch_of(self.sizes, step), index, count)
        return cross_entropy(model(tokens), targets)


def with_experts_apart(groups: ParamGroups, process_group: DeviceMesh) -> ParamGroups:
    """Move the parameters of experts into param groups of their own."""
    apart: ParamGroups = []
    for group in groups:
        of_experts = [(name, p) for name, p in group["params"] if ".experts." in name]
        others = [(name, p) for name, p in group["params"] if ".experts." not in name]
        apart.append({**group, "params": others})
        apart.append({**group, "params": of_experts, "process_group": process_group})
    return [group for group in apart if group["params"]]


def split_model(case: Case, dtype: torch.dtype = torch.float32) -> tuple[ExpertModel, ParamGroups]:
    mesh = mesh_of(*case.mesh)
    model = apply_expert_parallel(case.whole_model(dtype), mesh["experts"])
    if case.tensor_parallel > 1:
        embedding = RowwiseParallel(input_layouts=Replicate())
        head = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(model, mesh["tp"], {"embedding": embedding, "head": head})
    return model, with_experts_apart(param_groups(model), mesh["copies"])


def data_parallel(case: Case) -> Any:
    """Return the process group of the optimizer. Collective."""
    mesh = mesh_of(*case.mesh)
    if case.hybrid:
        return mesh["copies", "experts"]
    if case.tensor_parallel == 1:
        return None
    return flat_mesh(case.mesh)


@cache
def flat_mesh(mesh: tuple[Any, ...]) -> DeviceMesh:
    return mesh_of(*mesh)["copies", "experts"]._flatten("data")


def train_split(case: Case, training: Training, group_options: dict[str, Any] | None = None) -> Trained:
    rank, size = (number // case.tensor_parallel for number in rank_and_size())
    model, groups = split_model(case, training.dtype)
    for group in groups:
        group |= (group_options or {}) if "process_group" in group else {}
    process_group = data_parallel(case)
    averaged = [  # before the optimizer takes the param groups: it changes them, as torch's do
        ([p for _, p in group["params"]], group.get("process_group", None if case.hybrid else process_group))
        for group in groups
    ]
    optimizer = adamw(training, groups, process_group, copies_of_plain=case.tensor_parallel)

    def backward(step: int) -> None:
        for micro in range(training.accumulate):
            index, count = micro * size + rank, training.accumulate * size
            (case.loss(model, step, index, count) / training.accumulate).backward()
        if training.gradient_sync == "external":
            for parameters, over in averaged:
                average_by_hand(parameters, group_of(over), size)

    return train(training, [optimizer], backward, [model])


def twin_of(case: Case, training: Training) -> Trained:
    return train_twin(training, case.whole_model(training.dtype), case.loss)


CASES = [
    *(Case(table) for table in TABLES),
    Case("unequal", ("experts copies", 2, 2)),
    Case("unequal", ("copies experts", 1, 4)),
    Case("rare", ("copies experts", 1, 4)),
    Case("equal", ("copies experts", 4, 1)),
    Case("unequal", stacked=True),
    Case("equal", ("copies experts", 1, 4), stacked=True),
    Case("unequal", hybrid=True),
    Case("unequal", ("copies experts tp", 1, 2, 2)),
]
TRAININGS = [
    *(Training(gradient_sync=sync) for sync in ("backward", "step", "external")),
    Training(dtype=torch.float64),
    Training(accumulate=2, dtype=torch.float64),
    Training(gradient_sync="step", accumulate=2),
    Training(gradient_sync="external", clip="constructor"),
    Training(clip="constructor", options={"transport": "collective"}),
    Training(gradient_sync="step", options={"transport": "collective"}),
    Training(options={"bucket_mb": 32}),
]


# The judge


@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_split_models_equal_their_twins_without_the_sharded_optimizer(case: Case) -> None:
    training = Training(dtype=torch.float64, by_hand={}, steps=6)
    assert_equals_twin(on_ranks(4, train_split, case, training), twin_of(case, training))


@pytest.mark.parametrize("wrong", ["copies_count", "experts_are_averaged"])
def test_the_comparison_refuses_wrong_divisors_and_norms(wrong: str) -> None:
    case = Case(mesh=("copies experts", 2, 2))
    training = Training(by_hand={wrong: True}, steps=2)
    assert refuses(on_ranks(4, train_split, case, training), twin_of(case, training))


@pytest.mark.parametrize("mutant", ["experts' gradients are averaged over copies"])
def test_the_comparison_refuses_broken_optimizers(mutant: str) -> None:
    training = Training(steps=2)
    assert refuses(
        on_ranks(4, broken, mutant, train_split, Case(table="equal"), training), twin_of(Case(table="equal"), training)
    )


# It trains like torch's AdamW


@pytest.mark.sweep(3)
@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.id)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_torch_on_the_whole_model(case: Case, training: Training) -> None:
    assert_equals_twin(on_ranks(4, train_split, case, training), twin_of(case, training))


@pytest.mark.long
@pytest.mark.parametrize("training", TRAININGS[:4], ids=lambda training: training.id)
@pytest.mark.parametrize("stacked", [False, True])
def test_equals_torch_on_eight_ranks(stacked: bool, training: Training) -> None:
    case, training = Case("rare", ("copies experts tp", 2, 2, 2), stacked=stacked), replace(training, steps=6)
    case = replace(case, table="unequal") if stacked else case
    assert_equals_twin(on_ranks(8, train_split, case, training), twin_of(case, training))


def test_gradients_are_divided_by_the_divisor_of_their_group() -> None:
    training = Training(steps=2)
    for divisor, is_refused in ((4, False), (2, True)):
        results = on_ranks(4, train_split, Case(), training, {"gradient_divisor": divisor})
        assert refuses(results, twin_of(Case(), training)) == is_refused


@pytest.mark.sweep(1)
@pytest.mark.parametrize("poisoned_rank", [0, 1, 2, 3])
@pytest.mark.parametrize("gradient_sync", ["backward", "step", "external"])
@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=lambda case: case.id)
def test_a_gradient_that_is_nan_on_one_rank_is_skipped_on_all(
    case: Case, gradient_sync: str, poisoned_rank: int
) -> None:
    training = Training(gradient_sync=gradient_sync, poisoned=(5, poisoned_rank), steps=8)
    twin = twin_of(case, training)
    assert twin.skipped == 1
    assert_equals_twin(on_ranks(4, train_split, case, training), twin)


# Memory


def state_bytes(case: Case) -> int:
    rank, size = rank_and_size()
    model, groups = split_model(case)
    optimizer = ShardedAdamW(groups)
    case.loss(model, 0, rank, size).backward()
    optimizer.step()
    return optimizer.memory().state


@pytest.mark.parametrize("mesh", [("copies experts", 2, 2), ("copies experts", 1, 4)], ids=str)
def test_state_takes_a_fourth_of_adamws(mesh: tuple[Any, ...]) -> None:
    """Dense parameters are split over four ranks; those of an expert over its copies, and ranks hold parts of them."""
    case = Case("equal", mesh, sizes=replace(SIZES, width=256, hidden=128))
    model = case.whole_model()
    expected = bytes_of_adamw(model, case.loss(model, 0)) / 4
    for found in on_ranks(4, state_bytes, case):
        assert found == pytest.approx(expected, rel=0.01)
