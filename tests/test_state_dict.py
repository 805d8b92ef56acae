# SPDX-License-Identifier: Apache-2.0
"""``state_dict``, ``full_state_dict`` and ``load_state_dict``: resuming is exact, torch's AdamW state loads, torch's
AdamW continues from ours, and a state that does not fit is refused and changes nothing."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils._pytree import tree_map

from shardadam import Precision, ShardedAdam, ShardedAdamW
from shardadam.layout import Span
from shardadam.state.flat_shard import FlatShard
from tests.parity import LR, assert_close, build_parameters, clones, quadratic
from tests.ranks import on_ranks, rank_and_size

STEPS = 10
BUCKET_MB = 0.001


def build(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    parameters = [nn.Parameter(p.detach().to(dtype)) for p in build_parameters()]
    parameters[5].data = parameters[5].data.to(memory_format=torch.channels_last)
    return parameters


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": parameters[:4]}, {"params": parameters[4:], "lr": LR / 2, "betas": (0.8, 0.9)}]


def sharded(parameters: list[nn.Parameter], **options: Any) -> ShardedAdamW:
    return ShardedAdamW(groups_of(parameters), **{"lr": LR, "bucket_mb": BUCKET_MB, "weight_decay": 0.1, **options})


def in_use(parameters: list[nn.Parameter], step: int, unused: bool) -> list[nn.Parameter]:
    """Return the parameters used in a step. With ``unused``, parameter i is left out of every (i + 2)-th step."""
    return [p for i, p in enumerate(parameters) if not (unused and (step + 1) % (i + 2) == 0)]


def train(optimizer: Any, parameters: list[nn.Parameter], steps: range, ranks: list[int], unused: bool) -> None:
    for step in steps:
        for rank in ranks:
            (quadratic(in_use(parameters, step, unused), rank, step) / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(saved: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def kept(saved: Any) -> Any:
    """Return a copy that further steps do not change; on one rank, through a file."""
    return through_a_file(saved) if rank_and_size()[1] == 1 else copy.deepcopy(saved)


def everything(optimizer: Any, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return parameters and state."""
    return clones([*parameters, *(t for p in parameters for _, t in sorted(optimizer.state[p].items()))])


def unchanged(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# Resuming


def resume(dtype: torch.dtype, unused: bool, tensor_lr: bool) -> list[list[Tensor]]:
    """Return parameters and state of an uninterrupted run, and of one saved and loaded half way."""
    rank, _ = rank_and_size()
    lr: Any = torch.tensor(LR) if tensor_lr else LR
    parameters = build(dtype)
    optimizer = sharded(parameters, lr=lr)
    train(optimizer, parameters, range(STEPS), [rank], unused)
    saved = kept({"model": nn.ParameterList(parameters).state_dict(), "optimizer": optimizer.state_dict()})
    train(optimizer, parameters, range(STEPS, 2 * STEPS), [rank], unused)

    resumed = build(dtype)
    for parameter in resumed:
        parameter.data.add_(1)
    second = sharded(resumed, lr=lr)
    nn.ParameterList(resumed).load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(second, resumed, range(STEPS, 2 * STEPS), [rank], unused)
    return [everything(optimizer, parameters), everything(second, resumed)]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resuming_on_as_many_ranks_is_bitwise(world_size: int, dtype: torch.dtype, unused: bool) -> None:
    for straight, resumed in on_ranks(world_size, resume, dtype, unused, unused):
        assert any(t.numel() > 0 for t in straight[len(build()) :])
        assert unchanged(straight, resumed)


def load_and_continue(by: str) -> list[Any]:
    """Load one optimizer from another's dict in memory, then train both: neither may change the other."""
    rank, _ = rank_and_size()
    lr = torch.tensor(LR)
    first, second = build(), build()
    source, target = sharded(first, lr=lr), sharded(second, lr=torch.tensor(LR / 7))
    train(source, first, range(3), [rank], False)
    saved = copy.deepcopy(source.state_dict()) if by == "copy" else source.state_dict()
    target.load_state_dict(saved)
    loaded = everything(target, second)
    loaded_lr = target.param_groups[0]["lr"].clone()
    source.param_groups[0]["lr"].fill_(5.0)
    train(source, first, range(3, 5), [rank], False)
    return [unchanged(loaded, everything(target, second)), loaded_lr, target.param_groups[0]["lr"].clone()]


@pytest.mark.parametrize("by", ["copy", "reference"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loaded_optimizer_shares_no_memory_with_its_source(world_size: int, by: str) -> None:
    for state_is_kept, loaded_lr, lr_afterwards in on_ranks(world_size, load_and_continue, by):
        assert state_is_kept
        assert loaded_lr == torch.tensor(LR)
        assert lr_afterwards == loaded_lr, "two optimizers share one lr tensor"


# torch's own state


def save_torch(world_size: int, dtype: torch.dtype, unused: bool) -> dict[str, Any]:
    parameters = build(dtype)
    optimizer = torch.optim.AdamW(groups_of(parameters), lr=LR, weight_decay=0.1)
    train(optimizer, parameters, range(STEPS), list(range(world_size)), unused)
    saved = through_a_file({"model": nn.ParameterList(parameters).state_dict(), "optimizer": optimizer.state_dict()})
    train(optimizer, parameters, range(STEPS, 2 * STEPS), list(range(world_size)), unused)
    return {**saved, "straight": clones(parameters)}


def continue_from_torch(saved: dict[str, Any], bucket_mb: float, unused: bool) -> list[Tensor]:
    rank, _ = rank_and_size()
    parameters = build()
    nn.ParameterList(parameters).load_state_dict(saved["model"])
    optimizer = sharded(parameters, bucket_mb=bucket_mb, lr=1.0, weight_decay=0.0)
    optimizer.load_state_dict(saved["optimizer"])
    train(optimizer, parameters, range(STEPS, 2 * STEPS), [rank], unused)
    return clones(parameters)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("bucket_mb", [0.0001, 0.001, 32])
@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_training_continues_from_the_state_of_torchs_adamw(world_size: int, unused: bool, bucket_mb: float) -> None:
    """The smallest bucket size splits parameters over several buckets."""
    saved = save_torch(world_size, torch.float32, unused)
    assert not saved["optimizer"]["state"][5]["exp_avg"].is_contiguous()
    assert_close(on_ranks(world_size, continue_from_torch, saved, bucket_mb, unused), saved["straight"])


def load_torch_whole(saved: dict[str, Any], bucket_mb: float) -> list[dict[str, Tensor]]:
    parameters = build()
    optimizer = sharded(parameters, bucket_mb=bucket_mb)
    optimizer.load_state_dict(saved["optimizer"])
    parts = max(len(param.buckets) for param in optimizer._engine.parameters.params)
    assert (parts > 1) == (bucket_mb < 0.001)
    return [optimizer.full_state(p) for p in parameters]


@pytest.mark.parametrize("bucket_mb", [0.0001, 32])
@pytest.mark.parametrize("world_size", [1, 2])
def test_full_state_returns_the_state_loaded_from_torch(world_size: int, bucket_mb: float) -> None:
    saved = save_torch(1, torch.float32, True)
    for result in on_ranks(world_size, load_torch_whole, saved, bucket_mb):
        for index, state in enumerate(result):
            for name, value in saved["optimizer"]["state"][index].items():
                assert torch.equal(state[name], value)
                assert state[name].stride() == value.stride()


def test_a_parameter_without_state_in_torchs_adamw_starts_from_zero() -> None:
    parameters = build()
    plain = torch.optim.AdamW(groups_of(parameters), lr=LR)
    train(plain, parameters[:3], range(2), [0], False)
    saved = through_a_file(plain.state_dict())
    assert set(saved["state"]) == {0, 1, 2}
    fresh = build()
    optimizer = sharded(fresh)
    train(optimizer, fresh, range(3), [0], False)
    optimizer.load_state_dict(saved)
    assert [float(optimizer.state[p]["step"]) for p in fresh] == [2.0] * 3 + [0.0] * 4
    assert not any(optimizer.state[p][name].any() for p in fresh[3:] for name in ("exp_avg", "exp_avg_sq"))
    assert optimizer.state[fresh[2]]["exp_avg"].any()


def test_a_flattened_state_without_masters_loads() -> None:
    """set_optimizer_state_dict makes the master that torch's AdamW does not have an empty dict, which was refused."""
    model, other = nn.Linear(3, 2, dtype=torch.bfloat16), nn.Linear(3, 2, dtype=torch.bfloat16)
    plain, optimizer = torch.optim.AdamW(model.parameters(), lr=LR), ShardedAdamW(other.parameters(), lr=1.0)
    train(plain, list(model.parameters()), range(2), [0], False)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, plain, options=flat)
    set_optimizer_state_dict(other, optimizer, saved, options=flat)
    state = optimizer.full_state(other.weight)
    assert torch.equal(state["exp_avg"], plain.state[model.weight]["exp_avg"].float())
    assert torch.equal(state["master"], other.weight.float())


def test_missing_masters_are_taken_from_the_parameters() -> None:
    saved = save_torch(1, torch.float32, False)["optimizer"]
    parameters = build(torch.bfloat16)
    optimizer = sharded(parameters)
    train(optimizer, parameters, range(2), [0], False)
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(1.5)
    optimizer.load_state_dict(saved)
    for parameter in parameters:
        assert (optimizer.full_state(parameter)["master"] == 1.5).all()


# Hyperparameters and schedulers


def test_loading_restores_the_hyperparameters() -> None:
    parameters = build()
    optimizer = ShardedAdamW(
        [{"params": parameters[:4], "lr": 0.25}, {"params": parameters[4:], "betas": (0.1, 0.2), "own key": "kept"}],
        eps=1e-3,
        weight_decay=0.3,
        maximize=True,
    )
    optimizer.param_groups[0]["lr"] = 0.125
    saved = through_a_file(optimizer.state_dict())
    others = build()
    other = ShardedAdamW([{"params": others[:4]}, {"params": others[4:]}])
    before = [group["params"] for group in other.param_groups]
    other.load_state_dict(saved)
    for group, loaded, given in zip(optimizer.param_groups, other.param_groups, before, strict=True):
        assert {k: v for k, v in loaded.items() if k != "params"} == {k: v for k, v in group.items() if k != "params"}
        assert all(a is b for a, b in zip(loaded["params"], given, strict=True))
    assert other.param_groups[0]["lr"] == 0.125


def test_loading_keeps_the_names_of_the_parameters() -> None:
    parameters, others = build_parameters([(3,), (4,)]), build_parameters([(3,), (4,)])
    saved = ShardedAdamW(parameters).state_dict()
    optimizer = ShardedAdamW([("a", others[0]), ("b", others[1])])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["a", "b"]


def schedule_across_a_load(tensor_lr: bool) -> list[list[Tensor]]:
    rank, _ = rank_and_size()

    def start() -> tuple[list[nn.Parameter], ShardedAdamW, Any]:
        parameters = build()
        optimizer = sharded(parameters, lr=torch.tensor(LR) if tensor_lr else LR)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=2 * STEPS + 1)
        return parameters, optimizer, scheduler

    def go(parameters: list[nn.Parameter], optimizer: ShardedAdamW, scheduler: Any, steps: range) -> list[float]:
        rates = []
        for step in steps:
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            train(optimizer, parameters, range(step, step + 1), [rank], False)
            scheduler.step()
        return rates

    parameters, optimizer, scheduler = start()
    go(parameters, optimizer, scheduler, range(STEPS))
    saved = kept([nn.ParameterList(parameters).state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    rates = go(parameters, optimizer, scheduler, range(STEPS, 2 * STEPS))

    resumed, second, second_scheduler = start()
    nn.ParameterList(resumed).load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    second_scheduler.load_state_dict(saved[2])
    second_rates = go(resumed, second, second_scheduler, range(STEPS, 2 * STEPS))
    return [
        [torch.tensor(rates), *everything(optimizer, parameters)],
        [torch.tensor(second_rates), *everything(second, resumed)],
    ]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_scheduler_continues_after_a_load(world_size: int, tensor_lr: bool) -> None:
    for straight, resumed in on_ranks(world_size, schedule_across_a_load, tensor_lr):
        assert len(straight[0].unique()) >= STEPS
        assert unchanged(straight, resumed)


# States that do not fit


def try_to_load(optimizer: Any, parameters: list[nn.Parameter], saved: Any) -> tuple[str, str, bool]:
    """Return type and message of the error that loading raises, and whether nothing has changed."""
    before = everything(optimizer, parameters)
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    kind, words = "nothing", ""
    try:
        optimizer.load_state_dict(saved)
    except Exception as error:
        kind, words = type(error).__name__, str(error)
    same_groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    return kind, words, same_groups and unchanged(before, everything(optimizer, parameters))


class Packed(NamedTuple):
    """The contents of a ``FlatShard``, which itself refuses pickling, for another process."""

    local: Tensor
    spans: tuple[Span, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]


def packed(saved: Any) -> Any:
    def pack(leaf: Any) -> Any:
        is_shard = isinstance(leaf, FlatShard)
        return Packed(leaf.local.clone(), leaf.spans, tuple(leaf.shape), leaf.order) if is_shard else leaf

    return tree_map(pack, saved)


def unpacked(saved: Any) -> Any:
    return tree_map(
        lambda leaf: FlatShard(*leaf) if isinstance(leaf, Packed) else leaf,
        saved,
        is_leaf=lambda leaf: isinstance(leaf, Packed),
    )


def save_part(bucket_mb: float) -> dict[str, Any]:
    rank, _ = rank_and_size()
    parameters = build()
    optimizer = sharded(parameters, bucket_mb=bucket_mb)
    train(optimizer, parameters, range(2), [rank], False)
    return packed(optimizer.state_dict())


def load_part(parts: list[Any], shift: int) -> list[Any]:
    """Try to load part rank + shift."""
    rank, _ = rank_and_size()
    parameters = build()
    optimizer = sharded(parameters, lr=0.5)
    train(optimizer, parameters, range(3), [rank], False)
    answer = try_to_load(optimizer, parameters, unpacked(parts[(rank + shift) % len(parts)]))
    train(optimizer, parameters, range(3, 5), [rank], False)
    return [*answer, clones(parameters)]


def elements(words: str) -> tuple[str, str]:
    """Return the elements that the refused state dict holds, and those of the rank, from the message."""
    found = re.search(r"has the elements (\S[^a-z]*|none) of exp_avg, expected this rank's (\S[^a-z]*|none)\. ", words)
    assert found is not None, words
    return found[1], found[2]


def test_another_ranks_part_is_refused() -> None:
    parts = on_ranks(2, save_part, BUCKET_MB)
    results = on_ranks(2, load_part, parts, 1)
    for kind, words, is_unchanged, _ in results:
        assert kind == "ValueError" and is_unchanged
        assert "shardadam.save" in words and "torch.distributed.checkpoint" in words
    assert elements(results[0][1]) == elements(results[1][1])[::-1]
    for kind, *_ in on_ranks(2, load_part, parts, 0):
        assert kind == "nothing"


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 1), (3, 2), (2, 3)])
def test_a_part_of_another_world_size_is_refused(saved_on: int, loaded_on: int) -> None:
    parts = on_ranks(saved_on, save_part, BUCKET_MB)
    results = on_ranks(loaded_on, load_part, parts, 0)
    for kind, words, is_unchanged, parameters in results:
        assert kind == "ValueError" and is_unchanged
        held, own = elements(words)
        assert held != own
        assert unchanged(parameters, results[0][3])


def test_a_part_of_another_bucket_size_is_refused() -> None:
    parts = on_ranks(2, save_part, 2 * BUCKET_MB)
    for kind, words, is_unchanged, _ in on_ranks(2, load_part, parts, 0):
        assert kind == "ValueError" and is_unchanged
        held, own = elements(words)
        assert held != own


def test_a_part_of_another_memory_format_is_refused() -> None:
    for kind, words, is_unchanged in on_ranks(2, load_part_of_another_order):
        assert kind == "ValueError" and is_unchanged and "memory format" in words


def load_part_of_another_order() -> list[Any]:
    parameters, turned = build_parameters([(4, 3, 5, 2)]), build_parameters([(4, 3, 5, 2)])
    turned[0].data = turned[0].data.to(memory_format=torch.channels_last)
    return list(try_to_load(ShardedAdamW(parameters), parameters, ShardedAdamW(turned).state_dict()))


def plain_state(optimizer_class: Any = torch.optim.AdamW, **options: Any) -> dict[str, Any]:
    parameters = build()
    optimizer = optimizer_class(groups_of(parameters), lr=LR, **options)
    train(optimizer, parameters, range(2), [0], False)
    return copy.deepcopy(optimizer.state_dict())


def damaged(how: str) -> dict[str, Any]:
    saved = plain_state(amsgrad=how.startswith("amsgrad"))
    state, groups = saved["state"], saved["param_groups"]
    match how:
        case "fewer parameters in a group":
            groups[1]["params"].pop()
        case "fewer groups":
            groups.pop()
        case "other sizes of groups":
            groups[0]["params"].append(groups[1]["params"].pop(0))
        case "no exp_avg":
            del state[4]["exp_avg"]
        case "no exp_avg_sq":
            del state[4]["exp_avg_sq"]
        case "no step":
            del state[4]["step"]
        case "another shape":
            state[3]["exp_avg"] = torch.zeros(15, 7)
        case "more elements":
            state[4]["exp_avg_sq"] = torch.zeros(130)
        case "flattened":
            state[3]["exp_avg"] = state[3]["exp_avg"].flatten()
        case "SGD":
            saved = plain_state(torch.optim.SGD, momentum=0.9)
        case "no state":
            del saved["state"]
        case "no param_groups":
            del saved["param_groups"]
        case "amsgrad of no steps":
            state.clear()
    return saved


DAMAGES = {
    "fewer parameters in a group": ["[4, 2]", "[4, 3]"],
    "fewer groups": ["[4]", "[4, 3]"],
    "other sizes of groups": ["[5, 2]", "[4, 3]"],
    "no exp_avg": ["exp_avg", "param_groups[1]['params'][0]"],
    "no exp_avg_sq": ["exp_avg_sq", "param_groups[1]['params'][0]"],
    "no step": ["step", "param_groups[1]['params'][0]"],
    "another shape": ["(15, 7)", "(7, 15)", "param_groups[0]['params'][3]"],
    "more elements": ["(130,)", "(129,)", "param_groups[1]['params'][0]"],
    "flattened": ["(105,)", "(7, 15)"],
    "SGD": ["exp_avg", "momentum_buffer"],
    "no state": ["state"],
    "no param_groups": ["param_groups"],
    "amsgrad": ["amsgrad"],
    "amsgrad of no steps": ["amsgrad"],
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(how: str) -> None:
    parameters = build()
    optimizer = sharded(parameters, lr=0.5)
    train(optimizer, parameters, range(3), [0], False)
    kind, words, is_unchanged = try_to_load(optimizer, parameters, damaged(how))
    assert is_unchanged
    assert kind in (("ValueError", "KeyError") if how in ("no state", "no param_groups") else ("ValueError",))
    for word in DAMAGES[how]:
        assert word in words


@pytest.mark.parametrize("missing", ["exp_avg_code", "exp_avg_sq_scale"])
def test_incomplete_8_bit_moments_are_refused(missing: str) -> None:
    parameters = build()
    optimizer = sharded(parameters, precision=Precision(moments="int8"))
    train(optimizer, parameters, range(2), [0], False)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][4][missing]
    train(optimizer, parameters, range(2, 3), [0], False)
    kind, words, is_unchanged = try_to_load(optimizer, parameters, saved)
    assert kind == "ValueError" and is_unchanged and f"['{missing.removesuffix('_code')}'] are missing" in words


def test_torchs_adamw_refuses_8_bit_codes() -> None:
    parameters = build()
    saved = sharded(parameters, precision=Precision(moments="int8")).state_dict()
    plain = torch.optim.AdamW(groups_of(parameters), lr=LR)
    plain.load_state_dict(saved)
    with pytest.raises(KeyError, match="exp_avg"):
        train(plain, parameters, range(1), [0], False)


def load_state_of_a_smaller_model() -> list[Any]:
    """Load a state whose parameters are half as long as ours, and so as long as our parts."""
    small = build_parameters([(256,)])
    plain = torch.optim.AdamW(small)
    train(plain, small, range(2), [0], False)
    parameters = build_parameters([(512,)])
    optimizer = ShardedAdamW(parameters)
    return list(try_to_load(optimizer, parameters, plain.state_dict()))


def test_a_whole_tensor_with_the_numel_of_a_part_is_refused() -> None:
    for kind, words, is_unchanged in on_ranks(2, load_state_of_a_smaller_model):
        assert is_unchanged
        assert kind == "ValueError" and "(256,)" in words and "(512,)" in words


def unfreeze_and_resume() -> list[Any]:
    """A parameter added late is laid out differently from one that was there from the start."""
    rank, _ = rank_and_size()
    first, second = build_parameters([(600,), (700,)])
    second.requires_grad_(False)
    optimizer = ShardedAdamW([first, second], lr=LR)
    train(optimizer, [first], range(2), [rank], False)
    second.requires_grad_(True)
    train(optimizer, [first, second], range(2, 4), [rank], False)
    whole = [optimizer.full_state(p)["exp_avg"] for p in (first, second)]
    saved = kept(optimizer.state_dict())
    fresh = build_parameters([(600,), (700,)])
    other = ShardedAdamW(fresh, lr=LR)
    kind, words, is_unchanged = try_to_load(other, fresh, saved)
    loaded = [other.full_state(p)["exp_avg"] for p in fresh]
    return [kind, words, is_unchanged, all(torch.equal(a, b) for a, b in zip(whole, loaded, strict=True))]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_part_of_another_layout_is_loaded_correctly_or_refused_by_all(world_size: int) -> None:
    results = on_ranks(world_size, unfreeze_and_resume)
    assert len({kind for kind, *_ in results}) == 1, [kind for kind, *_ in results]
    for kind, _, is_unchanged, is_right in results:
        assert is_right if kind == "nothing" else (kind == "ValueError" and is_unchanged)


@pytest.mark.parametrize("make", [ShardedAdam, ShardedAdamW])
def test_on_one_rank_state_dict_has_torchs_form(make: Callable[..., Any]) -> None:
    """Its keys, shapes, strides and values are torch's."""
    ours, theirs = build(), build()
    optimizer = make(groups_of(ours), lr=LR)
    plain = (torch.optim.AdamW if make is ShardedAdamW else torch.optim.Adam)(groups_of(theirs), lr=LR)
    for one, parameters in ((optimizer, ours), (plain, theirs)):
        train(one, parameters, range(3), [0], False)
    saved, expected = optimizer.state_dict(), plain.state_dict()
    assert [list(g) for g in saved["param_groups"]] == [list(g) for g in expected["param_groups"]]
    assert [g["params"] for g in saved["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    assert set(saved["state"]) == set(expected["state"])
    for index, state in expected["state"].items():
        assert set(saved["state"][index]) == set(state)
        for name, value in state.items():
            assert type(saved["state"][index][name]) is Tensor
            assert index == 5 or saved["state"][index][name].stride() == value.stride()
            torch.testing.assert_close(saved["state"][index][name], value, rtol=1e-6, atol=1e-7)


def test_loading_a_state_of_adam_keeps_decoupled_weight_decay() -> None:
    """A state dict of Adam once made ShardedAdamW decay as Adam does."""
    parameter = nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([nn.Parameter(torch.ones(3))])
    optimizer = ShardedAdamW([parameter])
    optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


# Whole state


def train_low(plain: Any, masters: list[nn.Parameter], low: list[nn.Parameter], steps: range, world_size: int) -> None:
    """Train exact masters on averages of low-precision gradients; ``low`` are the rounded masters."""
    for step in steps:
        for master in masters:
            master.grad = torch.zeros_like(master)
        for rank in range(world_size):
            gradients = torch.autograd.grad(quadratic(low, rank, step), low)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad += gradient.to(master.dtype) / world_size  # type: ignore[operator]
        plain.step()
        with torch.no_grad():
            for master, parameter in zip(masters, low, strict=True):
                parameter.copy_(master)


def train_and_return_whole_state(dtype: torch.dtype, master: Any) -> list[Any]:
    """Return the whole state and the parameters half way, and the exact parameters at the end."""
    rank, _ = rank_and_size()
    parameters = build(dtype)
    optimizer = sharded(parameters, precision=Precision(master=master))
    train(optimizer, parameters, range(STEPS), [rank], False)
    whole, half_way = optimizer.full_state_dict(), clones(parameters)
    train(optimizer, parameters, range(STEPS, STEPS + 5), [rank], False)
    return [whole, half_way, [optimizer.full_state(p).get("master", p.detach().clone()) for p in parameters]]


@pytest.mark.parametrize(
    ("dtype", "master"), [(torch.float32, "auto"), (torch.bfloat16, "fp32"), (torch.bfloat16, "split")], ids=str
)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_torchs_adamw_continues_from_full_state_dict(world_size: int, dtype: torch.dtype, master: str) -> None:
    results = on_ranks(world_size, train_and_return_whole_state, dtype, master)
    whole, half_way, _ = results[0]
    whole = through_a_file(whole)
    assert [result[0] for result in results[1:]] == [{}] * (world_size - 1)
    assert all(("master" in state) == (dtype != torch.float32) for state in whole["state"].values())
    masters = [
        nn.Parameter(whole["state"][i].pop("master", p).clone(memory_format=torch.preserve_format))
        for i, p in enumerate(half_way)
    ]
    plain = torch.optim.AdamW(groups_of(masters), lr=1.0)
    plain.load_state_dict(whole)
    low = [nn.Parameter(p.clone()) for p in half_way]
    assert unchanged(clones(low), [m.detach().to(dtype) for m in masters])
    train_low(plain, masters, low, range(STEPS, STEPS + 5), world_size)
    assert_close([exact for *_, exact in results], masters)


def consolidate() -> list[Any]:
    """Return the kind of ``state_dict()`` before and after consolidating, after a step and after a load, and whether
    the consolidated one is right.
    """
    rank, _ = rank_and_size()
    parameters = build()
    optimizer = sharded(parameters)
    train(optimizer, parameters, range(2), [rank], False)

    def kind() -> str:
        return type(optimizer.state_dict()["state"][4]["exp_avg"]).__name__

    kinds = [kind()]
    local = copy.deepcopy(optimizer.state_dict())
    optimizer.consolidate_state_dict(to=1)
    kinds.append(kind())
    whole = [optimizer.full_state(p) for p in parameters]
    is_right = True
    if rank == 1:
        saved = through_a_file(optimizer.state_dict())["state"]
        is_right = all(torch.equal(saved[i][name], state[name]) for i, state in enumerate(whole) for name in state)
    train(optimizer, parameters, range(2, 3), [rank], False)
    kinds.append(kind())
    optimizer.consolidate_state_dict(to=1)
    optimizer.load_state_dict(local)
    kinds.append(kind())
    return [kinds, is_right]


@pytest.mark.parametrize("world_size", [2, 3])
def test_state_dict_is_whole_on_the_rank_it_was_consolidated_to_until_the_next_step(world_size: int) -> None:
    for rank, (kinds, is_right) in enumerate(on_ranks(world_size, consolidate)):
        assert kinds == ["FlatShard", "Tensor" if rank == 1 else "FlatShard", "FlatShard", "FlatShard"]
        assert is_right


def test_a_consolidated_state_dict_can_be_read_more_than_once() -> None:
    """get_optimizer_state_dict renames keys in place, so its second call once found them renamed."""
    model = nn.Linear(3, 2)
    optimizer = ShardedAdamW(model.parameters())
    optimizer.consolidate_state_dict()
    for _ in range(2):
        assert set(get_optimizer_state_dict(model, optimizer)["state"]) == {"weight", "bias"}
    assert set(optimizer.state_dict()["state"]) == {0, 1}


def refused_rank() -> str:
    optimizer = sharded(build())
    try:
        optimizer.consolidate_state_dict(to=2)
    except ValueError as error:
        return str(error)
    return ""


def test_consolidating_to_a_rank_that_does_not_exist_is_refused() -> None:
    for words in on_ranks(2, refused_rank):
        assert "found 2" in words and "from 0 to 1" in words


def pickle_parts() -> list[str]:
    saved = sharded(build()).state_dict()
    words = []
    for write in (lambda: torch.save(saved, io.BytesIO()), lambda: pickle.dumps(saved["state"][4]["exp_avg"])):
        try:
            write()
        except TypeError as error:
            words.append(str(error))
    return words


def test_pickling_a_part_is_refused_with_the_alternatives() -> None:
    for words in on_ranks(2, pickle_parts):
        assert len(words) == 2
        for message in words:
            assert all(way in message for way in ("shardadam.save", "torch.distributed.checkpoint", "full_state_dict"))


@pytest.mark.parametrize("copied", [copy.deepcopy, Tensor.clone, Tensor.double], ids=["deepcopy", "clone", "cast"])
def test_a_copy_of_a_part_is_a_part_with_its_own_memory(copied: Callable[[Tensor], Any]) -> None:
    part = FlatShard(torch.arange(6.0), [Span(2, 4), Span(10, 2)], (4, 3), (1, 0))
    found = copied(part)
    part.local.zero_()
    assert (type(found), found.shape, found.spans, found.order) == (FlatShard, part.shape, part.spans, part.order)
    assert found.local.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and found.dtype == found.local.dtype


def test_arithmetic_on_a_part_is_refused() -> None:
    part = FlatShard(torch.arange(6.0), [Span(2, 6)], (4, 3), (0, 1))
    with pytest.raises(NotImplementedError, match="full_state"):
        part + 1


def save_whole(dtype: torch.dtype, moments: Any, master: Any) -> dict[str, Any]:
    parameters = build(dtype)
    optimizer = sharded(parameters, precision=Precision(moments=moments, master=master))
    train(optimizer, parameters, range(3), [0], False)
    return {
        "model": nn.ParameterList(parameters).state_dict(),
        "optimizer": optimizer.state_dict(),
        "exact": [optimizer.full_state(p) for p in parameters],
    }


def load_whole(saved: dict[str, Any], dtype: torch.dtype, moments: Any, master: Any) -> list[dict[str, Tensor]]:
    parameters = build(dtype)
    optimizer = sharded(parameters, precision=Precision(moments=moments, master=master), bucket_mb=0.0001)
    nn.ParameterList(parameters).load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return [optimizer.full_state(p) for p in parameters]


@pytest.mark.sweep(5)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "format",
    [
        (torch.float32, "bf16", "auto"),
        (torch.float32, "int8", "auto"),
        (torch.bfloat16, "int8", "split"),
        (torch.bfloat16, "fp32", "fp32"),
    ],
    ids=str,
)
def test_a_state_saved_on_one_rank_loads_on_any_number(world_size: int, format: Any) -> None:
    saved = through_a_file(save_whole(*format))
    for loaded in on_ranks(world_size, load_whole, saved, *format):
        for found, expected in zip(loaded, saved["exact"], strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def continue_from_zero_redundancy() -> list[Tensor]:
    """Load the state of ZeroRedundancyOptimizer, broadcast from rank 0, and train on."""
    rank, world_size = rank_and_size()
    parameters = build()
    zero = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=LR, weight_decay=0.1)
    train(zero, parameters, range(STEPS), list(range(world_size)), False)
    zero.consolidate_state_dict(to=0)
    given = [zero.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(given, src=0)
    ours = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer = ShardedAdamW(ours, lr=1.0, bucket_mb=BUCKET_MB)
    optimizer.load_state_dict(given[0])  # type: ignore[arg-type]
    train(optimizer, ours, range(STEPS, 2 * STEPS), [rank], False)
    return clones(ours)


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_continues_from_the_state_of_zero_redundancy_optimizer(world_size: int) -> None:
    parameters = build()
    plain = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.1)
    train(plain, parameters, range(2 * STEPS), list(range(world_size)), False)
    assert_close(on_ranks(world_size, continue_from_zero_redundancy), parameters)


def test_state_dict_hooks_run() -> None:
    parameters = build_parameters([(3,)])
    optimizer = ShardedAdamW(parameters, lr=LR)
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "own": "kept"})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, saved: {**saved, "param_groups": [{**saved["param_groups"][0], "lr": 0.5}]}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after loading"))
    saved = optimizer.state_dict()
    assert saved["own"] == "kept" and seen == ["before saving"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5 and seen == ["before saving", "after loading"]
    assert saved["param_groups"][0]["lr"] == LR
