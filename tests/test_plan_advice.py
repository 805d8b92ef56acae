# SPDX-License-Identifier: Apache-2.0
"""What ``shardadam plan`` advises fits when it is planned itself, with the total that the advice names; agrees with the
plan's own tables; and is the cheapest change that fits, in the order that the planner documents.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardadam.cli import main
from shardadam.cli.model_source import DTYPES, find_model_source
from shardadam.cli.plan_parallel import ModelParallel, divide
from shardadam.planner import Setting, need
from shardadam.precision import Precision


class Experts(nn.Module):
    """Two layers with four experts each, in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.q_proj = nn.Linear(64, 64)
            layer.experts = nn.Module()
            layer.experts.up_proj = nn.Parameter(torch.empty(4, 128, 64))
            layer.experts.down_proj = nn.Parameter(torch.empty(4, 64, 128))


EXPERTS = "tests.test_plan_advice:Experts"
OPTIONS: list[tuple[str, str]] = [  # what advice never changes, and what it may
    ("", ""),
    ("", "--clip"),
    ("", "--update backward"),
    ("", "--gradient-sync step"),
    ("", "--moments bf16 --gradients bf16"),
    ("", "--offload disk"),
    ("--device cpu", ""),
    ("--device cpu", "--gradient-sync step --clip"),
    ("--ema", ""),
    ("--replicas 2", ""),
    ("--tensor-parallel 2", ""),
    ("--tensor-parallel 2", "--clip"),
    ("--pipeline-parallel 2", ""),
    ("--expert-parallel 2", ""),
]
SIZES = ("100K", "300K")
_RANDOM = random.Random(23)


def _is_dense(kept: str) -> bool:
    return "expert" not in kept and "pipeline" not in kept


CASES = [
    (
        EXPERTS if "expert" in kept or "pipeline" in kept else _RANDOM.choice(("100K", "300K")),
        data,
        dtype,
        each,
        kept,
        others,
    )
    for kept, others in OPTIONS
    for dtype, data, each in _RANDOM.sample(
        [("bf16", n, each) for n in (1, 2, 3, 8) for each in (3.5, 4.2, 5, 6, 8)]
        + [("fp32", n, each) for n in (1, 2, 3, 8) for each in (6, 7, 8.5, 10, 13)],
        2 if kept or others else 6,
    )
]
FORMAT = ("gradients", "moments", "master", "gradient_sync", "update")
LADDERS: dict[str, tuple[Any, ...]] = {
    "gradients": ("fp32", "auto", "bf16"),
    "moments": ("fp32", "bf16", "int8"),
    "update": ("step", "backward"),
    "clips": (True, False),
    "gradient_sync": ("step", "backward", "step"),
    "master": ("fp32", "split", "none"),
}
"""What advice may change, from what costs least to what costs most. Ranks cost more than all of these."""


@pytest.mark.parametrize(("what", "data", "dtype", "each", "kept", "others"), CASES)
def test_advice_fits_and_is_the_cheapest(
    what: str,
    data: int,
    dtype: str,
    each: float,
    kept: str,
    others: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On ``data`` ranks that split the state, with ``each`` bytes of memory for a parameter that a rank holds."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    kind = kept.removeprefix("--").split("-parallel")[0] if "-parallel" in kept else ""
    held = divide(find_model_source(what, DTYPES[dtype]), ModelParallel(**({kind: 2} if kind else {}))).held
    factor = 2 if kind in ("tensor", "pipeline") or "--replicas" in kept else 1  # all ranks for each of ``data``
    least = 2 if kind == "expert" else 1
    data *= least
    memory = round(held.numel * each)
    always = [what, "--dtype", dtype, "--memory", str(memory), "--bucket-mb", "0.1", *kept.split()]

    def planned(*options: str) -> dict[str, Any]:
        main(["plan", *always, *options, "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    found = planned("--ranks", str(data * factor), *others.split())
    asked, choice, here = asked_of(found), found["choice"], found["here"]
    assert choice["fits"] == asked["fits"] == (asked["bytes"]["total"] <= memory)
    assert (here is not None) == ("ranks" in choice["changes"])
    for name, advice in (("choice", choice), ("here", here)):
        if advice is not None and advice["ranks"] is not None:
            again = planned(*as_options(advice))
            assert again["choice"]["fits"] and not again["choice"]["changes"]
            assert asked_of(again)["fits"] and asked_of(again)["bytes"]["total"] == advice["bytes"]["total"] <= memory
            agrees_with_the_tables(name, advice, found)

    # "from" is the smallest number of ranks that fits: on the next smaller power of two, it does not.
    powers = [least * 2**power for power in range(11) if least * 2**power <= 1024]
    for count in sorted({row["fits_from"] for row in found["formats"]} - {None}):
        for ranks in {count, *[n * factor for n in powers if n * factor < count][-1:]}:
            rows = planned(*as_options({**found["asked"], "ranks": ranks}))["formats"]
            fits = {format_of(row): row["fits"] for row in rows}
            some = [row for row in found["formats"] if row["fits_from"] == count]
            assert all(fits[format_of(row)] == (ranks == count) for row in some)

    # Nothing that costs less fits.
    setting = setting_of(found, data)
    ladders = {name: after(rungs, getattr_of(setting, name)) for name, rungs in LADDERS.items()}
    ladders["master"] = ladders["master"] if dtype == "bf16" else ()
    ladders["world_size"] = (*(n for n in powers if n > data), *(n for n in reversed(powers) if n < data))
    for advice, some_ladders in ((choice, ladders), (here, {**ladders, "world_size": ()})):
        if advice is None or advice["fits"] or "offload" in advice["changes"]:
            continue
        for count in (1, 2):
            best = cheapest(setting, some_ladders, count, lambda one: need(held.planned, one).total <= memory)
            if best is not None:
                assert advice["ranks"] == best.world_size * factor
                assert advice["clip"] == best.clips
                assert format_of(advice) == tuple(getattr_of(best, name) for name in FORMAT)
                break
            assert advice["ranks"] is None or len(advice["changes"]) > count


def asked_of(found: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in found["formats"] if row["asked"])


def format_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in FORMAT)


def as_options(setting: Mapping[str, Any]) -> list[str]:
    options = [text for name in ("ranks", *FORMAT) for text in (f"--{name.replace('_', '-')}", str(setting[name]))]
    options += ["--clip"] if setting["clip"] else []
    return options + (["--offload", setting["offload"]] if setting["offload"] else [])


def agrees_with_the_tables(name: str, advice: dict[str, Any], found: dict[str, Any]) -> None:
    """Check that the row of what is advised says that it fits, and from at most as many ranks."""
    is_in_formats = all(advice[one] == found["asked"][one] for one in ("clip", "offload"))
    rows = [row for row in found["formats"] if is_in_formats and format_of(row) == format_of(advice)]
    rows = rows or [row for row in found["comparison"] if row["name"] == name]
    assert len(rows) == 1
    assert rows[0]["fits_from"] <= advice["ranks"]
    if advice["ranks"] == found["asked"]["ranks"] or not is_in_formats:
        assert rows[0]["fits"] and rows[0]["bytes"]["total"] == advice["bytes"]["total"]


def setting_of(found: dict[str, Any], world_size: int) -> Setting:
    asked, row = found["asked"], asked_of(found)
    return Setting(
        world_size=world_size,
        replicas=asked["replicas"],
        precision=Precision(moments=row["moments"], master=row["master"], gradients=row["gradients"]),
        gradient_sync=asked["gradient_sync"],
        bucket_mb=0.1,
        device=asked["device"],
        transport=asked["transport"],
        clips=asked["clip"],
        ema=asked["ema"],
        offload=asked["offload"],
        update=asked["update"],
    )


def getattr_of(setting: Setting, name: str) -> Any:
    return getattr(setting.precision if name in ("gradients", "moments", "master") else setting, name)


def after(rungs: Sequence[Any], asked: Any) -> Sequence[Any]:
    return rungs[rungs.index(asked) + 1 :] if asked in rungs else ()


def cheapest(
    asked: Setting, ladders: Mapping[str, Sequence[Any]], count: int, fits: Callable[[Setting], bool]
) -> Setting | None:
    """Return the cheapest setting with ``count`` changes that fits; None if there is none.

    Changes of what costs less come first; then fewer steps.
    """
    for names in itertools.combinations(ladders, count):
        steps = itertools.product(*(enumerate(ladders[name]) for name in names))
        for some in sorted(steps, key=lambda some: (sum(step for step, _ in some), [step for step, _ in some])):
            values = {name: value for name, (_, value) in zip(names, some, strict=True)}
            formats = {name: values.pop(name) for name in names if name in ("gradients", "moments", "master")}
            setting = replace(asked, precision=replace(asked.precision, **formats), **values)
            in_backward = setting.update == "backward"
            if in_backward and (setting.clips or setting.gradient_sync != "backward"):
                continue
            if ("clips" not in names or in_backward) and fits(setting):
                return setting
    return None
