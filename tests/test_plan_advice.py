# SPDX-License-Identifier: Apache-2.0
"""What ``shardadam plan`` advises fits when it is planned itself, with the total that the advice names."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from shardadam.cli import main

CASES = random.Random(23).sample(
    list(
        itertools.product(
            ("300K", "2M"),
            (1, 2, 8),
            ("bf16", "fp32"),
            ([], ["--clip"], ["--update", "backward"], ["--gradient-sync", "step"], ["--offload", "disk"], ["--ema"],
             ["--tensor-parallel", "2"]),
            (3, 5, 8, 12),  # bytes a parameter
        )
    ),
    40,
)[:11]  # fmt: skip


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(["plan", *arguments, "--bucket-mb", "0.1", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def as_options(choice: dict[str, Any]) -> list[str]:
    named = ("ranks", "gradient_sync", "update", "gradients", "moments", "master")
    options = [text for name in named for text in (f"--{name.replace('_', '-')}", str(choice[name]))]
    options += ["--clip"] if choice["clip"] else []
    return options + (["--offload", choice["offload"]] if choice["offload"] else [])


@pytest.mark.parametrize(("what", "ranks", "dtype", "options", "each"), CASES)
def test_advice_is_what_a_plan_of_it_says(
    what: str, ranks: int, dtype: str, options: list[str], each: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--tensor-parallel" in options:
        ranks *= 2
    numel = {"300K": 300_000, "2M": 2_000_000}[what]
    kept = ["--dtype", dtype, "--memory", str(numel * each)]
    kept += [one for one in options if one == "--ema"] + (options if "--tensor-parallel" in options else [])
    found = planned(capsys, what, "--ranks", str(ranks), *kept, *(o for o in options if o not in kept))
    asked = next(row for row in found["formats"] if row["asked"])
    assert found["choice"]["fits"] == asked["fits"]
    for advice in (found["choice"], found["here"]):
        if advice is None or advice["ranks"] is None:
            continue
        again = planned(capsys, what, *as_options(advice), *kept)
        row = next(row for row in again["formats"] if row["asked"])
        assert row["fits"] and again["choice"]["fits"] and row["bytes"]["total"] == advice["bytes"]["total"]
    parts = 2 if "--tensor-parallel" in options else 1
    for row in found["formats"]:
        if row["gradient_sync"] != asked["gradient_sync"] or row["fits_from"] is None:
            continue
        setting = {**found["asked"], **row, "clip": found["asked"]["clip"], "offload": found["asked"]["offload"]}
        for count in {row["fits_from"], row["fits_from"] // 2} - {parts // 2}:
            again = planned(capsys, what, *as_options({**setting, "ranks": count}), *kept)
            fits = next(one for one in again["formats"] if one["asked"])["fits"]
            assert fits == (count == row["fits_from"]), count
