# SPDX-License-Identifier: Apache-2.0
"""A mistake that would silently train wrong ends in an error or in one warning."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import (  # before shardadam is imported
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)

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
    """Return the UserWarnings of ``act()``, each with the file that it points at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [f"{one.filename}: {one.message}" for one in caught if issubclass(one.category, UserWarning)]


# Clipping and measuring by torch.nn.utils

TORCHS_CLIPPING = {
    "clip_grad_norm_": lambda parameters: clip_grad_norm_(parameters, 1.0),
    "clip_grad_value_": lambda parameters: clip_grad_value_(parameters, 1.0),
    "clip_grads_with_norm_": lambda parameters: clip_grads_with_norm_(parameters, 1.0, torch.ones(())),
    "get_total_norm": lambda parameters: get_total_norm([p.grad for p in parameters if p.grad is not None]),
}


def clip_with_torch(gradient_sync: str, function: str) -> tuple[list[str], list[str]]:
    misuse._warned.clear()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)

    def step() -> None:
        backward(model)
        with contextlib.suppress(RuntimeError):  # of torch's clip_grad_value_ without gradients
            TORCHS_CLIPPING[function](list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()

    return warned(step), warned(step)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("function", TORCHS_CLIPPING)
@pytest.mark.parametrize("gradient_sync", SYNCS)
def test_one_warning_where_torchs_clipping_would_clip_wrong(gradient_sync: str, function: str, world_size: int) -> None:
    is_wrong = gradient_sync == "backward" or (gradient_sync == "step" and world_size > 1)
    speaks = [is_wrong, is_wrong and function == "get_total_norm"][:world_size]  # all ranks clip, but one may measure
    found = on_ranks(world_size, clip_with_torch, gradient_sync, function)
    assert [len(first) for first, _ in found] == speaks
    for first, second in found:
        assert second == []
        if first:
            assert f"torch.nn.utils.{function}: gradients" in first[0].replace("the ", "") and __file__ in first[0]
            assert "optimizer.clip_grad_value_" in first[0] or "optimizer.clip_grad_norm_" in first[0]
            clips_nothing = gradient_sync == "backward" and function != "get_total_norm"
            assert ("training goes on unclipped" in first[0]) == clips_nothing


def discard_with_the_model(gradient_sync: str) -> tuple[list[str], list[str], list[str], list[str]]:
    misuse._warned.clear()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)
    before = warned(model.zero_grad)
    for _ in range(2):
        backward(model)
        optimizer.step()
        before += warned(model.zero_grad)
    with optimizer.no_sync():
        backward(model)
    before += warned(model.zero_grad)
    model[2](torch.ones(2, model[2].in_features)).sum().backward()
    before += warned(model[0].zero_grad)  # it had no gradient
    backward(model)
    other = warned(build_model().zero_grad)
    found = warned(model[2].zero_grad)
    again = warned(model.zero_grad)
    optimizer.zero_grad()
    return before, other, found, again


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("gradient_sync", SYNCS)
def test_one_warning_where_the_models_zero_grad_discards_nothing(gradient_sync: str, world_size: int) -> None:
    for before, other, found, again in on_ranks(world_size, discard_with_the_model, gradient_sync):
        assert before == other == again == []
        assert len(found) == (1 if gradient_sync == "backward" else 0)
        assert all("optimizer.zero_grad()" in one and one.startswith(__file__) for one in found)


def discard_what_backward_has_used() -> list[str]:
    misuse._warned.clear()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), update="backward")
    backward(model)
    found = warned(model.zero_grad)
    optimizer.step()  # as the warning says
    optimizer.zero_grad()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_where_backward_updates_the_warning_does_not_advise_a_call_that_is_refused(world_size: int) -> None:
    for (text,) in on_ranks(world_size, discard_what_backward_has_used):
        assert 'update="backward" has used' in text and "optimizer.zero_grad()" not in text
        assert "Call step() after each backward" in text and 'update="step"' in text


def test_compiled_code_may_clear_gradients() -> None:
    model = build_model()
    optimizer = ShardedAdamW(model.parameters())

    def clear_and_run(x: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        return model(x)

    torch.compile(clear_and_run, fullgraph=True, backend="eager")(torch.ones(2, model[0].in_features))
    optimizer.zero_grad()


def test_torchs_clipping_of_other_parameters_is_unchanged() -> None:
    misuse._warned.clear()
    optimizer = ShardedAdamW(build_model().parameters())
    model, reference = build_model(), build_model()
    backward(model)
    backward(reference)
    for clip in TORCHS_CLIPPING.values():
        assert warned(lambda clip=clip: clip(list(model.parameters()))) == []
    assert warned(lambda: clip_grad_norm_(model.parameters(), 0.01)) == []
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in reference.parameters()]))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad * 0.01 / (norm + 1e-6))
    with pytest.warns(UserWarning, match="empty generator"):
        clip_grad_norm_((p for p in []), 1.0)
    optimizer.zero_grad()


# Missing gradients


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
def test_one_warning_of_a_copy_that_trains_instead_of_the_model(world_size: int) -> None:
    found = on_ranks(world_size, step_of_another_model, copy.deepcopy)
    (text,) = (one for first, _ in found for one in first)
    assert len(found[0][0]) == 1 and "no parameter has had a gradient" in text and __file__ in text
    assert all(second == [] for _, second in found)


def only_the_first_expert_trains() -> list[str]:
    rank, _ = rank_and_size()
    shared, expert = nn.Linear(8, 4), nn.Linear(8, 4)
    own_group = [dist.new_group([one]) for one in range(2)][rank]
    groups = [{"params": shared.parameters()}, {"params": expert.parameters(), "process_group": own_group}]
    optimizer = ShardedAdamW(groups)

    def step() -> None:
        if rank == 0:
            expert(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()

    return warned(step)


def test_what_only_a_later_rank_finds_is_told_there() -> None:
    """Rank 1 has no gradient at all; rank 0's expert, which rank 1 does not have, has one."""
    first, second = on_ranks(2, only_the_first_expert_trains)
    assert first == [] and len(second) == 1 and "no parameter has had a gradient" in second[0]


def test_a_compiled_wrapper_trains_the_model_itself() -> None:
    first, second = step_of_another_model(lambda model: torch.compile(model, backend="eager"))
    assert first == second == []


def step_once_more(gradient_sync: str) -> list[str]:
    """Rank 1 takes its third and fifth step without a backward, as if it had called ``step`` twice."""
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
def test_one_warning_of_a_step_more_than_the_others_take(gradient_sync: str) -> None:
    alike, other = on_ranks(2, step_once_more, gradient_sync)
    assert alike == [] and len(other) == 1
    assert "this rank has had no gradient" in other[0] and __file__ in other[0]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("gradient_sync", ["step", "external"])
def test_parameters_may_be_frozen_after_backward(gradient_sync: str, layer: int) -> None:
    model: Any = build_model()
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)
    backward(model)
    model[layer].requires_grad_(False)
    optimizer.step()


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
        optimizer.step()  # with the reduced gradients, which are kept
        return str(error), [p.tolist() for p in model.parameters()], unchanged


@pytest.mark.parametrize("writers", [(0,), (1,), (0, 1)])
def test_a_gradient_written_by_hand_raises_on_every_rank_and_keeps_the_reduced_ones(writers: tuple[int, ...]) -> None:
    results = on_ranks(2, write_a_gradient, writers)
    for message, parameters, unchanged in results:
        assert "p.grad" in message and '"step"' in message and "register_hook" in message and unchanged
        assert parameters == results[0][1]


def mask_gradients() -> list[list[float]]:
    """Return the gradient that is averaged: masked by a hook, masked in p.grad, and not masked."""
    averaged = []
    for gradient_sync, how in (("backward", "hook"), ("step", "p.grad"), ("backward", "no mask")):
        model = build_model()
        optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)
        weight = model[0].weight
        mask = torch.arange(weight.numel()).view_as(weight) % (2 + rank_and_size()[0]) == 0
        if how == "hook":
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        backward(model)
        if how == "p.grad":
            weight.grad.mul_(mask)
        averaged.append(optimizer.full_grad(weight).flatten().tolist())
        optimizer.step()
    return averaged


def test_the_remedies_for_writing_gradients_do_the_same() -> None:
    for by_hook, in_grad, unmasked in on_ranks(2, mask_gradients):
        assert by_hook == in_grad != unmasked


# Steps that are always skipped


def never_finite() -> list[list[str]]:
    """Return the warnings of the first 9 steps, of the tenth, and of later ones."""
    model = build_model()
    optimizer = ShardedAdamW(model.parameters())

    def steps(count: int) -> None:
        for _ in range(count):
            backward(model, float("nan") if rank_and_size()[0] == 0 else 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return [warned(partial(steps, count)) for count in (9, 1, 15)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_warning_of_steps_that_are_never_taken(world_size: int) -> None:
    """Rank 1 got the same text, though all ranks skip alike: N ranks printed it N times."""
    found = on_ranks(world_size, never_finite)
    assert [len(tenth) for _, tenth, _ in found] == [1, 0][:world_size]
    assert "last 10 steps were not taken" in found[0][1][0]
    assert all(before == later == [] for before, _, later in found)


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
def test_a_loss_scale_that_collapses_raises_on_every_rank(world_size: int) -> None:
    with pytest.warns(UserWarning, match="the last 10 steps were not taken"):
        results = on_ranks(world_size, collapse)
    for step, message, unchanged in results:
        assert step == 32 and "loss scale has fallen" in message and unchanged  # 2^8 to 2^-25


def raise_warnings(gradient_sync: str) -> tuple[list[str], bool]:
    """Rank 1 lacks a gradient in the second step, and warnings are errors."""
    rank, _ = rank_and_size()
    model = build_model()
    optimizer = ShardedAdamW(model.parameters(), gradient_sync=gradient_sync)
    texts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            if rank == 0 or step != 1:
                backward(model)
            before = [p.detach().clone() for p in model.parameters()]
            try:
                optimizer.step()
            except UserWarning as warning:
                texts.append(f"{step}: {warning}")
            moved = all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
            optimizer.zero_grad()
    optimizer.check_in_sync()
    return texts, moved


@pytest.mark.parametrize("gradient_sync", ["backward", "step"])
def test_a_warning_that_is_an_error_is_raised_after_the_step_and_parts_no_ranks(gradient_sync: str) -> None:
    (first, moved), (second, also_moved) = on_ranks(2, raise_warnings, gradient_sync)
    assert first == [] and len(second) == 1 and second[0].startswith("1: step(): this rank has had no gradient")
    assert moved and also_moved


# Parts of the model that were replaced after the build


class Tagger(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(words, 4)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.never_used = nn.Linear(2, 2)

    def forward(self) -> Any:
        return self.body(self.words(torch.tensor([1, 2, 3])))


def resize(model: Tagger) -> None:
    model.words = nn.Embedding(30, 4)


def swap(model: Tagger) -> None:
    model.body[0].weight = nn.Parameter(torch.ones(8, 4))


KEPT: list[nn.Module] = []


def resize_and_keep(model: Tagger) -> None:
    KEPT.append(model.words)  # as a variable of a script would
    resize(model)


def replace_part(replace: Callable[[Tagger], None] | None, gradient_sync: str, steps_before: int) -> list[list[str]]:
    model = Tagger(20)
    optimizer = ShardedAdamW(model.named_parameters(), gradient_sync=gradient_sync)

    def steps(count: int) -> None:
        for _ in range(count):
            model().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(steps_before)
    if replace is not None:
        replace(model)
    return [warned(partial(steps, count)) for count in (2, 30)]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("steps_before", "gradient_sync"), [(0, "backward"), (4, "step")])
@pytest.mark.parametrize(
    ("replace", "name"), [(resize, "words.weight"), (swap, "body.0.weight"), (resize_and_keep, "words.weight")]
)
def test_one_warning_of_a_parameter_that_was_replaced_in_the_model(
    replace: Callable[[Tagger], None], name: str, steps_before: int, gradient_sync: str, world_size: int
) -> None:
    for first, later in on_ranks(world_size, replace_part, replace, gradient_sync, steps_before):
        assert first == [] and len(later) == 1 and __file__ in later[0]
        assert f"in the last 3 steps: {name!r}. They" in later[0] and f"The model has {name!r} instead" in later[0]


def test_no_warning_of_a_parameter_that_is_never_used() -> None:
    assert replace_part(None, "backward", 5) == [[], []]


def add_what_replaces(optimizer: ShardedAdamW, model: Tagger) -> None:
    resize(model)
    optimizer.add_param_group({"params": [("words.new", model.words.weight)]})


def add_another_model(optimizer: ShardedAdamW, model: Tagger) -> None:
    optimizer.add_param_group({"params": list(KEPT[-1].named_parameters())})


@pytest.mark.parametrize("act", [add_what_replaces, add_another_model])
def test_no_warning_of_idle_parameters_while_all_of_the_model_trains(act: Callable[..., None]) -> None:
    KEPT.append(nn.Linear(5, 5))
    model = Tagger(20)
    optimizer = ShardedAdamW(model.named_parameters())
    act(optimizer, model)

    def steps() -> None:
        for _ in range(8):
            model().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert warned(steps) == []


def test_torchs_clipping_takes_its_arguments_by_name() -> None:
    optimizer = ShardedAdamW(build_model().parameters())  # applies the patches
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    gradients = [p.grad for p in other.parameters()]
    norm = torch.nn.utils.get_total_norm(tensors=gradients)
    torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(parameters=other.parameters(), max_norm=0.5), norm)
    torch.nn.utils.clip_grads_with_norm_(parameters=other.parameters(), max_norm=0.1, total_norm=torch.tensor(0.5))
    torch.testing.assert_close(torch.nn.utils.get_total_norm(gradients), torch.tensor(0.1))
    torch.nn.utils.clip_grad_value_(parameters=other.parameters(), clip_value=0.0)
    assert not any(g.any() for g in gradients if g is not None) and optimizer.gradient_sync == "backward"
