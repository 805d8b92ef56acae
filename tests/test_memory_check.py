# SPDX-License-Identifier: Apache-2.0
"""``finetune.py --fit``: adds what costs least until training fits, and takes back what it does not need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shardadam import Precision
from shardadam.planner import PlannedParameter, Setting, need

pytest.importorskip("rich")  # memory_check's module imports it for its log

SINGLE = [PlannedParameter((256, 128))] * 16
LOW = [PlannedParameter((256, 128), torch.bfloat16)] * 16
ASKED = Setting(world_size=2, bucket_mb=0.1, clips=True)
ORDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--gradients bf16", {"gradients": "bf16"}),
    ("--moments int8", {"moments": "int8"}),
    ("--update backward --clip 0", {"update": "backward", "clips": False}),
    ("--master-weights none", {"master": "none"}),
    ("--offload disk --offload-dir DIR", {"offload": "disk"}),
)
OPTIONS = [options for options, _ in ORDER]


@pytest.fixture(autouse=True)
def _launch_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "launch"))


def changed(setting: Setting, **changes: Any) -> Setting:
    formats = {name: changes.pop(name) for name in ("gradients", "moments", "master") if name in changes}
    return replace(setting, precision=replace(setting.precision, **formats), **changes)


def with_all(setting: Setting, count: int) -> Setting:
    """Return the setting with the first ``count`` savings."""
    for _, changes in ORDER[:count]:
        setting = changed(setting, **changes)
    return setting


def fitted(
    parameters: list[PlannedParameter], asked: Setting, available: int, *, accumulate: int = 1, has_disk: bool = True
) -> tuple[Setting | None, list[tuple[str, int | None, str]]]:
    """Return the setting and the rows of ``cheapest`` with 10 bytes of activations a text, 4 texts a step and rank."""
    from memory_check import AvailableMemory, Workload, cheapest

    work = Workload(parameters, asked, True, 10, 4 * asked.world_size, accumulate)
    found, rows = cheapest(work, AvailableMemory(available, None, 0, "the test"), has_disk=has_disk)
    for row in rows:
        if row.verdict in ("fits", "does not fit"):
            assert row.demand is not None and (row.demand.total <= available) == (row.verdict == "fits")
    return found and found.setting, [(row.options, row.demand and row.demand.total, row.verdict) for row in rows]


@pytest.mark.parametrize("count", range(6))
def test_savings_are_added_in_the_order_of_what_they_cost(count: int) -> None:
    """The last one is always needed; those before it are taken back where they are not."""
    most = need(LOW, with_all(ASKED, count)).total + 40
    setting, rows = fitted(LOW, ASKED, most)
    assert [row[0] for row in rows[: count + 1]] == ["as asked", *(f"+ {options}" for options in OPTIONS[:count])]
    assert [row[2] for row in rows[: count + 1]] == ["does not fit"] * count + ["fits"]
    assert setting == with_all(ASKED, count)
    if count == 5:  # on disk, everything else may be left out
        return
    assert all(verdict == "does not fit" for _, _, verdict in rows[count + 1 :])
    if count:
        assert [row[0] for row in rows[count + 1 :]] == [f"- {options}" for options in reversed(OPTIONS[: count - 1])]


def test_a_saving_that_is_not_needed_is_taken_back() -> None:
    asked = replace(ASKED, clips=False)
    without = changed(asked, moments="int8")
    most = need(SINGLE, without).total + 40
    assert most < need(SINGLE, changed(asked, gradients="bf16")).total
    setting, rows = fitted(SINGLE, asked, most)
    assert setting == without
    assert rows[-1] == ("- --gradients bf16", most, "fits")


def test_what_saves_nothing_is_left_out() -> None:
    asked = replace(ASKED, world_size=1)  # one rank has no gradient shard, and float32 no master
    setting, rows = fitted(SINGLE, asked, need(SINGLE, with_all(asked, 3)).total + 40)
    assert setting == changed(asked, moments="int8", update="backward", clips=False)
    assert ("+ --gradients bf16", need(SINGLE, asked).total + 40, "saves nothing") in rows
    assert not any("--master-weights" in options for options, _, _ in rows)
    nothing, rows = fitted(SINGLE, asked, 10)
    assert nothing is None
    assert rows[-2][0] == "+ --master-weights none" and rows[-2][2] == "saves nothing"


def test_a_disk_is_tried_where_there_is_a_directory() -> None:
    most = need(LOW, with_all(ASKED, 5)).total + 40
    setting, rows = fitted(LOW, ASKED, most, has_disk=False)
    assert setting is None and rows[-1] == (f"+ {OPTIONS[4]}", most, "give --offload-dir to try")
    setting, _ = fitted(LOW, ASKED, most)
    assert setting is not None and setting.offload == "disk"


def test_updates_in_backward_are_left_out_where_several_backwards_make_a_step() -> None:
    setting, rows = fitted(LOW, ASKED, need(LOW, with_all(ASKED, 4)).total + 40, accumulate=2, has_disk=False)
    assert setting is None
    assert ("+ --update backward --clip 0", None, "not with --accumulate 2") in rows


def test_updates_in_backward_bring_gradient_sync_backward_along() -> None:
    asked = replace(ASKED, gradient_sync="step", precision=Precision(moments="int8", gradients="bf16"))
    setting, rows = fitted(LOW, asked, need(LOW, with_all(replace(asked, gradient_sync="backward"), 3)).total + 40)
    assert setting is not None and setting.update == setting.gradient_sync == "backward" and not setting.clips
    assert "+ --update backward --gradient-sync backward --clip 0" in [options for options, _, _ in rows]


def test_the_nearest_setting_is_typed_with_its_new_options() -> None:
    from memory_check import AvailableMemory, Workload, nearest

    lean = changed(ASKED, gradients="bf16", moments="int8")
    most = need(SINGLE, changed(lean, update="backward", clips=False)).total + 40
    found = nearest(Workload(SINGLE, lean, True, 10, 8, 1), AvailableMemory(most, None, 0, "the test"))
    assert found is not None and found[0] == ["--update backward", "--clip 0"] and found[1].total == most
    several = nearest(Workload(SINGLE, lean, True, 10, 8, 2), AvailableMemory(most, None, 0, "the test"))
    assert several is not None and not any("--update" in option for option in several[0])
    in_backward = changed(lean, update="backward", clips=False)
    least = need(SINGLE, in_backward).total
    halved = nearest(Workload(SINGLE, in_backward, True, 10, 8, 1), AvailableMemory(least + 20, None, 0, "the test"))
    assert halved is None or not any("--accumulate" in option for option in halved[0])
