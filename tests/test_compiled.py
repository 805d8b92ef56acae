# SPDX-License-Identifier: Apache-2.0
"""The update that Numba compiles for CPUs equals the reference bit for bit, in every format and any number of threads.

The sums that it compiles are in test_sums.py. ``tests/conftest.py`` says where the machine code of tests is kept.
"""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from shardadam import ShardedAdamW, sums
from shardadam.precision import Precision
from shardadam.sums import reference as sums_reference
from shardadam.update import Counters, Sources
from tests import kernel_cases
from tests.kernel_cases import VARIANTS, Variant, clone, clone_counters, differences

pytestmark = pytest.mark.skipif(not sums.has_numba(), reason="needs Numba")
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


@pytest.mark.parametrize("averages", [False, True], ids=["", "averages"])
@each_variant
def test_it_equals_the_reference(variant: Variant, averages: bool) -> None:
    assert kernel_cases.differences_from_reference(variant, averages=averages, kernel="numba") == []


@pytest.mark.parametrize("decay", [0.0, 1 - 2.0**-20])
def test_averages_with_extreme_decays_equal_the_reference(decay: float) -> None:
    variant = Variant("fp32", "bfloat16", "split")
    assert kernel_cases.differences_from_reference(variant, averages=True, decay=decay, kernel="numba") == []


@each_variant
def test_nothing_is_written_if_the_step_is_skipped(variant: Variant) -> None:
    for of_shard, averages in itertools.product([False, True], repeat=2):
        found = kernel_cases.differences_after_no_step(variant, of_shard=of_shard, averages=averages, kernel="numba")
        assert found == []


def test_positions_are_counted_in_uint32() -> None:
    variant = Variant("int8", "bfloat16", "none")
    assert kernel_cases.differences_from_reference(variant, 2**32 - 1024, kernel="numba") == []


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.moments == "fp32" and v.master != "own"], ids=str)
def test_ties_and_values_beside_them_round_as_in_the_reference(variant: Variant) -> None:
    assert kernel_cases.differences_at_ties(variant, "numba") == []


def test_no_code_exceeds_the_largest() -> None:
    assert kernel_cases.differences_at_largest_codes("numba") == []


def test_counters_of_many_parameters_equal_the_reference() -> None:
    assert kernel_cases.differences_of_counters("numba") == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@each_variant
def test_every_form_of_gradients_takes_the_same_step(variant: Variant, dtype: str) -> None:
    assert kernel_cases.differences_between_forms(variant, dtype, kernel="numba") == []


# Gradients that the update sums up itself


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3])
def test_sources_are_summed_up_as_by_the_reference_and_stay_as_they_are(
    count: int, dtype: torch.dtype, decoupled: bool
) -> None:
    """With one float32 source the kernel reads it in place; with L2 decay, which changes gradients, it must not."""
    variant, random = Variant("fp32", "float32", "own"), torch.Generator().manual_seed(count)
    shard, counters = kernel_cases.build_shard(variant, random), kernel_cases.build_counters()
    sources = [torch.randn(shard.parameter.shape, generator=random).to(dtype) for _ in range(count)]
    scale = 1.0 if count == 1 else 1 / 3
    step = kernel_cases.Step(kernel_cases.adam_step(weight_decay=0.3, decoupled_weight_decay=decoupled))
    truth, true_counters, untouched = clone(shard), clone_counters(counters), [source.clone() for source in sources]
    assert truth.gradient is not None
    sums_reference.sum_(truth.gradient, sources, scale=scale, accumulate=False)
    kernel_cases.step_reference(truth, true_counters, step)

    take_step(shard, counters, step, Sources(sources, scale))

    assert differences(shard, truth, counters, true_counters) == []
    assert all(map(torch.equal, sources, untouched))


def take_step(shard: Any, counters: Counters, step: Any, gradients: Sources | None = None) -> None:
    update = kernel_cases.new_update("numba", counters)
    kernel_cases.begin(update, counters, step)
    update.step_(shard, kernel_cases.ONLY_BUCKET, gradients)


# Threads


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_threads_take_the_step_that_one_takes(monkeypatch: pytest.MonkeyPatch, moments: str, threads: int) -> None:
    one, several = long_shard(moments), long_shard(moments)
    take_step(*one)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("shardadam.sums.native._THREAD_NUMEL", 1024)
    with mock.patch("shardadam.sums.native._threads", wraps=sums_threads()) as used:
        take_step(*several)
    assert used.call_count == threads - 1
    assert differences(several[0], one[0], several[1], one[1]) == []


def long_shard(moments: str) -> tuple[Any, Counters, Any]:
    random = torch.Generator().manual_seed(5)
    blocks = torch.arange(7, dtype=torch.int16).repeat_interleave(torch.tensor([9, 1, 40, 3, 2, 30, 4]))
    shard = kernel_cases.build_shard(Variant(moments, "bfloat16", "none"), random, blocks, averages=True)
    shard = replace(shard, gradient=torch.randn(shard.parameter.shape, generator=random))
    return shard, kernel_cases.build_counters(averages=True), kernel_cases.STEPS[1]


def sums_threads() -> Any:
    from shardadam.sums import native

    return native._threads


def test_threads_sum_up_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardadam.sums import compiled

    numel = 7 * sums_reference.PROGRAM_NUMEL + 5
    sources = [torch.randn(numel, dtype=torch.bfloat16) for _ in range(3)]
    truth = torch.empty(numel)
    sums_reference.sum_(truth, sources, scale=0.5, accumulate=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found, squares = torch.empty(numel), torch.empty(8, dtype=torch.float64)
    compiled.sum_(found, sources, squares, scale=0.5, accumulate=False)
    assert torch.equal(found, truth)
    assert torch.equal(squares, sums_reference.sums_of_squares(truth))


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardadam.sums import native

    both_run = threading.Barrier(2, timeout=20)

    def fail(start: int, stop: int) -> None:
        if start < 2:
            both_run.wait()
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(f"of {start} to {stop}")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(ValueError, match=r"of [01] to [12]"):
        native.in_threads(fail, 10, 2**20)


@pytest.mark.parametrize(
    ("threads", "count", "numel"), [(1, 10, 2**20), (2, 1000, 2**10), (3, 7, 2**20), (8, 3, 2**20)]
)
def test_threads_do_everything_once(monkeypatch: pytest.MonkeyPatch, threads: int, count: int, numel: int) -> None:
    from shardadam.sums import native

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    done: list[tuple[int, int]] = []
    native.in_threads(lambda start, stop: done.append((start, stop)), count, numel)
    done.sort()
    assert [start for start, _ in done] == [0, *(stop for _, stop in done[:-1])] and done[-1][1] == count
    least = 1 if threads == 1 else min(count, 2 * threads, count * numel // 2**16)
    assert len(done) >= least and all(start < stop for start, stop in done)


# How it is compiled, and where it is used


def test_all_formats_are_one_machine_code_that_is_made_beforehand() -> None:
    """Construction compiles; no step does, or one process of a host after the other would stop in its first step."""
    from shardadam.sums import compiled as compiled_sums
    from shardadam.update import compiled

    for variant in (VARIANTS[0], VARIANTS[-1]):
        parameter = torch.nn.Parameter(torch.randn(300, dtype=getattr(torch, variant.dtype)))
        precision = Precision(moments=variant.moments, master="auto" if variant.master == "own" else variant.master)
        optimizer = ShardedAdamW([parameter], precision=precision, max_grad_norm=1.0, ema_decay=0.5)
        parameter.square().sum().backward()
        optimizer.step()
    functions = (compiled.update, compiled.begin_step, compiled_sums.measure_blocks, compiled_sums.sum_programs)
    assert [len(function.signatures) for function in functions] == [1, 1, 1, 1]


def test_long_compilations_say_so(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from shardadam.sums import native

    function = mock.Mock(side_effect=time.sleep, __module__="shardadam.update.compiled")
    function.stats.cache_path = None
    monkeypatch.setattr(native, "_PATIENCE_SECONDS", 0.02)
    with caplog.at_level(logging.WARNING, logger="shardadam"):
        native.prepare(function, 0.2)
    assert caplog.messages == ["compiling shardadam.update.compiled for this CPU"]
    native.prepare(function, 0.0)
    function.stats.cache_misses = {}  # another process has compiled it
    native.prepare(function, 0.2)
    assert len(caplog.messages) == 1


def test_without_a_folder_to_write_it_compiles_all_the_same() -> None:
    from shardadam.sums import native

    made = native.njit

    def refuse(**options: Any) -> Any:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return made(**options)

    with mock.patch.object(native, "njit", refuse):
        twice = native.compiled(lambda value: 2 * value)
    native.prepare(twice, 3)
    assert twice(3) == 6


@pytest.mark.parametrize(
    ("dtype", "options", "kind"),
    [
        (torch.float32, {}, "FusedUpdate"),
        (torch.float32, {"moments": "int8"}, "CompiledUpdate"),
        (torch.float32, {"ema": True}, "CompiledUpdate"),
        (torch.bfloat16, {}, "CompiledUpdate"),
        (torch.float16, {"moments": "bf16"}, "CompiledUpdate"),
        (torch.float64, {}, "FusedUpdate"),
        (torch.float64, {"ema": True}, "FusedUpdate"),
    ],
)
def test_it_updates_what_torchs_kernel_does_not_store(dtype: torch.dtype, options: dict[str, Any], kind: str) -> None:
    assert type_of_update(dtype, options) == kind


def test_an_environment_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDADAM_NUMBA", "0")
    assert type_of_update(torch.bfloat16, {"moments": "int8"}) == "FusedUpdate"


def type_of_update(dtype: torch.dtype, options: dict[str, Any]) -> str:
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=dtype))
    precision = Precision(moments=options.get("moments", "fp32"))
    optimizer = ShardedAdamW([parameter], precision=precision, ema_decay=0.9 if "ema" in options else None)
    (arena,) = optimizer._engine.parameters.arenas
    return type(arena.update).__name__


@pytest.mark.parametrize(("local_rank", "count"), [(None, "1"), ("0", "1"), ("1", "0")])
def test_a_broken_numba_is_told_once_a_host_and_torchs_kernels_are_used(local_rank: str | None, count: str) -> None:
    script = """
import sys, warnings
sys.modules["llvmlite"] = None
import torch
from shardadam import Precision, ShardedAdamW, sums
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = ShardedAdamW([parameter], precision=Precision(moments="int8"))
    parameter.sum().backward()
    optimizer.step()
told = [each for each in caught if "Numba cannot be imported" in str(each.message)]
print(len(told), type(optimizer._engine.parameters.arenas[0].update).__name__)
"""
    env = {**os.environ, **({} if local_rank is None else {"LOCAL_RANK": local_rank})}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, env=env)
    assert done.stdout.split() == [count, "FusedUpdate"], done.stderr


# A whole optimizer


def test_an_optimizer_equals_one_with_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Param groups reach the kernel correctly: counters, tables, positions, clipping, unused parameters."""
    from tests.test_triton import train

    ours = train("fp32", False)
    monkeypatch.setenv("SHARDADAM_NUMBA", "0")
    for found, expected in zip(ours, train("fp32", False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
