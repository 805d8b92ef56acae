# SPDX-License-Identifier: Apache-2.0
"""The contract of torch.optim.Optimizer holds: closures, hooks, writable param groups, gradients, autograd."""

from __future__ import annotations

import gc
import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from shardadam import ShardedAdam, ShardedAdamW
from tests.parity import LR, Implementation, assert_equals_torch, build_parameters, clones, quadratic
from tests.ranks import on_ranks, rank_and_size

STEPS = 8
MODES = ["backward", "step", "external"]


def one_step(optimizer: Any, parameters: list[nn.Parameter], step: int = 0) -> None:
    quadratic(parameters, 0, step).backward()
    optimizer.step()


# Signature


@pytest.mark.parametrize("sharded, plain", [(ShardedAdam, torch.optim.Adam), (ShardedAdamW, torch.optim.AdamW)])
def test_arguments_and_their_defaults_are_torchs(sharded: type, plain: type) -> None:
    ours, theirs = inspect.signature(sharded).parameters, inspect.signature(plain).parameters
    assert list(ours)[:5] == list(theirs)[:5]
    assert set(theirs) <= set(ours)
    assert {name: ours[name].default for name in theirs} == {name: theirs[name].default for name in theirs}


@pytest.mark.parametrize("sharded, plain", [(ShardedAdam, torch.optim.Adam), (ShardedAdamW, torch.optim.AdamW)])
@pytest.mark.parametrize("named", [False, True])
def test_param_groups_and_defaults_are_torchs(sharded: type, plain: type, named: bool) -> None:
    parameters = build_parameters()
    given: list[Any] = [(f"layer.{i}", p) for i, p in enumerate(parameters)] if named else parameters
    groups = [{"params": given[:3], "lr": 0.5, "own key": "kept"}, {"params": given[3:], "betas": (0.5, 0.6)}]
    ours, theirs = (kind([dict(group) for group in groups], weight_decay=0.1) for kind in (sharded, plain))
    assert isinstance(ours, torch.optim.Optimizer)
    assert ours.defaults == theirs.defaults
    for group, expected in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert list(group) == list(expected)
        assert ("param_names" in group) == named
        assert all(a is b for a, b in zip(group["params"], expected["params"], strict=True))
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in expected.items() if k != "params"}
    assert repr(ours) == repr(theirs).replace(plain.__name__, sharded.__name__)


@pytest.mark.parametrize("keyword", ["foreach", "fused", "capturable"])
def test_foreach_fused_and_the_like_are_accepted_and_ignored(keyword: str) -> None:
    results = []
    for options in ({}, {keyword: True}, {keyword: False}):
        parameters = build_parameters()
        optimizer = ShardedAdamW(parameters, lr=LR, **options)  # type: ignore[arg-type]
        for step in range(3):
            one_step(optimizer, parameters, step)
        assert optimizer.param_groups[0][keyword] is options.get(keyword, optimizer.defaults[keyword])
        results.append(clones(parameters))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert not torch.equal(results[0][3], build_parameters()[3])


def test_it_refuses_to_be_pickled_or_copied() -> None:
    optimizer = ShardedAdamW(build_parameters())
    with pytest.raises(TypeError, match="state_dict"):
        optimizer.__reduce_ex__(2)


# Closures and hooks


def step_by_closure(impl: Implementation, gradient_sync: str) -> list[Tensor]:
    parameters = build_parameters()
    optimizer = impl.adamw(parameters, sharded_options={"gradient_sync": gradient_sync})
    losses: list[Tensor] = []
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            impl.backward(lambda rank: quadratic(parameters, rank, step))
            return sum((p.detach() ** 2).sum() for p in parameters) + torch.zeros(())  # type: ignore[return-value]

        with torch.no_grad():
            losses.append(optimizer.step(closure))
    assert all(isinstance(loss, Tensor) and loss > 0 for loss in losses)
    return [losses[0], *clones(parameters)]


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_closure_runs_with_gradients_enabled_and_its_loss_is_returned(world_size: int, gradient_sync: str) -> None:
    assert_equals_torch(step_by_closure, world_size, gradient_sync)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, ShardedAdamW])
def test_step_hooks_fire_once_around_the_step_with_its_arguments(optimizer_class: Any) -> None:
    parameters = build_parameters([(5,)])
    optimizer = optimizer_class(parameters, lr=LR)
    before = parameters[0].detach().clone()
    calls: list[tuple[Any, ...]] = []

    def record(name: str) -> Any:
        def hook(*arguments: Any) -> None:
            calls.append((name, *arguments, torch.equal(parameters[0], before)))

        return hook

    def closure() -> float:
        return 7.0

    handles = [
        optimizer.register_step_pre_hook(record("pre")),
        optimizer.register_step_post_hook(record("post")),
        register_optimizer_step_pre_hook(record("global pre")),
        register_optimizer_step_post_hook(record("global post")),
    ]
    try:
        quadratic(parameters, 0, 0).backward()
        assert optimizer.step(closure) == 7.0
    finally:
        for handle in handles:
            handle.remove()
    assert [name for name, *_ in calls] == ["global pre", "pre", "post", "global post"]
    for name, hooked, arguments, keywords, is_unchanged in calls:
        assert hooked is optimizer
        assert (arguments[-1], keywords) == (closure, {})
        assert is_unchanged == ("pre" in name)
    quadratic(parameters, 0, 1).backward()
    optimizer.step()
    assert len(calls) == 4, "a removed hook fires"


def test_a_step_pre_hook_may_replace_the_arguments() -> None:
    optimizer = ShardedAdamW(build_parameters([(5,)]))
    optimizer.register_step_pre_hook(lambda o, arguments, keywords: ((o, lambda: 3.0), {}))
    with pytest.warns(UserWarning, match="no parameter has had a gradient on any rank"):
        assert optimizer.step() == 3.0


def test_state_dict_hooks_fire_with_the_right_arguments() -> None:
    optimizer = ShardedAdamW(build_parameters())
    calls: list[tuple[Any, ...]] = []
    optimizer.register_state_dict_pre_hook(lambda *arguments: calls.append(("pre", arguments)))
    optimizer.register_state_dict_post_hook(lambda o, state_dict: calls.append(("post", (o, set(state_dict)))))
    optimizer.register_state_dict_post_hook(lambda o, state_dict: {**state_dict, "own": 5})
    saved = optimizer.state_dict()
    assert saved["own"] == 5
    assert [name for name, _ in calls] == ["pre", "post"]
    assert calls[0][1] == (optimizer,)
    assert calls[1][1][0] is optimizer
    assert {"state", "param_groups"} <= calls[1][1][1]


def test_load_state_dict_hooks_fire_with_the_right_arguments() -> None:
    optimizer = ShardedAdamW(build_parameters(), lr=0.5)
    saved = optimizer.state_dict()
    calls: list[tuple[Any, ...]] = []

    def change(hooked: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append(("pre", hooked, hooked.param_groups[0]["lr"], set(state_dict)))
        groups = [{**group, "lr": 0.25} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(change)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(("post", o, o.param_groups[0]["lr"], None)))
    optimizer.load_state_dict(saved)
    assert [call[:3] for call in calls] == [("pre", optimizer, 0.5), ("post", optimizer, 0.25)]
    assert calls[0][3] == set(saved)
    assert saved["param_groups"][0]["lr"] == 0.5


# Users write to param groups


def write_param_groups(impl: Implementation, tensor_lr: bool) -> list[Tensor]:
    parameters = build_parameters()
    lr: Any = torch.tensor(LR) if tensor_lr else LR
    optimizer = impl.adamw([{"params": parameters[:4]}, {"params": parameters[4:]}], lr=lr, weight_decay=0.1)
    for step in range(STEPS + 4):
        impl.backward(lambda rank, step=step: quadratic(parameters, rank, step))
        optimizer.step()
        optimizer.zero_grad()
        first, second = optimizer.param_groups
        match step:
            case 1:
                first["betas"] = (0.5, 0.9)
            case 3:
                second["weight_decay"] = 0.5
                first["maximize"] = True
            case 5:
                if tensor_lr:
                    second["lr"] = torch.tensor(LR / 2)
                    first["lr"].fill_(LR / 3)
                else:
                    second["lr"] = LR / 2
            case 7:
                second["eps"] = 1e-2
                first["maximize"] = False
            case 9:
                first["decoupled_weight_decay"] = False
    return clones(parameters)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_hyperparameters_may_be_changed_between_steps(world_size: int, tensor_lr: bool) -> None:
    assert_equals_torch(write_param_groups, world_size, tensor_lr)


# Gradients


def what_step_leaves(gradient_sync: str) -> dict[str, Any]:
    rank, _ = rank_and_size()
    parameters = build_parameters()
    optimizer = ShardedAdamW(parameters, lr=LR, gradient_sync=gradient_sync)  # type: ignore[arg-type]
    quadratic(parameters, 0 if gradient_sync == "external" else rank, 0).backward()
    own = [None if p.grad is None else p.grad.clone() for p in parameters]
    optimizer.step()
    kept = [
        p.grad is not None and g is not None and torch.equal(p.grad, g) for p, g in zip(parameters, own, strict=True)
    ]
    gone = [p.grad is None for p in parameters]
    kept_objects = [p.grad for p in parameters]
    optimizer.zero_grad(set_to_none=False)
    zeroed = [p.grad is g and g is not None and not g.any() for p, g in zip(parameters, kept_objects, strict=True)]
    optimizer.zero_grad()
    return {"kept": kept, "gone": gone, "zeroed": zeroed, "cleared": [p.grad is None for p in parameters]}


@pytest.mark.parametrize("gradient_sync", MODES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_step_frees_gradients_in_backward_mode_only(world_size: int, gradient_sync: str) -> None:
    for result in on_ranks(world_size, what_step_leaves, gradient_sync):
        left = "gone" if gradient_sync == "backward" else "kept"
        other = "kept" if gradient_sync == "backward" else "gone"
        assert all(result[left]) and not any(result[other])
        assert all(result["zeroed"]) == (gradient_sync != "backward")
        assert all(result["cleared"])


def train_without_clearing(impl: Implementation, gradient_sync: str, clear: str) -> list[Tensor]:
    """Train without clearing gradients, which then accumulate, or with gradients cleared to zero, which still count."""
    parameters = build_parameters()
    optimizer = impl.adamw(parameters, sharded_options={"gradient_sync": gradient_sync}, weight_decay=0.1)
    for step in range(STEPS):
        if step % 2 == 0:
            impl.backward(lambda rank, step=step: quadratic(parameters, rank, step))
        optimizer.step()
        if clear == "to zero":
            optimizer.zero_grad(set_to_none=False)
    return clones(parameters)


@pytest.mark.parametrize("clear", ["to zero", "never"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_that_are_not_cleared_are_used_again_as_in_torch(world_size: int, clear: str) -> None:
    assert_equals_torch(train_without_clearing, world_size, "step", clear)


def test_external_gradients_that_are_not_cleared_are_used_again_as_in_torch() -> None:
    for clear in ("to zero", "never"):
        assert_equals_torch(train_without_clearing, 1, "external", clear)


def step_without_gradients(gradient_sync: str, trained: bool) -> list[Any]:
    rank, _ = rank_and_size()
    parameters = [
        *build_parameters(),
        nn.Parameter(torch.randn(9, generator=torch.Generator().manual_seed(1)).bfloat16()),
    ]
    optimizer = ShardedAdamW(
        parameters,
        lr=LR,
        weight_decay=0.1,
        gradient_sync=gradient_sync,  # type: ignore[arg-type]
    )
    if trained:
        quadratic(parameters, rank, 0).backward()
        optimizer.step()
        optimizer.zero_grad()

    def facts() -> list[Tensor]:
        state = [t.clone() for p in parameters for _, t in sorted(optimizer.state[p].items())]
        return [*clones(parameters), *state, optimizer.skipped_steps.clone()]

    before = facts()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    after = facts()
    quadratic(parameters, rank, 1).backward()
    optimizer.step()
    steps = {float(optimizer.state[p]["step"]) for p in parameters}
    return [all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), steps, len(before)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("gradient_sync", MODES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_without_any_gradient_changes_nothing(world_size: int, gradient_sync: str, trained: bool) -> None:
    with pytest.warns(UserWarning, match="no parameter has had a gradient on any rank"):
        results = on_ranks(world_size, step_without_gradients, gradient_sync, trained)
    for is_unchanged, steps, count in results:
        assert is_unchanged and count > 30
        assert steps == {2.0 if trained else 1.0}


def observe_grad_norm(max_grad_norm: float | None) -> list[Any]:
    parameters = build_parameters()
    optimizer = ShardedAdamW(parameters, lr=LR, max_grad_norm=max_grad_norm)
    seen: list[Any] = [optimizer.grad_norm]
    for step in range(2):
        one_step(optimizer, parameters, step)
        seen.append(optimizer.grad_norm)
    return [None if norm is None else norm.clone() for norm in seen]


@pytest.mark.parametrize("world_size", [1, 2])
def test_grad_norm_is_a_scalar_after_a_step_that_clips_and_else_none(world_size: int) -> None:
    for result in on_ranks(world_size, observe_grad_norm, None):
        assert result == [None, None, None]
    for first, *norms in on_ranks(world_size, observe_grad_norm, 1.0):
        assert first is None
        for norm in norms:
            assert (norm.shape, norm.dtype) == ((), torch.float32)
            assert norm > 1.0


# Autograd


def differentiate_through_a_step(sharded: bool) -> str:
    """Return the error of backward through a graph from before a step."""
    weight, other = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
    optimizer = ShardedAdamW([weight, other]) if sharded else torch.optim.AdamW([weight, other])
    x = torch.randn(4, 8, requires_grad=True)
    kept = (x @ weight).sum()  # saves weight
    ((x.detach() @ weight).square().sum() + other.sum()).backward()
    optimizer.step()
    try:
        kept.backward()
    except RuntimeError as error:
        return "modified by an inplace operation" if "modified by an inplace operation" in str(error) else str(error)
    return "nothing"


@pytest.mark.parametrize("world_size", [1, 2])
def test_backward_through_a_graph_from_before_the_step_raises(world_size: int) -> None:
    """The update writes flat buffers, which autograd does not see; gradients would be silently wrong."""
    expected = differentiate_through_a_step(False)
    assert expected == "modified by an inplace operation"
    assert on_ranks(world_size, differentiate_through_a_step, True) == [expected] * world_size


def test_backward_through_a_graph_over_unused_parameters_still_works_after_the_step() -> None:
    """As in torch, where a step changes only parameters that have a gradient."""
    for optimizer_class in (torch.optim.AdamW, ShardedAdamW):
        first, second = build_parameters([(6, 6), (6, 6)])
        optimizer = optimizer_class([first, second])
        x = torch.ones(3, 6, requires_grad=True)
        losses = [(x @ first).sum(), (x @ second).sum()]
        for loss in losses:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(second, build_parameters([(6, 6), (6, 6)])[1])


def test_backward_through_a_graph_still_works_after_a_step_without_gradients() -> None:
    for optimizer_class in (torch.optim.AdamW, ShardedAdamW):
        (weight,) = build_parameters([(6, 6)])
        optimizer = optimizer_class([weight])
        loss = (torch.ones(3, 6, requires_grad=True) @ weight).sum()
        warns = pytest.warns(UserWarning, match="no parameter has had a gradient on any rank")
        with warns if optimizer_class is ShardedAdamW else nullcontext():
            optimizer.step()
        loss.backward()
        optimizer.step()
        assert not torch.equal(weight, build_parameters([(6, 6)])[0])


# Lifetime


def build_and_drop(count: int, gradient_sync: str) -> dict[str, Any]:
    rank, _ = rank_and_size()
    parameters = build_parameters()

    def live() -> tuple[int, int]:
        hooks = sum(len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in parameters)
        groups = len(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else 0
        return hooks, groups

    gc.collect()
    before = live()
    most = 0
    for step in range(count):
        optimizer = ShardedAdamW(parameters, lr=LR, gradient_sync=gradient_sync)  # type: ignore[arg-type]
        if step % 10 == 0:
            quadratic(parameters, rank, step).backward()
            if step % 20 == 0:  # the other optimizers are deleted with an unused round
                optimizer.step()
        most = max(most, live()[0])
        optimizer.zero_grad()
        del optimizer
    gc.collect()
    after = live()
    quadratic(parameters, rank, 0).backward()
    return {"before": before, "after": after, "most": most, "gradients": [p.grad is not None for p in parameters]}


@pytest.mark.parametrize("world_size", [1, 2])
def test_deleted_optimizers_leave_no_hooks_and_no_process_groups(world_size: int) -> None:
    for result in on_ranks(world_size, build_and_drop, 50, "backward"):
        assert result["after"] == result["before"]
        assert 0 < result["most"] <= 2 * len(build_parameters())
        assert all(result["gradients"]), "a hook of a dropped optimizer took a gradient"


def replace_optimizer(impl: Implementation) -> list[Tensor]:
    """Train on with a second optimizer after deleting the first."""
    parameters = build_parameters()
    optimizer = impl.adamw(parameters)
    for step in range(4):
        impl.backward(lambda rank, step=step: quadratic(parameters, rank, step))
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            del optimizer
            gc.collect()
            optimizer = impl.adamw(parameters, lr=LR / 2, betas=(0.8, 0.9))
    return clones(parameters)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_optimizer_that_replaces_another_trains_as_in_torch(world_size: int) -> None:
    assert_equals_torch(replace_optimizer, world_size)
