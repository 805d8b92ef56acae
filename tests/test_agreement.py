# SPDX-License-Identifier: Apache-2.0
"""If ranks disagree, every rank raises the same error and the optimizer is unchanged."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardadam
from shardadam import ShardedAdamW
from shardadam.ranks import desync
from shardadam.ranks.agreement import Claim, _describe_difference, name_ranks
from shardadam.ranks.desync import DesyncReporter
from shardadam.ranks.store import StoreClient
from shardadam.ranks.store_barrier import StoreBarrier
from tests.ranks import on_ranks, rank_and_size

ODD_RANK = 1
REMEDY = "Build the same model and the same optimizer on every rank."
DEADLINE_S = 30.0  # longer is a hang

# Difference -> its name in the message, the value on most ranks, the value on the odd rank.
DIFFERENCES = {
    "shape": ("parameter 'second': shape", "(3, 5)", "(4, 5)"),
    "dtype": ("parameter 'second': dtype", "torch.float32", "torch.bfloat16"),
    "strides": ("parameter 'second': strides", "(5, 1)", "(1, 3)"),
    "requires_grad": ("parameter 'second': requires_grad", "True", "False"),
    "name": ("the name of parameter 1", "'second'", "'renamed'"),
    "order": ("the name of parameter 0", "'first'", "'second'"),
    "lr": ("param group 0: lr", "0.1", "0.2"),
    "tensor lr": ("param group 0: lr", "0.1", "0.25"),
    "betas": ("param group 0: betas", "(0.9, 0.999)", "(0.9, 0.99)"),
    "eps": ("param group 0: eps", "1e-08", "1e-06"),
    "weight_decay": ("param group 0: weight_decay", "0.01", "0.02"),
    "maximize": ("param group 0: maximize", "False", "True"),
}
AT_CONSTRUCTION_ONLY = {
    "number of groups": ("the number of param groups", "1", "2"),
    "gradient_sync": ("the optimizer: gradient_sync", "'backward'", "'step'"),
    "bucket_mb": ("the optimizer: bucket_mb", "None", "1"),
    "max_grad_norm": ("the optimizer: max_grad_norm", "None", "1.0"),
}


def on_2_and_3_ranks(differences: Iterable[str]) -> list[tuple[str, int]]:
    """Return every difference with 3 ranks, two of which agree, and every fourth also with 2 ranks."""
    differences = list(differences)
    return [(difference, 3) for difference in differences] + [(difference, 2) for difference in differences[::4]]


def message_of(difference: tuple[str, str, str], world_size: int, odd_rank: int = ODD_RANK) -> str:
    what, usual, odd = difference
    usual_ranks = {2: "rank 0", 3: "ranks 0, 2"}[world_size]
    return f"Ranks disagree on {what} {usual} on {usual_ranks}, {odd} on rank {odd_rank}. {REMEDY}"


def build_group(difference: str) -> dict[str, Any]:
    """Return a param group with one difference."""
    second = torch.ones(4 if difference == "shape" else 3, 5)
    if difference == "dtype":
        second = second.bfloat16()
    elif difference == "strides":
        second = torch.ones(5, 3).T
    named = [
        ("first", nn.Parameter(torch.ones(2))),
        ("renamed" if difference == "name" else "second", nn.Parameter(second)),
        ("third", nn.Parameter(torch.ones(()))),
    ]
    if difference == "requires_grad":
        named[1][1].requires_grad_(False)
    elif difference == "order":
        named[:2] = named[1::-1]
    elif difference.startswith("without "):
        named = [(name, parameter) for name, parameter in named if name != difference.removeprefix("without ")]
    options = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "maximize": False}
    changed = {"lr": 0.2, "tensor lr": torch.tensor(0.25), "betas": (0.9, 0.99), "eps": 1e-6}
    changed |= {"weight_decay": 0.02, "maximize": True, "negative lr": -1.0}
    field = difference.split(" ")[-1]
    if difference in changed:
        options[field] = changed[difference]
    return {"params": named, **options}


def build_optimizer(difference: str) -> ShardedAdamW:
    groups = [build_group(difference)]
    if difference == "number of groups":
        groups.append({"params": [groups[0]["params"].pop()]})
    options: dict[str, Any] = {"gradient_sync": "step", "bucket_mb": 1, "max_grad_norm": 1.0}
    return ShardedAdamW(groups, **({difference: options[difference]} if difference in options else {}))


def raised(function: Callable[[], object]) -> tuple[str, str]:
    """Return the type and message of the error that ``function`` raises."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def construct(difference: str, odd_rank: int) -> tuple[str, str]:
    rank, _ = rank_and_size()
    return raised(lambda: build_optimizer(difference if rank == odd_rank else "none"))


@pytest.mark.parametrize(("difference", "world_size"), on_2_and_3_ranks([*DIFFERENCES, *AT_CONSTRUCTION_ONLY]))
def test_a_difference_at_construction_is_named_on_every_rank(difference: str, world_size: int) -> None:
    expected = message_of((DIFFERENCES | AT_CONSTRUCTION_ONLY)[difference], world_size)
    results = on_ranks(world_size, construct, difference, ODD_RANK, deadline_s=DEADLINE_S)
    assert results == [("ValueError", expected)] * world_size


@pytest.mark.parametrize("lacked", ["first", "second", "third"])
def test_the_first_parameter_that_a_rank_lacks_is_named(lacked: str) -> None:
    """The message gave two numbers of parameters."""
    expected = (
        f"Ranks disagree on which parameters there are: rank 1 lacks '{lacked}' of ranks 0, 2. "
        f"The number of parameters is 3 on ranks 0, 2, 2 on rank 1. {REMEDY}"
    )
    assert on_ranks(3, construct, f"without {lacked}", ODD_RANK) == [("ValueError", expected)] * 3
    for result in on_ranks(3, add_and_train, f"without {lacked}", ODD_RANK):
        assert result["refusal"] == ("ValueError", expected)


def test_a_parameter_without_a_name_that_a_rank_lacks_is_told_by_position_or_shape() -> None:
    last, first = on_ranks(2, construct_without_names)[0]
    counts = f"The number of parameters is 2 on rank 0, 1 on rank 1. {REMEDY}"
    lacked = "\"param_groups[0]['params'][1]\""
    assert last == f"Ranks disagree on which parameters there are: rank 1 lacks {lacked} of rank 0. {counts}"
    assert "params'][0]" in first and "shape (2,) on rank 0, (3,) on rank 1." in first and first.endswith(counts)


def construct_without_names() -> tuple[str, str]:
    rank, _ = rank_and_size()
    both = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    last = raised(lambda: ShardedAdamW(both if rank == 0 else both[:1]))
    first = raised(lambda: ShardedAdamW(both if rank == 0 else both[1:]))
    return last[1], first[1]


def test_parameters_in_other_param_groups_are_a_difference() -> None:
    for kind, message in on_ranks(2, construct_in_other_groups):
        assert kind == "ValueError"
        assert "param group 0: number of parameters 1 on rank 0, 2 on rank 1." in message


def construct_in_other_groups() -> tuple[str, str]:
    rank, _ = rank_and_size()
    named = [(name, nn.Parameter(torch.ones(2))) for name in "abc"]
    cut = 1 + rank
    return raised(lambda: ShardedAdamW([{"params": named[:cut]}, {"params": named[cut:]}]))


@pytest.mark.parametrize("world_size", [2, 3])
def test_equal_arguments_raise_on_no_rank(world_size: int) -> None:
    assert on_ranks(world_size, construct, "none", ODD_RANK) == [("nothing", "")] * world_size


def test_where_all_ranks_differ_every_value_is_named_with_its_rank() -> None:
    expected = f"Ranks disagree on param group 0: lr 0 on rank 0, 1 on rank 1, 2 on rank 2. {REMEDY}"
    assert on_ranks(3, construct_with_own_lr) == [("ValueError", expected)] * 3


def construct_with_own_lr() -> tuple[str, str]:
    rank, _ = rank_and_size()
    return raised(lambda: ShardedAdamW([nn.Parameter(torch.ones(2))], lr=rank))


@pytest.mark.parametrize("odd_rank", [0, 1])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_others_name_the_rank_whose_arguments_are_invalid(world_size: int, odd_rank: int) -> None:
    results = on_ranks(world_size, construct, "negative lr", odd_rank, deadline_s=DEADLINE_S)
    assert results.pop(odd_rank) == ("ValueError", "lr: found -1.0, expected a finite number of 0 or more")
    prefix = f"Rank {odd_rank} could not build the optimizer, so no rank did."
    for kind, message in results:
        assert kind == "RuntimeError"
        assert message.startswith(prefix)
        assert "ValueError: lr: found -1.0, expected a finite number of 0 or more" in message


@pytest.mark.parametrize("world_size", [2, 3])
def test_construction_succeeds_after_a_failed_one(world_size: int) -> None:
    for refused, success in on_ranks(world_size, construct_twice):
        assert refused[0] == "ValueError"
        assert success == ("nothing", "")


def construct_twice() -> tuple[tuple[str, str], tuple[str, str]]:
    return construct("shape", ODD_RANK), construct("none", ODD_RANK)


# add_param_group


def add_and_train(difference: str, odd_rank: int) -> dict[str, Any]:
    """Add a group that is refused, then train; train a control optimizer the same way without adding the group."""
    rank, _ = rank_and_size()
    value = torch.linspace(-1, 1, 300)
    disturbed, undisturbed = nn.Parameter(value.clone()), nn.Parameter(value.clone())
    optimizer, control = (ShardedAdamW([("alone", p)], lr=0.1) for p in (disturbed, undisturbed))
    group = build_group(difference if rank == odd_rank else "none")
    before = facts(optimizer)
    refusal = raised(lambda: optimizer.add_param_group(group))
    after = facts(optimizer)
    for step in range(3):
        for chosen, parameter in ((optimizer, disturbed), (control, undisturbed)):
            ((parameter - rank - step) ** 2).sum().backward()
            chosen.step()
            chosen.zero_grad()
    return {
        "refusal": refusal,
        "before": before,
        "after": after,
        "trained": disturbed.detach().clone(),
        "expected": undisturbed.detach().clone(),
        "start": value,
    }


def facts(optimizer: ShardedAdamW) -> Any:
    groups = [{**group, "params": len(group["params"])} for group in optimizer.param_groups]
    return groups, len(optimizer.state), optimizer.memory()


def assert_unchanged_and_trains(results: list[dict[str, Tensor]]) -> None:
    for result in results:
        assert result["after"] == result["before"]
        assert torch.equal(result["trained"], result["expected"])
        assert not torch.equal(result["trained"], result["start"])


@pytest.mark.parametrize(("difference", "world_size"), on_2_and_3_ranks(DIFFERENCES))
def test_a_difference_in_an_added_group_is_named_on_every_rank_and_changes_nothing(
    difference: str, world_size: int
) -> None:
    results = on_ranks(world_size, add_and_train, difference, ODD_RANK, deadline_s=DEADLINE_S)
    expected = message_of(DIFFERENCES[difference], world_size).replace("param group 0", "param group 1")
    assert [result["refusal"] for result in results] == [("ValueError", expected)] * world_size
    assert_unchanged_and_trains(results)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_others_name_the_rank_whose_added_group_is_invalid_and_nothing_changes(world_size: int) -> None:
    results = on_ranks(world_size, add_and_train, "negative lr", ODD_RANK, deadline_s=DEADLINE_S)
    for rank, result in enumerate(results):
        kind, message = result["refusal"]
        assert kind == ("ValueError" if rank == ODD_RANK else "RuntimeError")
        assert "lr: found -1.0, expected a finite number of 0 or more" in message
        assert rank == ODD_RANK or f"Rank {ODD_RANK} could not" in message
    assert_unchanged_and_trains(results)


# Messages


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0-1"),
        ([0, 2], "ranks 0, 2"),
        ([0, 1, 2, 5], "ranks 0-2, 5"),
        ([1, 3, 4, 5, 9, 10], "ranks 1, 3-5, 9-10"),
        (list(range(16_384)), "ranks 0-16383"),
    ],
)
def test_consecutive_ranks_are_named_as_a_range(ranks: list[int], named: str) -> None:
    assert name_ranks(ranks) == named


def test_a_difference_is_described_with_both_values_and_their_ranks() -> None:
    shapes = ["(4096, 1024)"] * 5 + ["(4096, 1030)"]
    row = [Claim("parameter 'blocks.3.mlp.weight'", "shape", shape) for shape in shapes]
    assert _describe_difference([row[0], row[5]], [0, 5]) == (
        "Ranks disagree on parameter 'blocks.3.mlp.weight': shape (4096, 1024) on rank 0, (4096, 1030) on rank 5."
    )
    assert "(4096, 1024) on ranks 0-4, (4096, 1030) on rank 5." in _describe_difference(row, range(6))


def test_a_difference_names_global_ranks() -> None:
    row = [Claim("param group 0", "lr", value) for value in ("0.1", "0.1", "0.2")]
    described = _describe_difference(row, [4, 5, 8])
    assert described == "Ranks disagree on param group 0: lr 0.1 on ranks 4-5, 0.2 on rank 8."


def test_a_rank_without_the_parameter_is_described_as_having_nothing() -> None:
    described = _describe_difference([Claim("parameter 'a'", "shape", "(2,)"), None], [0, 1])
    assert "parameter 'a' (shape (2,)) on rank 0, nothing on rank 1." in described


def test_the_reported_line_is_the_users_not_the_packages() -> None:
    """Once, after a module had moved into a folder, reports named lines of optimizer.py."""
    module = Path(shardadam.__file__).parent / "engine" / "gathering.py"
    found: dict[str, Any] = {"line_in_users_code": desync._line_in_users_code}
    exec(compile("line = line_in_users_code()", str(module), "exec"), found)
    assert found["line"].startswith("test_agreement.py:")


def test_the_report_works_without_a_store_that_can_be_cloned() -> None:
    """Building an optimizer failed with torch's FakeStore and with stores written in Python, whose clone() raises."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    store = StoreClient(FakeStore(), may_share_connection=False)
    assert DesyncReporter(store, 0, 2).report([0, 1]) == (
        "Status of the ranks unknown: the store of the process group cannot be cloned. "
        "The ranks are: rank 0 (this one), rank 1."
    )


class SilentStore:
    """A store whose requests never return, as when its host is cut off."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*_: Any) -> None:
            self.asked.set()
            time.sleep(60)
            raise dist.DistNetworkError("at last")

        if name == "clone":
            raise AttributeError
        return ask


def test_an_unreachable_store_raises_in_time() -> None:
    store: Any = SilentStore()
    barrier = StoreBarrier(StoreClient(store, answer_s=0.3), 0, [0, 1])
    start = time.monotonic()
    with barrier.heartbeat():
        store.asked.wait(5)
    with pytest.raises(RuntimeError, match="a save: cannot reach the store of the process group"):
        barrier.exchange("", what="a save", timeout_s=1.0)
    assert time.monotonic() - start < 5
