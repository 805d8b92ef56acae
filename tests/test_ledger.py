# SPDX-License-Identifier: Apache-2.0
"""The cost of a step on a GPU: exact counts of benchmarks/ledger.py, and its models of launches and bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
pytest.importorskip("triton")
import ledger
from fake_cuda import fake_cuda
from ledger import FP32, INT8, SPLIT, Form, Ledger
from scale_model import DECODERS, Decoder

SMALL = Decoder("small", 4, 1024, 8, 8, 2816, 4096)  # 60M parameters, in several buckets

# Bytes, launches, events and buckets of a step.
SMALL_STEP = {
    (FP32, 1): (3128089792, 104, 1, 9),
    (FP32, 8): (869250270, 139, 65, 9),
    (SPLIT, 1): (2769414564, 64, 1, 4),
    (SPLIT, 8): (615186626, 84, 30, 4),
    (INT8, 1): (2059550244, 64, 1, 4),
    (INT8, 8): (526453586, 84, 30, 4),
}


@pytest.mark.parametrize(("form", "ranks"), SMALL_STEP, ids=lambda value: getattr(value, "name", value))
def test_a_step_of_a_small_decoder_costs_what_it_did(form: Form, ranks: int) -> None:
    counted, buckets = ledger.count_step(SMALL.shapes(), form, ranks)
    found = (counted.bytes, counted.launches, counted.events.total(), buckets)
    assert found == SMALL_STEP[form, ranks]
    assert not counted.waits


def test_a_step_of_the_7b_decoder_costs_what_it_did() -> None:
    counted, buckets = ledger.count_step(DECODERS[0].shapes(), SPLIT, 8)
    assert (counted.launches, counted.events.total(), buckets) == (5133, 3243, 463)
    assert counted.bytes / sum(DECODERS[0].numels) == pytest.approx(10.2917, abs=1e-4)
    assert not counted.waits


def count(call: Any) -> Ledger:
    """Return the ledger of ``call``, which gets two matrices of float32 on the device, of 1 MiB each."""
    counted = Ledger()
    with fake_cuda(counted), torch.no_grad():
        a, b = (torch.empty(512, 512, device="cuda") for _ in range(2))
        counted.is_counting = True
        call(a, b)
        counted.is_counting = False
    return counted


MIB = 2**20
OPERATIONS = {
    "a view": (lambda a, b: a.view(-1)[5:].t(), 0, 0, 0),
    "empty memory": (lambda a, b: torch.empty_like(a), 0, 0, 0),
    "zeros": (lambda a, b: torch.zeros_like(a), 1, 0, MIB),
    "a new result": (lambda a, b: a + b, 1, 2 * MIB, MIB),
    "in place": (lambda a, b: a.add_(b), 1, 2 * MIB, MIB),
    "in place, by a number": (lambda a, b: a.mul_(2.0), 1, MIB, MIB),
    "out": (lambda a, b: torch.add(a, b, out=torch.empty_like(a)), 1, 2 * MIB, MIB),
    "a copy": (lambda a, b: a.copy_(b), 1, MIB, MIB),
    "a cast": (lambda a, b: a.bfloat16(), 1, MIB, MIB // 2),
    "fill": (lambda a, b: a.zero_(), 1, 0, MIB),
    "a row that repeats": (lambda a, b: a.copy_(b[0].expand_as(a)), 1, 2048, MIB),
    "a reduction": (lambda a, b: a.sum(), 1, MIB, 4),
    "two results": (lambda a, b: torch.aminmax(a), 1, MIB, 8),
    "several operators": (lambda a, b: (a * b).sum(), 2, 3 * MIB, MIB + 4),
    "foreach": (lambda a, b: torch._foreach_copy_([a, b], [b, a]), 1, 2 * MIB, 2 * MIB),
    "foreach of many": (lambda a, b: torch._foreach_zero_(list(a)), 5, 0, MIB),
    "foreach off its fast path": (
        lambda a, b: torch._foreach_copy_([a, b], [b.t().contiguous().t(), a]),
        3,
        3 * MIB,
        3 * MIB,
    ),
    "cat of many": (lambda a, b: torch.cat([*a, *b], out=torch.empty(1024 * 512, device="cuda")), 8, 2 * MIB, 2 * MIB),
    "cat off its fast path": (lambda a, b: torch.cat([a[:, 0], b[:, 0]]), 2, 4096, 4096),
    "on the host": (lambda a, b: torch.ones(5, device="cpu") + 1, 0, 0, 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_counted_by_the_models(name: str) -> None:
    call, launches, read, written = OPERATIONS[name]
    counted = count(call)
    rows = counted.rows.values()
    found = (counted.launches, sum(row.read_bytes for row in rows), sum(row.written_bytes for row in rows))
    assert found == (launches, read, written)


@pytest.mark.parametrize(
    ("numels", "depth", "launches"),
    [
        ([], 2, 0),
        ([1], 2, 1),
        ([1] * 64, 2, 1),
        ([1] * 65, 2, 2),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([320 * 65536], 2, 1),
        ([320 * 65536 + 1], 2, 2),
        ([640 * 65536], 2, 2),
        ([65536 + 1] * 64, 2, 1),
        ([300 * 65536, 300 * 65536], 2, 2),
        ([319 * 65536, *([1] * 65)], 2, 2),  # 319 + 1 blocks; then 64 tensors
        ([319 * 65536, *([1] * 66)], 2, 3),
    ],
)
def test_multi_tensor_apply_launches_when_blocks_or_tensors_are_full(
    numels: list[int], depth: int, launches: int
) -> None:
    assert ledger.multi_tensor_launches(numels, depth) == launches
