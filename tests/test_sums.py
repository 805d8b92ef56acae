# SPDX-License-Identifier: Apache-2.0
"""Sums of gradients: the kernels equal their reference bit for bit, those of Triton in its interpreter, and compile.

As in test_triton.py, kernels are interpreted and compiled in processes of their own.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from shardadam import layout, sums
from shardadam.sums import reference
from shardadam.sums.reference import PROGRAM_NUMEL, TILE_NUMEL
from shardadam.sums.scattered import Addresses, Scattered
from shardadam.sums.sources import sum_sources_
from shardadam.sums.to_device import send_as_arguments
from tests.kernel_cases import (
    ARENA_NUMELS,
    VARIANTS,
    awkward_values,
    bits_of,
    build_arena_shard,
    gradients_of_arena,
)
from tests.test_triton import ARCHITECTURES, Compiled, compile_kernel

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
DTYPES = ("float32", "bfloat16", "float16")
LENGTHS = (1, 127, TILE_NUMEL + 128, PROGRAM_NUMEL, 2 * PROGRAM_NUMEL + 3)


needs_numba = pytest.mark.skipif(not sums.has_numba(), reason="needs Numba")


# The kernels: those of GPUs in the interpreter, and those of CPUs


@needs_numba
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shard", DTYPES)
def test_sums_on_cpus_equal_the_reference(shard: str, source: str) -> None:
    assert differences_of_sums(shard, source) == []


@needs_numba
def test_sums_of_squares_on_cpus_equal_the_reference() -> None:
    assert differences_of_squares() == []


@needs_numba
def test_squares_of_scattered_gradients_on_cpus_equal_those_of_the_shard() -> None:
    assert differences_of_scattered_squares() == []


@needs_triton
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shard", DTYPES)
def test_interpreted_sums_equal_the_reference(interpreter: ProcessPoolExecutor, shard: str, source: str) -> None:
    assert interpreter.submit(differences_of_sums, shard, source).result(timeout=100) == []


@needs_triton
def test_interpreted_sums_of_squares_equal_the_reference(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(differences_of_squares).result(timeout=100) == []


@needs_triton
def test_squares_of_scattered_gradients_equal_those_of_the_shard(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(differences_of_scattered_squares).result(timeout=100) == []


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("shard", DTYPES)
def test_torchs_sums_equal_the_reference(shard: str, source: str) -> None:
    """A narrow shard was summed up in its own dtype, and so rounded once for every rank."""
    assert differences_of_sums(shard, source, by_torch=True) == []


def differences_of_sums(shard: str, source: str, device: str = "cpu", *, by_torch: bool = False) -> list[str]:
    kernel = sums.kernels_for(torch.device(device))
    random = torch.Generator().manual_seed(DTYPES.index(shard) * 3 + DTYPES.index(source))
    cases = itertools.product((1, 2, 5), (1.0, 1 / 3), (False, True))
    found = []
    for number, (count, scale, accumulate) in enumerate(cases):
        numel = LENGTHS[number % len(LENGTHS)]
        sources = torch.stack([values(numel, source, random) for _ in range(count)]).unbind()
        if number == 9:
            sources = (sources[0], *(each.clone() for each in sources[1:]))  # not at equal distances
        ours = values(numel, shard, random)
        truth = ours.clone()
        squares = torch.full((-(-numel // PROGRAM_NUMEL),), -1.0, dtype=torch.float64)
        ours, squares = ours.to(device), squares.to(device)
        if device == "cpu" or number == 9:
            there = [each.to(device) for each in sources]
        else:
            there = list(torch.stack(sources).to(device).unbind())
        if by_torch:
            sum_sources_(ours, there, scale=scale, accumulate=accumulate)
        else:
            kernel.sum_(ours, there, squares if number % 3 else None, scale=scale, accumulate=accumulate)
        ours, squares = ours.cpu(), squares.cpu()
        reference.sum_(truth, sources, scale=scale, accumulate=accumulate)
        case = f"{count} sources of {numel}, scale {scale}, accumulate {accumulate}"
        if not is_same(ours, truth):
            found.append(case)
        if number % 3 and not by_torch and not is_same(squares, reference.sums_of_squares(truth)):
            found.append(f"squares of {case}")
    return found


def differences_of_squares(device: str = "cpu") -> list[str]:
    kernel = sums.kernels_for(torch.device(device))
    random = torch.Generator().manual_seed(1)
    found = []
    for dtype, numel in itertools.product(DTYPES, LENGTHS):
        flat = values(numel, dtype, random).nan_to_num(posinf=3.0, neginf=3.0)
        squares = torch.full((-(-numel // PROGRAM_NUMEL),), -1.0, dtype=torch.float64)
        squares = squares.to(device)
        kernel.measure(flat.to(device), squares)
        squares = squares.cpu()
        found += [f"{dtype} of {numel}"] * (not torch.equal(squares, reference.sums_of_squares(flat)))
    return found


def differences_of_scattered_squares(device: str = "cpu") -> list[str]:
    kernel = sums.kernels_for(torch.device(device))
    found = []
    for dtype, aligned in itertools.product(DTYPES, (True, False)):
        arena = build_arena_shard(VARIANTS[0], device)
        random = torch.Generator().manual_seed(3)
        gradients = gradients_of_arena(getattr(torch, dtype), random, aligned=aligned, device=device)
        assert gradients.addresses is not None and gradients.addresses.is_aligned == aligned
        flats = []
        for plan, bucket in zip(arena.plans, arena.buckets, strict=True):
            flats.append(torch.full((plan.shard_numel,), math.nan, dtype=gradients.dtype, device=device))
            gradients.write_(flats[-1], plan.shard_segments(1), 0, plan.shard_numel)
            if not is_same(measured(kernel, arena, gradients, bucket), reference.sums_of_squares(flats[-1])):
                found.append(f"{dtype}, aligned {aligned}, bucket at {plan.offset}")
        if not is_same(measured(kernel, arena, gradients, arena.shard), reference.sums_of_squares(torch.cat(flats))):
            found.append(f"{dtype}, aligned {aligned}, merged")
    # Longer than one program: a single parameter, from its second block on, and padding.
    # Ordinary values: beside huge ones the order in which they are added makes no difference.
    gradient = torch.randn(PROGRAM_NUMEL + 700, generator=torch.Generator().manual_seed(4))
    gradient = gradient.to(device)
    single = Scattered.with_addresses([gradient], torch.float32, torch.device(device))
    assert single.addresses is not None
    flat = torch.cat([gradient[128:], gradient.new_zeros(-len(gradient) % 128)])
    squares = torch.full((2,), -1.0, dtype=torch.float64, device=device)
    kernel.measure_scattered(
        single.addresses,
        squares,
        blocks=torch.zeros(len(flat) // 128, dtype=torch.int32, device=device),
        first_blocks=torch.tensor([5], device=device),
        numels=torch.tensor([len(gradient)], device=device),
        first_block=6,
    )
    return found + ["several programs"] * (not torch.equal(squares, reference.sums_of_squares(flat)))


def measured(kernel: Any, arena: Any, gradients: Scattered, shard: Any) -> Tensor:
    squares = torch.full((1,), -1.0, dtype=torch.float64, device=shard.blocks.device)
    kernel.measure_scattered(
        gradients.addresses,
        squares,
        blocks=shard.blocks,
        first_blocks=arena.counters.first_blocks,
        numels=arena.counters.numels,
        positions=shard.positions,
        first_block=shard.first_block,
    )
    return squares


def values(numel: int, dtype: str, random: torch.Generator) -> Tensor:
    """Return values of any kind, NaN included; a third of them ties between bfloat16 values."""
    found = awkward_values(numel, random)
    kind = torch.randint(0, 300, (numel,), generator=random)
    tie = found.view(torch.int32) & -0x8000 | 0x8000
    found = torch.where(kind < 100, tie.view(torch.float32), found)
    return torch.where(kind == 299, math.nan, found).to(getattr(torch, dtype))


def is_same(ours: Tensor, truth: Tensor) -> bool:
    """Whether all bits are equal; those of NaNs do not count."""
    return bool(((bits_of(ours) == bits_of(truth)) | (ours.isnan() & truth.isnan())).all())


# The reference


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_of_squares_is_finite_if_and_only_if_all_elements_are(dtype: str) -> None:
    kind = getattr(torch, dtype)
    flat = torch.full((3 * PROGRAM_NUMEL,), torch.finfo(kind).max, dtype=kind)
    assert reference.sums_of_squares(flat).isfinite().all()
    for index, value in itertools.product((0, TILE_NUMEL, PROGRAM_NUMEL - 1), (math.inf, -math.inf, math.nan)):
        one = flat.clone()
        one[PROGRAM_NUMEL + index] = value
        assert reference.sums_of_squares(one).isfinite().tolist() == [True, False, True]


def test_sums_of_squares_are_those_of_exact_arithmetic_to_a_last_place_or_few() -> None:
    flat = torch.randn(PROGRAM_NUMEL + 5, generator=torch.Generator().manual_seed(0)) * 1e19
    expected = [math.fsum(float(x) ** 2 for x in part) for part in flat.split(PROGRAM_NUMEL)]
    assert reference.sums_of_squares(flat).tolist() == pytest.approx(expected, rel=1e-14)
    assert reference.sums_of_squares(flat[:0]).tolist() == []


def test_sums_are_made_in_float32_in_order_and_rounded_once() -> None:
    shard = torch.tensor([1.0], dtype=torch.bfloat16)
    sources = [torch.tensor([x], dtype=torch.bfloat16) for x in (1.0, 2.0**-7, 2.0**-9, 2.0**-9)]
    reference.sum_(shard, sources, scale=1.0, accumulate=False)
    assert shard.item() == 1.0 + 2.0**-6  # 1 + 2^-7 + 2^-8, a tie, goes to the even neighbour
    reference.sum_(shard, sources[:1], scale=0.5, accumulate=True)
    assert shard.item() == 1.5 + 2.0**-6
    large = [torch.tensor([x]) for x in (1e30, 1.0, -1e30)]
    total = torch.zeros(1)
    reference.sum_(total, large, scale=1.0, accumulate=False)
    assert total.item() == 0.0


# Scattered gradients


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_scattered_gradients_are_written_where_the_layout_has_them(world_size: int, dtype: str) -> None:
    kind, random = getattr(torch, dtype), torch.Generator().manual_seed(0)
    numels = tuple(reversed(ARENA_NUMELS))
    plan = layout.build_layout(
        [layout.ParameterSpec(numel, 4, "arena") for numel in numels], world_size=world_size, bucket_bytes=3000
    )
    tensors = [None if i == 1 else torch.randn(numel, generator=random).to(kind) for i, numel in enumerate(numels)]
    gradients = Scattered(tensors, kind)
    flat = torch.zeros(plan.arenas[0].numel, dtype=kind)
    for parameter, offset in zip(plan.arenas[0].parameters, plan.arenas[0].offsets, strict=True):
        tensor = tensors[parameter]
        if tensor is not None:
            flat[offset : offset + len(tensor)] = tensor
    for bucket, rank in itertools.product(plan.buckets, range(world_size)):
        begin = bucket.offset + rank * bucket.shard_numel
        segments = list(bucket.shard_segments(rank))
        for start, stop in ((0, bucket.shard_numel), (0, 77), (77, 128), (100, bucket.shard_numel)):
            target = torch.full((stop - start,), math.nan, dtype=kind)
            gradients.write_(target, segments, start, stop)
            assert torch.equal(target, flat[begin + start : begin + stop])


def test_addresses_tell_where_gradients_lie_and_whether_they_are_aligned() -> None:
    flat = torch.zeros(1000, dtype=torch.bfloat16)
    device = torch.device("cpu")
    tensors = [flat[:100], None, flat[104:105], flat[:0]]
    addresses = Scattered.with_addresses(tensors, torch.bfloat16, device).addresses
    assert addresses is not None and addresses.is_aligned and addresses.dtype == torch.bfloat16
    assert addresses.table.tolist() == [flat.data_ptr(), 0, flat.data_ptr() + 208, 0]
    unaligned = Scattered.with_addresses([flat[:8], flat[4:]], torch.bfloat16, device).addresses
    assert unaligned is not None and not unaligned.is_aligned
    empty = Scattered.with_addresses([], torch.float32, device).addresses
    assert empty is not None and empty.table.tolist() == []


def test_addresses_in_a_captured_graph_are_exact() -> None:
    """They go as arguments of kernels, which must not pass through a float."""
    values = [0, 2**47 - 16, 2**62 + 1, 2**53 + 1, 16]
    assert send_as_arguments(values, torch.int64, torch.device("cpu")).tolist() == values
    assert send_as_arguments([], torch.int64, torch.device("cpu")).tolist() == []


# Whether there are kernels


@needs_triton
def test_without_a_way_to_launch_kernels_torchs_are_used_and_one_warning_says_so(
    compiler: ProcessPoolExecutor,
) -> None:
    """This machine may have a GPU; the probe's own failure is made up then."""
    found, messages = compiler.submit(probe_in_vain).result(timeout=100)
    assert found == [False, False]
    assert len(messages) == 1
    assert "C compiler" in messages[0] and "CC" in messages[0] and "no compiler here" in messages[0]


@needs_triton
def test_no_kernel_is_launched_before_cuda_is_used(compiler: ProcessPoolExecutor) -> None:
    """A planner uses no GPU."""
    assert compiler.submit(probe_before_cuda).result(timeout=100)


def probe_in_vain() -> tuple[list[bool], list[str]]:
    from shardadam.sums import kernel

    def fail(device: torch.device) -> None:
        raise RuntimeError("no compiler here")

    is_initialized, launch_nothing = torch.cuda.is_initialized, kernel.launch_nothing
    torch.cuda.is_initialized, kernel.launch_nothing = lambda: True, fail
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [sums.has_kernel(torch.float32, torch.device("cuda", index)) for index in range(2)]
    finally:
        torch.cuda.is_initialized, kernel.launch_nothing = is_initialized, launch_nothing
        sums.can_launch.cache_clear()
    assert all(each.category is RuntimeWarning for each in caught)
    return found, [str(each.message) for each in caught]


def probe_before_cuda() -> bool:
    assert not torch.cuda.is_initialized()
    has_kernel = sums.has_kernel(torch.float32, torch.device("cuda"))
    return has_kernel and sums.can_launch.cache_info().misses == 0


# The compiled kernels

COMPILED = ["sum of 1", "sum of 8", "measure", "measure scattered", "measure unaligned", "nothing"]
MOST_REGISTERS = 128


@needs_triton
@pytest.mark.sweep(9)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_kernels_spill_no_register_and_use_whole_words(
    compiler: ProcessPoolExecutor, name: str, architecture: int, dtype: str
) -> None:
    compiled = compiler.submit(compile_sums, name, architecture, dtype).result(timeout=100)
    size = f"{compiled.registers} registers, {len(compiled.instructions)} instructions"
    print(f"{name} {dtype} sm_{architecture}: {size}")
    assert not compiled.spills
    if name != "measure unaligned":
        assert compiled.registers <= MOST_REGISTERS
        assert (compiled.wide_loads > 0) == (name != "nothing")
        assert "ld.global.v2" not in compiled.ptx


def compile_sums(name: str, architecture: int, dtype: str) -> Compiled:
    """Compile a kernel with the arguments that it is launched with."""
    from shardadam.sums import kernel

    given: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **keywords: given.extend((arguments, keywords))

    def capture(kernel_name: str, function: Any, *arguments: Any, **keywords: Any) -> Any:
        compiled = getattr(kernel, kernel_name)
        setattr(kernel, kernel_name, Kernel())
        try:
            function(*arguments, **keywords)
        finally:
            setattr(kernel, kernel_name, compiled)
        return compiled

    flat, squares = torch.zeros(8 * 4096, dtype=getattr(torch, dtype)), torch.zeros(8, dtype=torch.float64)
    table = torch.zeros(3, dtype=torch.int64)
    if name.startswith("sum of"):
        sources: Sequence[Tensor] = flat.chunk(int(name.split()[-1]))
        shard = torch.zeros(len(sources[0]))
        of = capture("sum_sources", kernel.sum_, shard, sources, squares, scale=0.5, accumulate=True)
    elif name == "measure":
        of = capture("measure_flat", kernel.measure, flat, squares)
    elif name == "nothing":
        of = capture("do_nothing", kernel.launch_nothing, torch.device("cpu"))
    else:
        addresses = Addresses(table, flat.dtype, is_aligned="unaligned" not in name)
        blocks, positions = torch.zeros(64, dtype=torch.int16), torch.zeros(64, dtype=torch.int32)
        tables = {"blocks": blocks, "positions": positions, "first_blocks": table, "numels": table}
        of = capture("measure_blocks", kernel.measure_scattered, addresses, squares, **tables)
    arguments, keywords = given
    return compile_kernel(of, arguments, keywords, architecture)
