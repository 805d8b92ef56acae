# SPDX-License-Identifier: Apache-2.0
"""The cost of a step on a GPU: exact counts of benchmarks/ledger.py, and its models of launches and bytes."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
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
    (FP32, 1): (1914860500, 34, 1, 9),
    (FP32, 8): (717718214, 82, 60, 9),
    (SPLIT, 1): (1675748308, 34, 1, 4),
    (SPLIT, 8): (448716942, 62, 30, 4),
    (INT8, 1): (965883988, 34, 1, 4),
    (INT8, 8): (359983902, 62, 30, 4),
}


@pytest.mark.parametrize(("form", "ranks"), SMALL_STEP, ids=lambda value: getattr(value, "name", value))
def test_a_step_of_a_small_decoder_costs_what_it_did(form: Form, ranks: int) -> None:
    counted, buckets = ledger.count_step(SMALL.shapes(), form, ranks)
    found = (counted.bytes, counted.launches, counted.events.total(), buckets)
    assert found == SMALL_STEP[form, ranks]
    assert not counted.waits


def test_a_step_of_the_7b_decoder_costs_what_it_did() -> None:
    counted, buckets = ledger.count_step(DECODERS[0].shapes(), SPLIT, 8)
    assert (counted.launches, counted.events.total(), buckets) == (589, 798, 132)
    assert counted.bytes / sum(DECODERS[0].numels) == pytest.approx(7.5063, abs=1e-4)
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


def measured_kernels() -> list[tuple[str, tuple[int, int], tuple[int, int], int]]:
    """Return for each launch in Triton's interpreter: the kernel, the bytes that it reads and writes by ``KERNELS`` and
    by its loads and stores, each byte once, and the bytes of the tables that it need not read, or write, as a whole.
    """
    from triton.runtime import interpreter

    from shardadam import Precision, ShardedAdamW
    from shardadam.sums import KERNEL_DEVICES, kernel

    launches = []
    loads: dict[int, int] = {}
    stores: dict[int, int] = {}  # item sizes by address
    run = interpreter.InterpretedFunction.run
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store

    def on_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        result = load(builder, ptrs, mask, *rest)
        loads.update(dict.fromkeys(ptrs.data[mask.data].tolist(), result.data.itemsize))
        return result

    def on_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        stores.update(dict.fromkeys(ptrs.data[mask.data].tolist(), value.data.itemsize))
        return store(builder, ptrs, value, mask, *rest)

    def on_launch(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        loads.clear()
        stores.clear()
        run(function, *args, grid=grid, warmup=warmup, **kwargs)
        arguments = dict(zip(function.arg_names, args, strict=False)) | kwargs
        tables = ("table", "numels", "addresses", "first_blocks", "bounds", "squares")
        slack = sum(value.nbytes for name in tables if isinstance(value := arguments.get(name), torch.Tensor))
        by_rule = ledger.KERNELS[function.__name__](arguments)
        launches.append((function.__name__, by_rule, (sum(loads.values()), sum(stores.values())), slack))

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(interpreter.InterpretedFunction, "run", on_launch)
        patched.setattr(interpreter.InterpreterBuilder, "create_masked_load", on_load)
        patched.setattr(interpreter.InterpreterBuilder, "create_masked_store", on_store)
        KERNEL_DEVICES.add("cpu")
        for dtype, moments, master in (
            (torch.float32, "fp32", "auto"),
            (torch.bfloat16, "fp32", "split"),
            (torch.bfloat16, "bf16", "none"),
            (torch.bfloat16, "int8", "fp32"),
        ):
            precision = Precision(moments=moments, master=master)  # type: ignore[arg-type]
            parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((8, 128), (2048,))]
            optimizer = ShardedAdamW(parameters, max_grad_norm=1.0, precision=precision)
            for rounds in (1, 2):
                for _ in range(rounds):
                    sum(p.float().square().sum() for p in parameters).backward()  # type: ignore[union-attr]
                optimizer.step()
        for dtype, accumulate in ((torch.float32, True), (torch.bfloat16, False)):
            shard, sources = torch.ones(2048), torch.ones(3, 2048, dtype=dtype)
            squares = torch.zeros(-(-2048 // kernel.PROGRAM_NUMEL), dtype=torch.float64)
            kernel.sum_(shard, list(sources), squares, scale=0.5, accumulate=accumulate)
            kernel.measure(sources[0], squares)
        KERNEL_DEVICES.discard("cpu")
    return launches


def test_kernels_read_and_write_what_the_ledger_says(interpreter: ProcessPoolExecutor) -> None:
    launches = interpreter.submit(measured_kernels).result(timeout=100)
    assert {name for name, *_ in launches} == set(ledger.KERNELS)
    wrong = [
        (name, by_rule, measured)
        for name, by_rule, measured, slack in launches
        if not all(0 <= rule - found <= slack for rule, found in zip(by_rule, measured, strict=True))
    ]
    assert wrong == []
