# SPDX-License-Identifier: Apache-2.0
"""What cannot be trained on a mesh is refused at construction, on all ranks, and says what it expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardadam
from shardadam import ShardedAdamW, transport
from tests.ranks import on_ranks, rank_and_size


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


@cache
def groups() -> dict[tuple[int, ...], dist.ProcessGroup]:
    """Groups by their ranks, which all ranks build."""
    return {ranks: dist.new_group(list(ranks)) for ranks in ((0, 1), (1, 2), (2, 3), (0, 2), (0,), (1,), (2,), (3,))}


def on_mesh(mesh: Any, placement: Any = None, shape: tuple[int, ...] = (8, 4)) -> Any:
    torch.manual_seed(0)
    return nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [placement or Shard(0)]))  # type: ignore[no-untyped-call, unused-ignore]


def plain() -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(6, 3))


def overlapping_meshes() -> Any:
    return ShardedAdamW([on_mesh(mesh()["tp"])])


def fully_sharded_without_external() -> Any:
    return ShardedAdamW([on_mesh(mesh()["dp"])], process_group=mesh()["dp"])


def meshes_that_ranks_do_not_share() -> Any:
    """Data-parallel ranks hold different parts."""
    crossed = DeviceMesh("cpu", [[0, 1], [3, 2]], mesh_dim_names=("data", "model"))
    return ShardedAdamW([on_mesh(crossed["model"])], process_group=mesh()["dp"])


def other_placements() -> Any:
    rank, _ = rank_and_size()
    return ShardedAdamW([on_mesh(mesh()["tp"], Shard(0) if rank < 2 else Replicate())], process_group=mesh()["dp"])


def experts_in_two_groups() -> Any:
    rank, _ = rank_and_size()
    group = groups()[{0: (0, 1), 1: (1, 2), 2: (1, 2), 3: (3,)}[rank]]
    return ShardedAdamW([{"params": [plain()]}, {"params": [plain()], "process_group": group}])


def experts_outside() -> Any:
    return ShardedAdamW(
        [{"params": [plain()]}, {"params": [plain()], "process_group": mesh()["tp"]}], process_group=mesh()["dp"]
    )


def other_experts_in_one_group() -> Any:
    rank, _ = rank_and_size()
    expert = nn.Parameter(torch.zeros(6 + rank // 2, 3))
    return ShardedAdamW([{"params": [plain()]}, {"params": [expert], "process_group": mesh()["dp"]}])


def divided_by(divisor: Any) -> Any:
    return ShardedAdamW([{"params": [plain()], "gradient_divisor": divisor}])


def external_divisor() -> Any:
    return ShardedAdamW([{"params": [plain()], "gradient_divisor": 2.0}], gradient_sync="external")


def the_same_group_twice() -> Any:
    return ShardedAdamW([plain()], process_group=mesh()["dp"], model_parallel_group=mesh()["dp"])


def a_group_without_the_dtensors_ranks() -> Any:
    rank, _ = rank_and_size()
    return ShardedAdamW([on_mesh(mesh()["tp"])], process_group=mesh()["dp"], model_parallel_group=groups()[(rank,)])


def no_grid() -> Any:
    """Ranks 1 and 3 hold no other part of the copy of ranks 0 and 2."""
    rank, _ = rank_and_size()
    data, model = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}[rank], {0: (0, 2), 1: (1,), 2: (0, 2), 3: (3,)}[rank]
    return ShardedAdamW([plain()], process_group=groups()[data], model_parallel_group=groups()[model])


def a_divisor_in_a_later_group() -> Any:
    optimizer = ShardedAdamW([plain()])
    try:
        optimizer.add_param_group({"params": [plain()], "gradient_divisor": -1.0})
    finally:
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": [plain()], "gradient_divisor": 1.0})  # nothing is left of the refused one
    raise AssertionError


def dtensors_in_a_later_group() -> Any:
    optimizer = ShardedAdamW([plain()], process_group=mesh()["dp"])
    optimizer.add_param_group({"params": [on_mesh(mesh()["tp"])]})


CASES: list[tuple[Callable[[], Any], type[Exception], str, int]] = [
    (overlapping_meshes, ValueError, r"DTensor on ranks \[0, 1\].*process_group has ranks \[0, 1, 2, 3\]", 2),
    (fully_sharded_without_external, ValueError, 'gradient_sync="external"', 4),
    (meshes_that_ranks_do_not_share, ValueError, r"Ranks disagree on parameter .*: part ", 4),
    (other_placements, ValueError, r"Ranks disagree on parameter .*: placements", 4),
    (experts_in_two_groups, ValueError, r"Param group 1, process_group: rank 0 gives the ranks \(0, 1\), rank 1 ", 4),
    (experts_outside, ValueError, r"Param group 1, process_group: found ranks \[0, 1\], expected some of", 2),
    (other_experts_in_one_group, ValueError, r"Ranks disagree on parameter .*: shape", 4),
    (partial(divided_by, 0), ValueError, "gradient_divisor: found 0, expected a positive number", 4),
    (partial(divided_by, float("nan")), ValueError, "gradient_divisor: found nan", 4),
    (partial(divided_by, "two"), TypeError, "gradient_divisor: found 'two'", 4),
    (external_divisor, ValueError, "other code averages the gradients", 4),
    (the_same_group_twice, ValueError, "groups that share this rank only", 4),
    (a_group_without_the_dtensors_ranks, ValueError, "expected also those that hold other parts", 4),
    (no_grid, ValueError, "number of model-parallel ranks: 2 on rank [02], 1 on rank [13]", 4),
    (a_divisor_in_a_later_group, ValueError, "gradient_divisor: found -1.0", 4),
    (dtensors_in_a_later_group, ValueError, "Pass model_parallel_group to its constructor", 4),
]


def refusal_of(build: Callable[[], Any]) -> tuple[str, str]:
    try:
        build()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: case[0].__name__ if hasattr(case[0], "__name__") else str(case[0].args)
)
def test_what_does_not_fit_the_meshes_is_refused_on_all_ranks(
    case: tuple[Callable[[], Any], type[Exception], str, int],
) -> None:
    build, kind, message, own = case
    found = on_ranks(4, refusal_of, build)
    with_message = [text for name, text in found if name == kind.__name__ and re.search(message, text)]
    assert len(with_message) >= own, found
    assert all(name in (kind.__name__, "RuntimeError") for name, _ in found), found


def clip_nothing() -> list[str]:
    optimizer = ShardedAdamW([plain()], max_grad_norm=1.0)
    other: Any = torch.optim.SGD([plain()])
    return [
        refusal_of(partial(shardadam.clip_grad_norm_, given, 1.0))[1]
        for given in ([], [other, other], [optimizer, other])
    ]


def test_optimizers_that_cannot_be_clipped_together_are_refused() -> None:
    for nothing, twice, clips in on_ranks(2, clip_nothing):
        assert "found 0 optimizers" in nothing and "each once" in twice and "Leave max_grad_norm out" in clips


def gan(max_norm: float) -> tuple[Tensor, Tensor]:
    rank, world_size = rank_and_size()
    torch.manual_seed(0)
    one, two, three = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
    twins = [nn.Linear(4, 3) for _ in range(3)]
    for layer, twin in zip((one, two, three), twins, strict=True):
        twin.load_state_dict(layer.state_dict())
    sharded = [ShardedAdamW(one.parameters()), ShardedAdamW(two.parameters(), gradient_sync="step")]
    other = torch.optim.SGD(three.parameters(), lr=0.1)
    inputs = [torch.randn(5, 4, generator=torch.Generator().manual_seed(r)) for r in range(world_size)]
    sum(layer(inputs[rank]).square().mean() for layer in (one, two, three)).backward()
    sharded[0].average_gradients(three.parameters())
    norm = shardadam.clip_grad_norm_([*sharded, other], max_norm)
    loss = sum(twin(x).square().mean() for x in inputs for twin in twins) / world_size
    loss.backward()
    parameters = [p for twin in twins for p in twin.parameters()]
    expected = nn.utils.clip_grad_norm_(parameters, max_norm)
    found = [
        g
        for layer, o in zip((one, two), sharded, strict=True)
        for p in layer.parameters()
        if (g := o.full_grad(p)) is not None
    ]
    found += [p.grad for p in three.parameters() if p.grad is not None]
    for gradient, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)
    return norm, expected


@pytest.mark.parametrize("max_norm", [0.01, 100.0])
def test_several_optimizers_are_clipped_by_one_norm(max_norm: float) -> None:
    for norm, expected in on_ranks(2, gan, max_norm):
        torch.testing.assert_close(norm.float(), expected, rtol=1e-5, atol=0)


def skip_together() -> list[int]:
    rank, _ = rank_and_size()
    one, two = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizers = [ShardedAdamW(one.parameters()), ShardedAdamW(two.parameters())]
    for _ in range(2):
        (one(torch.ones(1, 4)).sum() * (float("nan") if rank == 1 else 1.0) + two(torch.ones(1, 4)).sum()).backward()
        before = two.weight.clone()
        shardadam.clip_grad_norm_(optimizers, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(before, two.weight)
    return [int(optimizer.skipped_steps) for optimizer in optimizers]


def test_several_optimizers_skip_together() -> None:
    assert on_ranks(2, skip_together) == [[2, 2], [2, 2]]


def test_groups_of_a_job_that_is_no_grid_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    between_parts = mock.Mock()
    monkeypatch.setattr(transport, "comm_groups_over", lambda _: None)
    monkeypatch.setattr(transport, "_connect_collective", lambda _: between_parts)
    monkeypatch.setattr(transport, "ranks_of_job", mock.Mock(side_effect=ValueError("no grid")))
    with pytest.raises(ValueError, match="no grid"):
        transport.connect_job(mock.Mock(), [0, 1])
    between_parts.close.assert_called_once_with(clean=True)
