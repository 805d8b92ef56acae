# SPDX-License-Identifier: Apache-2.0
"""Parameters that lie on several ranks: rare mixtures of meshes, groups, stages and calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import shardadam
from shardadam import ShardedAdamW
from shardadam.transport import SharedMemoryTransport
from tests.ranks import on_ranks

DEADLINE_S = 30.0


def on_four(function: Any, *arguments: Any) -> list[Any]:
    return on_ranks(4, function, *arguments, deadline_s=DEADLINE_S)


def two_by_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "mp"))


def on_mesh(mesh: DeviceMesh, *shape: int, placement: Placement | None = None) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [placement or Shard(0)]))


def whole_sum(parameter: Any) -> Tensor:
    total: Tensor = parameter.full_tensor().sum()
    return total


def groups_of(*members: list[int]) -> dist.ProcessGroup:
    """Return the group that this rank is in."""
    groups = [dist.new_group(ranks) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if dist.get_rank() in ranks)


# Numbers


def step_of_a_mesh_of_one_rank() -> tuple[float, int]:
    mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "tp"))
    weight = on_mesh(mesh["tp"], 64, 64)
    optimizer = ShardedAdamW([weight], process_group=mesh["dp"], gradient_sync="external", max_grad_norm=1.0)
    weight.grad = distribute_tensor(torch.ones(64, 64), mesh["tp"], [Shard(0)])
    optimizer.step()
    assert optimizer.grad_norm is not None
    return float(optimizer.grad_norm), optimizer.memory().moments


def test_external_gradients_of_a_tensor_parallel_mesh_of_one_rank_are_split_over_data_parallel_ranks() -> None:
    """They were taken for parameters of fully_shard: the state was whole on every rank, the norm twice as large."""
    assert on_four(step_of_a_mesh_of_one_rank) == [(64.0, 2 * 4 * 64 * 64 // 4)] * 4


def norm_of_dtensors_that_come_later() -> float:
    mesh = two_by_two()
    norm_weight, weight = nn.Parameter(torch.ones(256)), on_mesh(mesh["mp"], 256, 4)
    optimizer = ShardedAdamW([norm_weight], process_group=mesh["dp"], model_parallel_group=mesh["mp"])
    optimizer.add_param_group({"params": [weight]})
    (norm_weight.sum() + whole_sum(weight)).backward()
    return float(optimizer.clip_grad_norm_(1.0))


def test_the_norm_counts_plain_parameters_once_if_dtensors_are_added_later() -> None:
    expected = (256 + 4 * 256) ** 0.5
    assert on_four(norm_of_dtensors_that_come_later) == pytest.approx([expected] * 4)


def norms_beside_another_optimizer(with_dtensors: bool) -> tuple[float, float, float]:
    mesh = two_by_two()
    stage = mesh["mp"].get_local_rank()
    ours, theirs = nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(300))
    params, others = [ours], [theirs]
    if with_dtensors:  # plain ones are copies then
        params.append(on_mesh(mesh["mp"], 5, 8))
        others.append(on_mesh(mesh["mp"], 7, 8))
        loss = ours.sum() + theirs.sum() + whole_sum(params[1]) + whole_sum(others[1])
        expected = 300 + 300 + 5 * 8 + 7 * 8
    else:
        loss = ours.sum() + (1 + stage) * theirs.sum()
        expected = 2 * 300 + (1 + 4) * 300
    optimizer = ShardedAdamW(params, process_group=mesh["dp"], model_parallel_group=mesh["mp"])
    loss.backward()
    norm = float(shardadam.clip_grad_norm_([optimizer, torch.optim.SGD(others)], 1.0))
    optimizer.step()
    assert theirs.grad is not None
    return norm, expected**0.5, float(theirs.grad[0]) * norm


@pytest.mark.parametrize("with_dtensors", [False, True])
def test_one_norm_of_all_parts_of_the_model_with_another_optimizer(with_dtensors: bool) -> None:
    """Each part clipped the other optimizer's gradients by a norm of its own; DTensors beside plain ones raised."""
    for rank, (norm, expected, gradient) in enumerate(on_four(norms_beside_another_optimizer, with_dtensors)):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert gradient == pytest.approx(1.0 if with_dtensors else 1.0 + rank % 2, rel=1e-5)


def averages_of_a_dtensor(has_gradient: bool) -> tuple[float, float]:
    mesh = two_by_two()
    weight, other = on_mesh(mesh["mp"], 5, 4), on_mesh(mesh["mp"], 4, placement=Replicate())
    optimizer = ShardedAdamW([torch.ones(8)], process_group=mesh["dp"], model_parallel_group=mesh["mp"])
    replica = mesh["dp"].get_local_rank()
    if has_gradient or replica == 1:
        (whole_sum(weight) * (1 + replica)).backward()
    whole_sum(other).backward()
    optimizer.average_gradients([weight, other])
    gradient: Any = weight.grad
    return float(gradient.full_tensor().min()), float(gradient.full_tensor().max())


@pytest.mark.parametrize(("has_gradient", "mean"), [(True, 1.5), (False, 1.0)])
def test_gradients_of_dtensors_that_others_train_are_averaged(has_gradient: bool, mean: float) -> None:
    assert on_four(averages_of_a_dtensor, has_gradient) == [(mean, mean)] * 4


def check_a_model_with_dtensors_outside(differ: bool) -> str:
    mesh = two_by_two()
    model = nn.Module()
    model.ours, model.outside = nn.Parameter(torch.ones(8)), on_mesh(mesh["mp"], 5, 4)
    optimizer = ShardedAdamW([model.ours], process_group=mesh["dp"], model_parallel_group=mesh["mp"])
    local: Any = model.outside
    if dist.get_rank() >= 2:
        with torch.no_grad():
            local._local_tensor.add_(1)
    if not differ:
        optimizer.sync_module(model)
    try:
        optimizer.check_in_sync(model)
    except RuntimeError as error:
        return str(error)
    return ""


def test_dtensors_outside_of_the_optimizer_are_compared() -> None:
    assert on_four(check_a_model_with_dtensors_outside, False) == [""] * 4
    assert all("values of parameter 'outside'" in text for text in on_four(check_a_model_with_dtensors_outside, True))


# Partial gradients


def gradients_of_uneven_shards() -> tuple[int, list[list[float]]]:
    mesh = two_by_two()
    tp = mesh["mp"]
    sometimes, always = on_mesh(tp, 3, 128), on_mesh(tp, 2, 128)
    norms = [on_mesh(tp, 256, placement=Replicate()) for _ in range(2)]
    optimizer = ShardedAdamW(
        [sometimes, always, *norms], lr=0.0, weight_decay=0.0, process_group=mesh["dp"], bucket_mb=2**-10
    )
    found = []
    for step in range(3):
        hidden: Any = distribute_tensor(torch.full((8, 256), 1.0 + step), tp, [Shard(0)])
        loss = (hidden[:, :128].redistribute(tp, [Replicate()]) @ always.t()).sum().redistribute(tp, [Replicate()])
        hidden = (hidden * norms[0]).redistribute(tp, [Replicate()]).redistribute(tp, [Shard(0)])
        hidden = (hidden * norms[1]).redistribute(tp, [Replicate()])
        loss = loss + hidden.sum()
        if step % 2 == 0:
            loss = loss + (hidden[:, :128] @ sometimes.t()).sum().redistribute(tp, [Replicate()])
        loss.full_tensor().backward()
        gradients: list[Any] = [optimizer.full_grad(norm) for norm in norms]
        found.append([float(gradient.full_tensor().sum()) for gradient in gradients])
        optimizer.step()
        optimizer.zero_grad()
    return len(optimizer._engine.parameters.buckets), found


def test_partial_gradients_are_reduced_in_one_order_if_shards_are_uneven() -> None:
    """A parameter is not used in one step. Its bucket came before those of the norms on some ranks only, which reduced
    their gradients at other points of backward than the other ranks of the mesh: a deadlock.
    """
    found = on_four(gradients_of_uneven_shards)
    assert {buckets for buckets, _ in found} == {3, 4}
    ones = [8.0 * 256 * (1 + step) for step in range(3)]
    expected = [one if step == 1 else one + one / 2 * 3 for step, one in enumerate(ones)]
    assert all(sums == [pytest.approx([one, one]) for one in expected] for _, sums in found)


# Param groups with a process group of their own


def gradient_of_an_expert(gradient_sync: str) -> float | None:
    group = groups_of([0, 2], [1, 3])
    dense, expert = nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(300))
    optimizer = ShardedAdamW(
        [{"params": [dense]}, {"params": [expert], "process_group": group}], gradient_sync=gradient_sync
    )
    (dense.sum() + (expert.sum() if dist.get_rank() % 2 == 0 else 0)).backward()
    gradient = optimizer.full_grad(expert)
    optimizer.step()
    return None if gradient is None else float(gradient[0])


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
def test_full_grad_of_an_expert_that_other_ranks_have_not_used(gradient_sync: str) -> None:
    """With "step", ranks whose expert had a gradient waited for those whose expert had none."""
    assert on_four(gradient_of_an_expert, gradient_sync) == [0.5, None, 0.5, None]


def sync_beside_experts() -> float:
    model = nn.Module()
    model.dense, model.expert = nn.Parameter(torch.ones(8)), nn.Parameter(torch.full((8,), dist.get_rank() % 2.0))
    first = ShardedAdamW([model.dense])
    second = ShardedAdamW([model.expert], process_group=groups_of([0, 2], [1, 3]))
    first.sync_module(model)
    first.check_in_sync(model)
    second.check_in_sync()
    return model.expert[0].item()


def test_sync_module_leaves_experts_of_another_optimizer() -> None:
    """Rank 0's expert was broadcast to the ranks that hold another one."""
    assert on_four(sync_beside_experts) == [0.0, 1.0, 0.0, 1.0]


def error_of(*, name: str = "b", divisor: float | None = None, has_group: bool = True) -> str:
    """Return the error of an optimizer of which rank 2 gives other arguments than the others."""
    is_other = dist.get_rank() == 2
    group = groups_of([0, 2], [1, 3])
    experts: dict[str, Any] = {"params": [(name if is_other else "b", nn.Parameter(torch.ones(300)))]}
    if has_group or not is_other:
        experts["process_group"] = group
    if divisor is not None:
        experts["gradient_divisor"] = divisor if is_other else 4.0
    try:
        ShardedAdamW([{"params": [("a", nn.Parameter(torch.ones(300)))]}, experts], transport="collective")
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def _error_of(options: dict[str, Any]) -> str:
    return error_of(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(name="other"), "the name of parameter 0 'b' on rank 0, 'other' on rank 2"),
        (dict(divisor=2.0), "gradient_divisor 4.0 on rank 0, 2.0 on rank 2"),
        (dict(has_group=False), "param group 1: process_group one of its own on ranks 0-1, 3, none on rank 2"),
    ],
)
def test_experts_of_different_arguments_raise_on_all_ranks(options: dict[str, Any], text: str) -> None:
    """Only the ranks of the group raised; the others waited for them in the next collective."""
    found = on_four(_error_of, options)
    assert all(text in one for one in found), found


def error_of_divisors() -> str:
    groups = [{"params": [torch.ones(8)]}, {"params": [torch.ones(8)], "gradient_divisor": 1.0 + dist.get_rank()}]
    try:
        ShardedAdamW(groups)
    except ValueError as error:
        return str(error)
    return ""


def test_divisors_must_be_equal_on_all_ranks() -> None:
    """Each rank divided its shard by its own."""
    assert all("param group 1: gradient_divisor 1.0 on rank 0, 2.0 on rank 1" in t for t in on_four(error_of_divisors))


def add_after_an_error() -> tuple[int, int, float]:
    dense, late = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    optimizer = ShardedAdamW([dense], lr=0.1, weight_decay=0.0)
    overlapping = [dist.new_group(ranks) for ranks in ([0, 1], [1, 2], [3])][(0, 0, 1, 2)[dist.get_rank()]]
    with pytest.raises(ValueError, match="ranks that share an expert"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(8))], "process_group": overlapping})
    left = len(optimizer.param_groups)
    optimizer.add_param_group({"params": [late]})
    (dense.sum() + late.sum()).backward()
    optimizer.step()
    return left, len(optimizer.param_groups), round(late[0].item(), 5)


def test_a_group_that_could_not_be_connected_is_not_added() -> None:
    """It stayed among the param groups, and every later add_param_group raised its error again."""
    assert on_four(add_after_an_error) == [(1, 2, 0.9)] * 4


def test_the_users_dict_becomes_the_param_group_as_in_torch() -> None:
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.ones(8))], "lr": 0.1}]
    optimizer = ShardedAdamW(groups)
    added: dict[str, Any] = {"params": [nn.Parameter(torch.ones(8))]}
    optimizer.add_param_group(added)
    assert optimizer.param_groups[0] is groups[0] and optimizer.param_groups[1] is added
    divided: dict[str, Any] = {"params": [nn.Parameter(torch.ones(8))], "gradient_divisor": 2.0}
    optimizer.add_param_group(divided)  # a copy: the dict can be given to a second optimizer, with its divisor
    assert "gradient_divisor" in divided and "gradient_divisor" not in optimizer.param_groups[2]


def interrupt_a_step() -> int:
    group = groups_of([0, 2], [1, 3])
    optimizer = ShardedAdamW(
        [{"params": [nn.Parameter(torch.ones(8))]}, {"params": [nn.Parameter(torch.ones(8))], "process_group": group}]
    )
    aborted: list[SharedMemoryTransport] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedMemoryTransport, "abort", lambda self: aborted.append(self))
        patch.setattr(optimizer._engine.reducer, "close", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    return len(set(map(id, aborted)))


def test_an_interrupted_call_tells_the_ranks_that_share_experts() -> None:
    assert on_four(interrupt_a_step) == [2] * 4


# Stages


def join_beside_a_frozen_stage() -> list[float]:
    mesh = two_by_two()
    stage, replica = mesh["mp"].get_local_rank(), mesh["dp"].get_local_rank()
    weight = nn.Parameter(torch.ones(8), requires_grad=stage == 0)
    optimizer = ShardedAdamW(
        [(f"{stage}.weight", weight)],
        lr=0.1,
        weight_decay=0.0,
        process_group=mesh["dp"],
        model_parallel_group=mesh["mp"],
    )
    with Join([optimizer]):
        for _ in range(1 + replica):
            if stage == 0:
                weight.sum().backward()
            optimizer.step()
    return [round(float(weight.detach()[0]), 5)]


def test_join_with_a_stage_without_trainable_parameters() -> None:
    """A stage without buckets ran rounds of zeros without end."""
    found = on_four(join_beside_a_frozen_stage)
    assert found[0] == found[2] != [1.0] and found[1] == found[3] == [1.0]


def error_of_clipping_together_in_join() -> str:
    weight = nn.Parameter(torch.ones(8))
    optimizer = ShardedAdamW([weight])
    with Join([optimizer]):
        weight.sum().backward()
        try:
            shardadam.clip_grad_norm_([optimizer], 1.0)
        except ValueError as error:
            found = str(error)
        optimizer.step()
    return found


def test_clipping_several_optimizers_within_join_raises() -> None:
    """Ranks without batches did not scale their shards."""
    assert all("Join context" in text for text in on_four(error_of_clipping_together_in_join))


def drift(where: str) -> str:
    mesh = two_by_two()
    norm = nn.Parameter(torch.ones(256))
    matrix = nn.Parameter(distribute_tensor(torch.ones(256, 4), mesh["mp"], [Shard(0)]))
    optimizer = ShardedAdamW([("norm", norm), ("matrix", matrix)], process_group=mesh["dp"])
    optimizer.check_in_sync()
    rank = dist.get_rank()
    with torch.no_grad():
        if where == "one part" and mesh["mp"].get_local_rank() == 1:
            norm.add_(1)
        if where == "one rank" and rank == 3:
            matrix.to_local().add_(1)
    try:
        optimizer.check_in_sync()
    except RuntimeError as error:
        return str(error)
    return "in sync"


def test_copies_that_drift_between_parts_of_the_model_are_named() -> None:
    for message in on_four(drift, "one part"):
        assert "different copies of parameter 'norm'" in message


def test_all_ranks_of_the_job_hear_of_one_that_drifts() -> None:
    messages = on_four(drift, "one rank")
    assert all("different values of parameter 'matrix'" in message for message in messages)
    assert sum("Other parts of the model" in message for message in messages) == 2


def clip_then_run_again(sync: str) -> tuple[list[float], list[int]]:
    """The other stage is frozen, and does not know that gradients have changed since they were clipped."""
    mesh = two_by_two()
    stage = mesh["mp"].get_local_rank()
    parameter = nn.Parameter(torch.ones(300), requires_grad=stage == 0)
    optimizer = ShardedAdamW(
        [(f"{stage}.p", parameter)],
        process_group=mesh["dp"],
        model_parallel_group=mesh["mp"],
        gradient_sync=sync,  # type: ignore[arg-type]
    )
    norms = []
    for _ in range(3):
        if stage == 0:
            parameter.pow(2).sum().backward()
        norms.append(float(optimizer.clip_grad_norm_(1.0)))
        if stage == 0:
            parameter.pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return norms, [int(optimizer.skipped_steps)]


@pytest.mark.parametrize("sync", ["backward", "step"])
def test_a_stage_without_gradients_follows_one_whose_gradients_change_after_clipping(sync: str) -> None:
    first, *others = on_four(clip_then_run_again, sync)
    assert all(other == first for other in others) and first[1] == [0]
    assert first[0][0] > 30
