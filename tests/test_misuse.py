# SPDX-License-Identifier: Apache-2.0
"""What would train wrong without a word ends in an error, or is warned of once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_  # before anything of shardadam has looked at it

from shardadam import GradScaler, ShardedAdamW
from shardadam.checks import misuse
from tests.ranks import on_ranks, rank_and_size

SYNCS = ("backward", "step", "external")


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def backward(model: nn.Module, scale: float = 1.0) -> None:
    (model(torch.ones(2, 8)).square().mean() * scale).backward()


def warned(act: Callable[[], Any]) -> list[str]:
    """What it warns of, and from which file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [f"{one.filename}: {one.message}" for one in caught if issubclass(one.category, UserWarning)]


# torch.nn.utils.clip_grad_norm_


def clip_with_torch(gradient_sync: str) -> tuple[list[str], list[str]]:
    misuse._has_warned_of_clipping = False
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)

    def step() -> None:
        backward(model)
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return warned(step), warned(step)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("gradient_sync", SYNCS)
def test_torchs_clipping_is_warned_of_once_where_it_would_clip_wrong(gradient_sync: str, world_size: int) -> None:
    is_wrong = gradient_sync == "backward" or (gradient_sync == "step" and world_size > 1)
    for first, second in on_ranks(world_size, clip_with_torch, gradient_sync):
        assert len(first) == is_wrong and second == []
        if is_wrong:
            assert "clip_grad_norm_" in first[0] and "max_grad_norm" in first[0] and __file__ in first[0]


def test_torchs_clipping_of_what_is_nobodys_goes_on_as_ever() -> None:
    misuse._has_warned_of_clipping = False
    ShardedAdamW(build_model().parameters())
    model, reference = build_model(), build_model()
    backward(model)
    backward(reference)
    assert warned(lambda: clip_grad_norm_(model.parameters(), 0.01)) == []
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in reference.parameters()]))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad * 0.01 / (norm + 1e-6))


# Gradients that are not there, or still there


def step_of_another_model(make: Callable[[nn.Module], nn.Module]) -> tuple[list[str], list[str]]:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters())
    other = make(model)

    def step() -> None:
        backward(other)
        optimizer.step()
        optimizer.zero_grad()

    return warned(step), warned(step)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_copy_that_trains_instead_of_the_model_is_warned_of_once(world_size: int) -> None:
    for first, second in on_ranks(world_size, step_of_another_model, copy.deepcopy):
        assert len(first) == 1 and "no parameter has had a gradient" in first[0] and __file__ in first[0]
        assert second == []


def test_a_compiled_wrapper_trains_the_model_itself() -> None:
    first, second = step_of_another_model(lambda model: torch.compile(model, backend="eager"))
    assert first == second == []


def step_once_more(gradient_sync: str) -> list[str]:
    """Rank 1 takes its third and its fifth step without a backward, as if it had called ``step`` twice."""
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)

    def steps() -> None:
        for step in range(5):
            if (step, rank_and_size()[0]) not in ((2, 1), (4, 1)):
                backward(model)
            optimizer.step()
            optimizer.zero_grad()

    return warned(steps)


@pytest.mark.parametrize("gradient_sync", SYNCS)
def test_a_step_more_than_the_others_take_is_warned_of_once(gradient_sync: str) -> None:
    alike, other = on_ranks(2, step_once_more, gradient_sync)
    assert alike == [] and len(other) == 1
    assert "this rank has had no gradient" in other[0] and __file__ in other[0]


def steps_without_zero_grad(
    gradient_sync: str, clear: str, micro_batches: int, ddp: dict[str, bool] | None = None
) -> list[str]:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)
    runs: Any = model if ddp is None else nn.parallel.DistributedDataParallel(model, **ddp)

    def steps() -> None:
        for _ in range(4):
            for last in range(1, micro_batches + 1):
                with runs.no_sync() if ddp and last < micro_batches else nullcontext():
                    backward(runs, 1 / micro_batches)
            optimizer.step()
            if clear == "after a look":
                torch.autograd.grad(model(torch.ones(2, 8)).sum(), list(model.parameters()))
            if clear in ("none", "after a look"):
                optimizer.zero_grad()
            elif clear == "zeros":
                optimizer.zero_grad(set_to_none=False)
            elif clear == "model":
                model.zero_grad()

    return warned(steps)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("clear", ["none", "zeros", "model", "after a look", "never"])
@pytest.mark.parametrize("gradient_sync", SYNCS)
def test_a_forgotten_zero_grad_is_warned_of_once(
    gradient_sync: str, clear: str, world_size: int, micro_batches: int
) -> None:
    accumulates = gradient_sync != "backward" and clear == "never"  # "backward" has consumed them in step
    for said in on_ranks(world_size, steps_without_zero_grad, gradient_sync, clear, micro_batches):
        assert len(said) == accumulates
        assert not accumulates or ("zero_grad" in said[0] and __file__ in said[0])


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("clear", ["none", "zeros", "never"])
def test_a_forgotten_zero_grad_is_warned_of_under_ddp(clear: str, micro_batches: int, views: bool) -> None:
    """Where DDP writes into gradients after every micro-batch, that cannot be told from clearing them."""
    is_seen = clear == "never" and not (views and micro_batches > 1)
    ddp = {"gradient_as_bucket_view": views}
    for said in on_ranks(2, steps_without_zero_grad, "external", clear, micro_batches, ddp):
        assert ["zero_grad" in one for one in said] == [True] * is_seen


def alternate(gradient_sync: str, set_to_none: bool) -> list[str]:
    """As a GAN trains: the generator's backward leaves gradients on the discriminator, which are cleared later."""
    generator, discriminator = nn.Linear(8, 8), build_model()
    optimizers = [ShardedAdamW(model.parameters(), gradient_sync=gradient_sync) for model in (discriminator, generator)]

    def steps() -> None:
        for _ in range(4):
            optimizers[0].zero_grad(set_to_none)
            backward(discriminator)
            discriminator(generator(torch.ones(2, 8)).detach()).square().mean().backward()
            optimizers[0].step()
            optimizers[1].zero_grad(set_to_none)
            discriminator(generator(torch.ones(2, 8))).square().mean().backward()
            optimizers[1].step()

    return warned(steps)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("gradient_sync", ["step", "external"])
def test_gradients_that_are_cleared_late_are_not_warned_of(gradient_sync: str, set_to_none: bool) -> None:
    assert alternate(gradient_sync, set_to_none) == []


def test_a_new_gradient_in_the_place_of_the_old_one_is_not_warned_of() -> None:
    """Allocators give memory out again, and the versions of new gradients differ: neither tells them apart."""
    parameter = nn.Parameter(torch.ones(100))
    optimizer = ShardedAdamW([parameter], gradient_sync="external")

    def steps() -> None:
        for _ in range(4):
            parameter.square().sum().backward()
            optimizer.step()
            parameter.grad = parameter.grad.data  # type: ignore[union-attr]
            parameter.grad.data.zero_()  # unseen by its version

    assert warned(steps) == []


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("gradient_sync", ["step", "external"])
def test_parameters_that_are_frozen_after_backward_are_no_matter(gradient_sync: str, layer: int) -> None:
    model: Any = build_model()
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)
    backward(model)
    model[layer].requires_grad_(False)
    optimizer.step()


def test_watching_for_zero_grad_leaves_nothing_on_the_model() -> None:
    model = build_model()
    for _ in range(3):
        optimizer = ShardedAdamW(model.parameters(), gradient_sync="external")
        backward(model)
        optimizer.step()
        hooks = [list(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
        assert sum(len(of_one) for of_one in hooks) == 1
        del optimizer
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# Another optimizer over the same parameters


class Wrapper(torch.optim.Optimizer):
    """As SAM and Lookahead are written: its groups are those of the optimizer that it steps."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([torch.zeros(())], {})
        self.inners, self.param_groups = [inner], inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inners[0].step()


class Clipper(torch.optim.Optimizer):
    """As those are written that change gradients first: groups of its own over the same parameters."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step()


WRAPPERS: dict[str, Any] = {"wrapper": Wrapper, "clipper": Clipper, "nested": lambda ours: Wrapper(Wrapper(ours))}


def step_with_another(gradient_sync: str, which: str, built_first: bool) -> list[list[str]]:
    model, head = build_model(), nn.Linear(4, 1)
    make = partial(torch.optim.SGD, lr=0.1)
    parameters = {"all": [*model.parameters(), *head.parameters()], "others": list(head.parameters())}
    if built_first:
        other = make(parameters[which])
        head(model(torch.ones(2, 8))).sum().backward()
        other.step()
        other.zero_grad()
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)
    if which in WRAPPERS:
        other = WRAPPERS[which](optimizer)
    elif not built_first:
        other = make(parameters[which])

    def step() -> None:
        head(model(torch.ones(2, 8))).sum().backward()
        if which not in WRAPPERS:
            optimizer.step()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()

    return [warned(step), warned(step)]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("which", "built_first"),
    [*product(("all", "others"), (False, True)), *((wrapper, False) for wrapper in WRAPPERS)],
)
@pytest.mark.parametrize("gradient_sync", SYNCS)
def test_a_plain_optimizer_over_the_same_parameters_is_warned_of_once(
    gradient_sync: str, which: str, built_first: bool, world_size: int
) -> None:
    for first, second in on_ranks(world_size, step_with_another, gradient_sync, which, built_first):
        assert len(first) == (which == "all") and second == []
        assert not first or ("SGD.step(): 4 of its 6 parameters" in first[0] and __file__ in first[0])


def test_a_plain_optimizer_is_looked_at_again_and_warned_of_once_whatever_is_built() -> None:
    model, other = build_model(), build_model()
    first = ShardedAdamW(model.parameters())
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    assert warned(plain.step) == []
    plain.add_param_group({"params": model.parameters()})
    assert len(warned(plain.step)) == 1
    second = ShardedAdamW(other.parameters())
    assert warned(plain.step) == []
    del first, second


def test_a_plain_optimizer_after_ours_is_dropped_is_fine() -> None:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters())
    del optimizer
    backward(model)
    assert warned(torch.optim.SGD(model.parameters(), lr=0.1).step) == []


# Gradients written by hand


def write_a_gradient(writers: tuple[int, ...]) -> tuple[str, list[list[float]], bool]:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    if rank_and_size()[0] in writers:
        model[0].weight.grad = torch.ones_like(model[0].weight)
    try:
        optimizer.step()
        return "", [], False
    except (RuntimeError, ValueError) as error:
        unchanged = all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        model[0].weight.grad = None
        optimizer.step()  # the reduced gradients are there still
        return str(error), [p.tolist() for p in model.parameters()], unchanged


@pytest.mark.parametrize("writers", [(0,), (1,), (0, 1)])
def test_a_gradient_written_by_hand_is_an_error_on_every_rank_and_loses_nothing(writers: tuple[int, ...]) -> None:
    results = on_ranks(2, write_a_gradient, writers)
    for message, parameters, unchanged in results:
        assert "p.grad" in message and '"step"' in message and unchanged
        assert parameters == results[0][1]


# Steps that are never taken


def never_finite() -> list[list[str]]:
    """What is said in the first 9 steps, in the tenth, and later."""
    model = build_model()
    optimizer = ShardedAdamW(model.parameters())

    def steps(count: int) -> None:
        for _ in range(count):
            backward(model, float("nan") if rank_and_size()[0] == 0 else 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return [warned(partial(steps, count)) for count in (9, 1, 15)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_that_are_never_taken_are_warned_of_once(world_size: int) -> None:
    for before, tenth, later in on_ranks(world_size, never_finite):
        assert before == later == [] and len(tenth) == 1 and "last 10 steps were not taken" in tenth[0]


def collapse() -> tuple[int, str, bool]:
    model = build_model().half()
    optimizer = ShardedAdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    scaler = GradScaler("cpu", init_scale=2.0**8)
    for step in range(100):
        loss = model(torch.ones(2, 8, dtype=torch.half)).float().square().mean()
        scaler.scale(loss * (float("inf") if rank_and_size()[0] == 0 else 1.0)).backward()
        scaler.step(optimizer)
        optimizer.zero_grad()
        try:
            scaler.update()
        except RuntimeError as error:
            unchanged = all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            return step, str(error), unchanged
    return 100, "", False


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_scale_that_collapses_is_an_error_on_every_rank(world_size: int) -> None:
    results = on_ranks(world_size, collapse)
    for step, message, unchanged in results:
        assert step == 32 and "loss scale has fallen" in message and unchanged  # 2^8 to 2^-25
