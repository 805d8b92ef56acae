# SPDX-License-Identifier: Apache-2.0
"""``update="backward"`` equals ``update="step"`` bit for bit, keeps no gradients, and refuses what it cannot."""

from __future__ import annotations

import itertools
import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import shardadam
from shardadam import GradScaler, Precision, ShardedAdamW
from shardadam import transport as transports
from shardadam.transport.base import Finished
from tests import test_expert_parallel, test_hybrid, test_tensor_parallel
from tests.adversarial import AdversarialTransport
from tests.parallel_training import Training
from tests.ranks import on_ranks, rank_and_size

STEPS = 5
WIDTH, VOCABULARY = 24, 40


@dataclass(frozen=True)
class Case:
    dtype: str = "float32"
    moments: Any = "fp32"
    master: Any = "auto"
    transport: str = "shared_memory"
    shape: str = "plain"  # "plain" | "unused" | "some ranks" | "changing" | "checkpointed" | "reentrant" | "frozen"
    accumulate: int = 1
    overlap: bool = False
    schedule: bool = False
    ema: bool = False
    found_inf: int | None = None  # the step of an infinite gradient

    @property
    def id(self) -> str:
        changed = [f"{k}={v}" for k, v in self.__dict__.items() if v != Case.__dataclass_fields__[k].default]
        return ",".join(changed) or "default"


class Model(nn.Module):
    """Tied embedding and head, blocks with a parameter that no bucket holds whole, and experts that may be unused."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(3)
        )
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.dropout_of_rank = rank_and_size()[0]

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            if self.case.shape in ("checkpointed", "reentrant"):
                hidden = hidden + checkpoint(block, hidden, use_reentrant=self.case.shape == "reentrant")
            else:
                hidden = hidden + block(hidden)
        for index, expert in enumerate(self.experts):
            if self._uses(index, step):
                hidden = hidden + expert(hidden)
        return self.head(hidden)

    def _uses(self, index: int, step: int) -> bool:
        match self.case.shape:
            case "unused":
                return index != 1
            case "some ranks":
                return index != 1 or self.dropout_of_rank == 0
            case "changing":
                return (index + step + self.dropout_of_rank) % 3 != 0
        return True


def train(case: Case, update: Any, steps: int = STEPS) -> dict[str, Any]:
    rank, _ = rank_and_size()
    torch.manual_seed(1)
    model = Model(case).to(getattr(torch, case.dtype))
    if case.shape == "frozen":
        model.blocks[1].requires_grad_(False)
    kind = "auto" if case.transport in ("adversarial", "hybrid") else case.transport
    connected = transports.connect(test_hybrid.mesh_of((2, 2)) if case.transport == "hybrid" else None, kind=kind)
    optimizer = ShardedAdamW(
        [
            {"params": [p for n, p in model.named_parameters() if "experts" not in n]},
            {"params": [*model.experts.parameters()], "lr": 3e-3, "weight_decay": 0.0},
        ],
        lr=1e-2,
        precision=Precision(moments=case.moments, master=case.master, seed=3),
        bucket_mb=0.004,
        transport=AdversarialTransport(connected) if case.transport == "adversarial" else connected,
        update=update,
        ema_decay=0.9 if case.ema else None,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)) if case.schedule else None
    if case.overlap:
        optimizer.overlap_gather(model)
    for step in range(steps):
        if case.shape == "frozen" and step == 2:
            model.blocks[1].requires_grad_(True)
        random = torch.Generator().manual_seed(100 * step + rank)
        for micro in range(case.accumulate):
            tokens = torch.randint(VOCABULARY, (4, 6), generator=random)
            logits = model(tokens[:, :-1], step).float()
            loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / case.accumulate
            if case.found_inf == step and rank == 0:
                loss = loss + model.blocks[2][3].bias.float()[0] * math.inf
            if micro < case.accumulate - 1:
                with optimizer.no_sync():
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    optimizer.check_in_sync(model)
    whole = optimizer.full_state_dict(all_ranks=True)["state"]
    state = {f"{index}.{name}": tensor for index, entry in whole.items() for name, tensor in entry.items()}
    return {
        "parameters": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "state": state,
        "skipped": int(optimizer.skipped_steps),
    }


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not _same_bits(value, other[name])]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


FORMATS = [
    Case(dtype=dtype, moments=moments, master=master)
    for dtype, masters in {"float32": ["auto"], "bfloat16": ["split", "fp32", "none"], "float64": ["auto"]}.items()
    for master in masters
    for moments in (["fp32"] if dtype == "float64" else ["fp32", "bf16", "int8"])
]
SHAPES = [
    replace(case, shape=shape)
    for case in (Case(), Case(dtype="bfloat16", moments="int8", master="split"))
    for shape in ("unused", "some ranks", "changing", "checkpointed", "reentrant", "frozen")
]
WAYS = [
    Case(accumulate=3),
    Case(accumulate=2, shape="changing", dtype="bfloat16"),
    Case(overlap=True),
    Case(overlap=True, shape="changing"),
    Case(schedule=True),
    Case(ema=True, shape="changing"),
    Case(ema=True, shape="unused", dtype="bfloat16", moments="int8"),
    *(
        Case(transport=transport, shape=shape)
        for transport in ("collective", "adversarial")
        for shape in ("plain", "changing")
    ),
    Case(transport="collective", overlap=True),
]
CASES = [*FORMATS, *SHAPES, *WAYS]
RUNS = [(n, case) for n, case in itertools.product([1, 2], CASES) if n > 1 or case.transport == "shared_memory"]
RUNS += [(4, case) for case in (Case(), Case(shape="changing"), Case(overlap=True), Case(transport="collective"))]
RUNS += [(4, Case(transport="hybrid", shape=shape)) for shape in ("plain", "changing")]
RUNS += [(3, Case(shape="some ranks", dtype="bfloat16", moments="int8", master="none"))]


@pytest.mark.sweep(16)
@pytest.mark.parametrize(("world_size", "case"), RUNS, ids=lambda one: getattr(one, "id", str(one)))
def test_equals_the_update_in_step_bit_for_bit(world_size: int, case: Case) -> None:
    if world_size == 1:
        case = replace(case, transport="auto")
    in_step, in_backward = (on_ranks(world_size, train, case, update) for update in ("step", "backward"))
    for one, other in zip(in_step, in_backward, strict=True):
        assert differing(one["parameters"], other["parameters"]) == []
        assert differing(one["state"], other["state"]) == []
        assert other["skipped"] == 0


PARALLEL = [
    *(
        (test_tensor_parallel.train_split, case)
        for case in (test_tensor_parallel.TRANSFORMER, test_tensor_parallel.GRID)
    ),
    *((test_expert_parallel.train_split, test_expert_parallel.Case(table)) for table in test_expert_parallel.TABLES),
    (test_expert_parallel.train_split, test_expert_parallel.Case("rare", ("copies experts", 1, 4))),
]


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("train_split", "case"), PARALLEL, ids=lambda one: getattr(one, "id", ""))
def test_equals_the_update_in_step_of_models_that_ranks_divide(train_split: Any, case: Any) -> None:
    training = Training(clip="none", steps=4)
    in_step = on_ranks(4, train_split, case, training)
    in_backward = on_ranks(4, train_split, case, replace(training, options={"update": "backward"}))
    for one, other in zip(in_step, in_backward, strict=True):
        assert differing(one.parameters, other.parameters) == []
        assert differing(one.state, other.state) == []
        assert other.skipped == 0


# What is updated when


def observe(case: Case) -> dict[str, Any]:
    """Count the elements whose moments have changed when backward ends, and the bytes that are held then."""
    torch.manual_seed(1)
    model = Model(case)
    optimizer = ShardedAdamW(model.parameters(), lr=1e-2, bucket_mb=0.004, update="backward")
    rank, _ = rank_and_size()
    tokens = torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(rank))
    cross_entropy(model(tokens[:, :-1], 0).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    arenas = optimizer._engine.parameters.arenas
    changed = sum(int(arena.state["exp_avg_sq"].count_nonzero()) for arena in arenas)
    held = optimizer.memory()
    optimizer.step()
    after = sum(int(arena.state["exp_avg_sq"].count_nonzero()) for arena in arenas)
    return {
        "early": changed,
        "all": after,
        "shard": held.gradient_shard,
        "gradients": held.gradients,
        "moments": held.moments,
        "left": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_buckets_are_updated_while_backward_runs_and_no_gradient_is_kept(world_size: int) -> None:
    for found in on_ranks(world_size, observe, Case()):
        assert found["left"] == []
        assert found["gradients"] == 0
        # Over shared memory the last two buckets may still be in flight when backward ends.
        assert found["early"] > (0.5 if world_size > 1 else 0.99) * found["all"]
        assert found["shard"] <= (0 if world_size == 1 else found["moments"] / 4)


def test_buckets_of_unused_parameters_wait_for_step() -> None:
    for found in on_ranks(2, observe, Case(shape="some ranks")):
        assert 0 < found["early"] < found["all"]


class _Held(Finished):
    """An all-gather whose results a peer is still reading."""

    is_over = False

    def is_released(self) -> bool:
        return self.is_over


def test_nothing_is_written_in_backward_that_a_peer_may_still_read() -> None:
    expected = observe(Case())["all"]
    torch.manual_seed(1)
    model = Model(Case())
    optimizer = ShardedAdamW(model.parameters(), lr=1e-2, bucket_mb=0.004, update="backward")
    held = _Held()
    optimizer._engine.gatherer._unreleased.append(held)
    tokens = torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    cross_entropy(model(tokens[:, :-1], 0).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    arenas = optimizer._engine.parameters.arenas
    assert all(int(arena.state["exp_avg_sq"].count_nonzero()) == 0 for arena in arenas)
    held.is_over = True
    optimizer.step()
    assert sum(int(arena.state["exp_avg_sq"].count_nonzero()) for arena in arenas) == expected


# Gradients that are not finite


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shard_whose_gradient_is_not_finite_stays_and_is_counted(world_size: int, dtype: str) -> None:
    case = Case(dtype=dtype, found_inf=1)
    clean = on_ranks(world_size, train, replace(case, found_inf=None), "backward", 1)
    one_more = on_ranks(world_size, train, case, "backward", 2)
    for before, after in zip(clean, one_more, strict=True):
        assert after["skipped"] == one_more[0]["skipped"] >= 1
        assert differing(after["parameters"], one_more[0]["parameters"]) == []
        assert all(value.isfinite().all() for value in after["parameters"].values())
        # The shard with the infinite gradient has stayed: that bias is in it.
        assert torch.equal(after["parameters"]["blocks.2.3.bias"][:1], before["parameters"]["blocks.2.3.bias"][:1])
        assert not torch.equal(after["parameters"]["embedding.weight"], before["parameters"]["embedding.weight"])


def test_training_goes_on_after_a_gradient_that_is_not_finite() -> None:
    for found in on_ranks(2, train, Case(found_inf=1), "backward", 4):
        assert all(value.isfinite().all() for value in found["parameters"].values())
        assert all(value.isfinite().all() for value in found["state"].values())


# Refused


def small(**options: Any) -> tuple[nn.Module, ShardedAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return model, ShardedAdamW(model.parameters(), bucket_mb=0.0001, update="backward", **options)


def backward(model: nn.Module) -> None:
    rank, _ = rank_and_size()
    model(torch.randn(2, 8, generator=torch.Generator().manual_seed(rank))).square().sum().backward()


def message_of(call: Any) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refused_calls() -> dict[str, str]:
    found = {}
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        model, optimizer = small()
        backward(model)
        found[name] = message_of(partial(getattr(optimizer, name), 1.0))
        optimizer.step()  # nothing is lost
    model, optimizer = small()
    backward(model)
    found["several"] = message_of(partial(shardadam.clip_grad_norm_, [optimizer], 1.0))
    found["full_grad"] = message_of(partial(optimizer.full_grad, model[0].weight))
    found["zero_grad"] = message_of(optimizer.zero_grad)
    found["state_dict"] = message_of(optimizer.state_dict)
    found["full_state"] = message_of(partial(optimizer.full_state, model[0].weight))
    found["check_in_sync"] = message_of(optimizer.check_in_sync)
    optimizer.step()
    optimizer.check_in_sync(model)
    backward(model)
    found["second backward"] = message_of(partial(backward, model))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_needs_gradients_after_backward_is_refused_by_name(world_size: int) -> None:
    for found in on_ranks(world_size, refused_calls):
        for name in ("clip_grad_norm_", "clip_grad_value_", "full_grad"):
            assert found[name].startswith(f'ValueError: {name}: found update="backward"'), found[name]
            assert 'expected update="step"' in found[name]
        assert found["several"].startswith('ValueError: clip_grad_norm_: found update="backward"')
        assert found["zero_grad"].startswith("RuntimeError: zero_grad: found gradients")
        for name in ("state_dict", "full_state", "check_in_sync"):
            assert "Call step() first" in found[name], (name, found[name])
        assert "optimizer.no_sync()" in found["second backward"]
        assert "has a second gradient" in found["second backward"]


def save_half_way(directory: str) -> list[str]:
    model, optimizer = small()
    backward(model)
    save = partial(shardadam.save, directory, step=1, model=model, optimizer=optimizer, timeout_s=20)
    load = partial(shardadam.load, directory, model=model, optimizer=optimizer, timeout_s=20)
    found = [_error_of(save)]
    optimizer.step()
    save()
    backward(model)
    found.append(_error_of(load))
    return found


def _error_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("world_size", [1, 2])
def test_checkpoints_are_saved_and_loaded_between_steps_only(world_size: int, tmp_path: Path) -> None:
    for found in on_ranks(world_size, save_half_way, str(tmp_path)):
        assert all("Call step() first" in text for text in found), found


def scaled_loss() -> tuple[str, str]:
    model, optimizer = small()
    scaler = GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(2, 8)).sum()).backward()
    return message_of(partial(scaler.step, optimizer)), message_of(optimizer.step)


def test_gradients_multiplied_by_a_loss_scale_are_refused_before_the_step() -> None:
    for first, second in on_ranks(2, scaled_loss):
        assert first.startswith('ValueError: GradScaler: found update="backward"')
        assert "multiplied by a loss scale" in second and "Load a whole checkpoint" in second


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(update="later"), "update: found 'later', expected 'step' or 'backward'"),
        (dict(update="backward", max_grad_norm=1.0), "found max_grad_norm=1.0, expected None"),
        (dict(update="backward", gradient_sync="step"), "found gradient_sync='step', expected \"backward\""),
        (dict(update="backward", gradient_sync="external"), "found gradient_sync='external', expected \"backward\""),
    ],
)
def test_bad_options_are_refused_at_construction(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        ShardedAdamW(nn.Linear(2, 2).parameters(), **options)
    assert expected in str(caught.value)


def different_hyperparameters() -> tuple[str, str]:
    model, optimizer = small()
    optimizer.param_groups[0]["lr"] = 1e-3 * (1 + rank_and_size()[0])
    backward(model)
    return message_of(optimizer.step), message_of(optimizer.step)


def test_ranks_that_disagree_after_an_update_in_backward_must_load_a_checkpoint() -> None:
    for first, second in on_ranks(2, different_hyperparameters):
        assert "lr" in first and "Nothing has been written" not in first
        assert "Backward has updated parameters already" in first
        assert "Load a whole checkpoint" in second


def invalid_hyperparameter() -> tuple[str, bool]:
    model, optimizer = small()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.param_groups[0]["lr"] = math.nan
    text = message_of(partial(backward, model))
    return text, all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_backward_updates_nothing_until_a_checkpoint_is_loaded() -> None:
    model, optimizer = small()
    optimizer._engine.poison.reason = "a step was interrupted"
    before = [parameter.detach().clone() for parameter in model.parameters()]
    text = message_of(partial(backward, model))
    assert "a step was interrupted. Load a whole checkpoint" in text
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_invalid_learning_rate_raises_in_backward_and_writes_nothing() -> None:
    text, is_unchanged = invalid_hyperparameter()
    assert "lr: found nan, expected a finite number" in text
    assert is_unchanged


def learning_rate_that_is_mended(update: Any, lr: float) -> Tensor:
    """Train one step; with ``lr`` NaN, mend it after the error."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    optimizer = ShardedAdamW(model.parameters(), lr=lr if update == "step" else 1e-3, update=update)
    optimizer.param_groups[0]["lr"] = lr
    with suppress(ValueError):  # in backward, or where peers were late, in step
        backward(model)
        optimizer.step()
    if not math.isfinite(lr):
        assert int(model.weight.ne(model.weight).sum()) == 0
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
    optimizer.check_in_sync(model)
    return model.weight.detach().clone()


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_kept_if_the_learning_rate_is_invalid(world_size: int) -> None:
    expected = on_ranks(world_size, learning_rate_that_is_mended, "step", 1e-3)
    found = on_ranks(world_size, learning_rate_that_is_mended, "backward", math.nan)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def load_after_a_refused_backward(directory: str) -> list[bool]:
    model, optimizer = small()
    shardadam.save(directory, step=1, model=model, optimizer=optimizer, timeout_s=20)
    saved = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer._engine.poison.reason = "a step was interrupted"
    refused = message_of(partial(backward, model))  # over shared memory perhaps not: peers may be late
    shardadam.load(directory, model=model, optimizer=optimizer, timeout_s=20)
    same = all(torch.equal(a, b) for a, b in zip(saved, model.parameters(), strict=True))
    states = [arena.state["exp_avg_sq"].count_nonzero() for arena in optimizer._engine.parameters.arenas]
    for parameter in model.parameters():
        parameter.grad = None
    backward(model)
    optimizer.step()
    optimizer.check_in_sync(model)
    return [same, not any(map(int, states)), "Load a whole checkpoint" in refused or "nothing was raised" in refused]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_load_discards_gradients_that_are_still_in_flight(world_size: int, tmp_path: Path) -> None:
    for found in on_ranks(world_size, load_after_a_refused_backward, str(tmp_path)):
        assert found == [True] * 3


class _BackwardError(Exception):
    pass


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        raise _BackwardError


def interrupted_backward() -> tuple[str, bool]:
    model, optimizer = small()
    with suppress(_BackwardError):
        model[1](_Raises.apply(model[0](torch.ones(2, 8)))).sum().backward()
    text = message_of(optimizer.zero_grad)
    optimizer.step()  # the rest counts as zeros
    optimizer.check_in_sync(model)
    return text, bool(model[0].weight.isfinite().all())


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_backward_that_raised_cannot_be_discarded_but_completed(world_size: int) -> None:
    for text, is_finite in on_ranks(world_size, interrupted_backward):
        assert "call step() after each backward" in text
        assert is_finite


def uneven_batches(update: str) -> list[Tensor]:
    rank, _ = rank_and_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = ShardedAdamW(model.parameters(), bucket_mb=0.0001, update=update)  # type: ignore[arg-type]
    with Join([optimizer]):
        for step in range(2 + rank):
            model(torch.full((2, 8), 1.0 + step + rank)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_ranks_without_batches_join() -> None:
    in_step, in_backward = (on_ranks(2, uneven_batches, update) for update in ("step", "backward"))
    for one, other in zip(in_step, in_backward, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def resumed(directory: str, phase: str) -> list[Tensor]:
    model, optimizer = small()
    if phase == "second":
        shardadam.load(directory, model=model, optimizer=optimizer, timeout_s=20)
    for step in {"whole": range(4), "first": range(2), "second": range(2, 4)}[phase]:
        torch.manual_seed(step)
        model(torch.randn(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if phase == "first":
        shardadam.save(directory, step=2, model=model, optimizer=optimizer, timeout_s=20)
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    whole = on_ranks(2, resumed, str(tmp_path), "whole")
    on_ranks(2, resumed, str(tmp_path), "first")
    for one, other in zip(on_ranks(2, resumed, str(tmp_path), "second"), whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
