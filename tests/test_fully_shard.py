# SPDX-License-Identifier: Apache-2.0
"""fully_shard (FSDP2) with ``gradient_sync="external"``: the state of each local shard lives here, and training equals
torch's AdamW under FSDP2 and in one process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from shardadam import ShardedAdamW
from tests.parallel_models import (
    Sizes,
    Transformer,
    apply_tensor_parallel,
    batch_of,
    cross_entropy,
    mesh_of,
    part_of,
)
from tests.parallel_training import (
    LR,
    Trained,
    Training,
    adamw,
    assert_equals_twin,
    broken,
    bytes_of_adamw,
    local,
    param_groups,
    refuses,
    train,
    train_twin,
    whole,
)
from tests.ranks import on_ranks

UNEVEN = Sizes(blocks=1, vocabulary=13, hidden=7)
LARGE = Sizes(blocks=1, vocabulary=600, width=128, hidden=512, length=4, batch=2)
EXTERNAL = Training(gradient_sync="external")


@dataclass(frozen=True)
class Case:
    """A mesh: "shard" and perhaps "replicate" (hybrid sharding) and "tp" (tensor parallelism).

    Args:
        low_precision: compute and gather in bfloat16.
    """

    mesh: tuple[Any, ...] = ("shard", 4)
    frozen: bool = False
    low_precision: bool = False
    sizes: Sizes = UNEVEN

    @property
    def id(self) -> str:
        return ",".join([self.mesh[0], *["frozen"] * self.frozen, *["bf16"] * self.low_precision])

    def whole_model(self, dtype: torch.dtype) -> Transformer:
        model = Transformer(self.sizes).to(dtype)
        if self.frozen:
            for parameter in model.blocks["0"].get_submodule("attention").parameters():
                parameter.requires_grad_(False)
        return model

    def loss(self, model: nn.Module, step: int, index: int = 0, count: int = 1) -> Tensor:
        tokens, targets = part_of(batch_of(self.sizes, step), index, count)
        return cross_entropy(model(tokens), targets)

    def sharded_model(self, dtype: torch.dtype) -> Transformer:
        """Collective over the mesh."""
        model, mesh = self.whole_model(dtype), mesh_of(*self.mesh)
        if "tp" in self.mesh[0]:
            apply_tensor_parallel(model, mesh["tp"])
        policy = MixedPrecisionPolicy()
        if self.low_precision:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        over = mesh["replicate", "shard"] if "replicate" in self.mesh[0] else mesh["shard"]
        for block in model.blocks.values():
            fully_shard(block, mesh=over, mp_policy=policy)
        fully_shard(model, mesh=over, mp_policy=policy)
        return model


class TorchAdamW(torch.optim.AdamW):
    """With the methods of ``ShardedAdamW`` that training calls. Parameters may lie on several meshes."""

    norm: Tensor

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = torch.stack([whole(torch.linalg.vector_norm(gradient)) for gradient in gradients]).norm()
        for gradient in gradients:
            gradient *= min(1.0, max_norm / (float(self.norm) + 1e-6))
        self.skipped_steps = getattr(self, "skipped_steps", 0) + int(not self.norm.isfinite())
        return self.norm

    def step(self) -> None:  # type: ignore[override]
        if self.norm.isfinite():
            super().step()


def train_sharded(case: Case, training: Training, with_torch: bool = False) -> Trained:
    model, mesh = case.sharded_model(training.dtype), mesh_of(*case.mesh)
    sizes = dict(zip(case.mesh[0].split(), mesh.shape, strict=True))
    data_ranks = 4 // sizes.get("tp", 1)
    index = torch.distributed.get_rank() // sizes.get("tp", 1)
    storage = {name: local(p).data_ptr() for name, p in model.named_parameters()}
    if with_torch:
        optimizer: Any = TorchAdamW(param_groups(model), lr=LR, foreach=False)
    else:
        optimizer = adamw(training, param_groups(model), mesh["shard"] if "tp" in sizes else None)

    def backward(step: int) -> None:
        for micro in range(training.accumulate):
            part = micro * data_ranks + index
            (case.loss(model, step, part, training.accumulate * data_ranks) / training.accumulate).backward()

    trained = train(training, [optimizer], backward, [model])
    assert {name: local(p).data_ptr() for name, p in model.named_parameters()} == storage
    return trained


CASES = [
    Case(),
    Case(frozen=True),
    Case(("replicate shard", 2, 2)),
    Case(("shard tp", 2, 2)),
    Case(low_precision=True),
]
TRAININGS = [EXTERNAL, replace(EXTERNAL, clip="constructor"), replace(EXTERNAL, accumulate=2, dtype=torch.float64)]


@pytest.mark.sweep(1)
@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.id)
def test_the_model_equals_its_twin_with_torch(case: Case) -> None:
    training = replace(EXTERNAL, dtype=torch.float64, steps=4)
    results = on_ranks(4, train_sharded, case, training, True)
    assert_equals_twin(results, train_twin(training, case.whole_model(training.dtype), case.loss))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: training.id)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_torch_under_fully_shard(case: Case, training: Training) -> None:
    if case.low_precision:
        training = replace(training, dtype=torch.float32)
    results = on_ranks(4, train_sharded, case, training)
    expected = on_ranks(4, train_sharded, case, replace(training, clip="call"), True)[0]
    assert_equals_twin(results, expected)


@pytest.mark.parametrize("poisoned_rank", [3, pytest.param(0, marks=pytest.mark.long)])
@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[3], marks=pytest.mark.long)], ids=lambda case: case.id)
def test_a_gradient_that_is_nan_on_one_rank_is_skipped_on_all(case: Case, poisoned_rank: int) -> None:
    training = replace(EXTERNAL, poisoned=(5, poisoned_rank), steps=8)
    twin = train_twin(training, case.whole_model(training.dtype), case.loss)
    assert twin.skipped == 1
    assert_equals_twin(on_ranks(4, train_sharded, case, training), twin)


@pytest.mark.parametrize("mutant", ["each copy counts in the norm", "parts of the model stay apart"])
def test_the_comparison_refuses_broken_optimizers(mutant: str) -> None:
    case, training = CASES[3], replace(EXTERNAL, steps=2)
    twin = train_twin(training, case.whole_model(training.dtype), case.loss)
    assert refuses(on_ranks(4, broken, mutant, train_sharded, case, training), twin)


def state_bytes(case: Case) -> int:
    optimizer = ShardedAdamW(param_groups(case.sharded_model(torch.float32)), gradient_sync="external")
    return optimizer.memory().state


def test_state_takes_a_fourth_of_adamws() -> None:
    case = Case(sizes=replace(LARGE, width=256))
    model = case.whole_model(torch.float32)
    expected = bytes_of_adamw(model, case.loss(model, 0)) / 4
    for found in on_ranks(4, state_bytes, case):
        assert found == pytest.approx(expected, rel=0.01)
