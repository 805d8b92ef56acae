# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="untyped-decorator,import-untyped,var-annotated"
"""Functions for CPU tensors that Numba compiles: how they are compiled, run in threads, and read and write memory.

Compiled functions get tensors as addresses, so that one machine code serves all dtypes. They release Python's global
lock, and round as IEEE 754 says: nothing is contracted or reordered. Numba keeps machine code on disk, and does not see
that a module which the compiled one imports has changed: after a change here, delete ``shardadam/*/__pycache__``.
Imports Numba, so it must be imported only where ``has_numba`` says so.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from threading import Timer
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

FLOAT32, BFLOAT16, FLOAT16 = range(3)
ELEMENTS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_log = logging.getLogger("shardadam")
carray = numba.carray  # type: ignore[attr-defined]
f32, i32, u32 = np.float32, np.int32, np.uint32

_THREAD_NUMEL = 1 << 16
"""A stretch has at least so many elements: starting a thread takes as long as updating some thousands."""
_STRETCHES = 8
"""The most stretches for each thread."""
_PATIENCE_SECONDS = 2.0
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}


def compiled(function: Callable[..., Any]) -> Any:
    """Compile ``function`` at its first call, or read its machine code from disk, where a folder can be written."""
    try:
        return njit(cache=True, nogil=True, **_OPTIONS)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return njit(nogil=True, **_OPTIONS)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile ``function`` into the loops of compiled functions that call it, so that they become vector code."""
    return njit(forceinline=True, **_OPTIONS)(function)


def prepare(function: Any, *arguments: int | float | bool) -> None:
    """Call a ``compiled`` function with ``arguments`` that make it do nothing, so that it compiles now.

    Only one process of a host compiles, and says so if it takes long; the others wait, then read its machine code.
    """
    folder = function.stats.cache_path
    with ExitStack() as stack:
        if folder is not None:
            with suppress(OSError):  # some file systems have no locks
                Path(folder).mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(Path(folder) / "compiling.lock", "ab"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        kept = "" if folder is None else f", once; its machine code is kept in {folder}"
        text = f"compiling {function.__module__} for this CPU{kept}"

        def say() -> None:
            if function.stats.cache_misses:  # else its machine code is being read, on a busy host
                _log.warning(text)

        timer = Timer(_PATIENCE_SECONDS, say)
        stack.callback(timer.cancel)
        timer.start()
        function(*arguments)


def addresses_of(flats: Sequence[Tensor]) -> Tensor:
    """Return the addresses of tensors, int64. Does not keep the tensors alive."""
    return torch.tensor([flat.data_ptr() for flat in flats], dtype=torch.int64, device="cpu")


def in_threads(call: Callable[[int, int], object], count: int, numel: int) -> None:
    """Call ``call(start, stop)`` of stretches of ``range(count)``, in as many threads as torch would use.

    Each thread takes the next stretch when it is done with one. So a thread does less that wakes up late, or shares its
    core with one of torch's, which spin for a while after a parallel loop (unless OMP_WAIT_POLICY is passive).

    Args:
        numel: elements of one of ``count``.
    """
    most = -(-count * numel // _THREAD_NUMEL)
    threads = min(torch.get_num_threads(), count, most)
    if threads <= 1:
        call(0, count)
        return
    stretches = min(_STRETCHES * threads, count, most)
    left = deque((count * i // stretches, count * (i + 1) // stretches) for i in range(stretches))

    def work() -> None:
        while left:
            try:
                start, stop = left.popleft()
            except IndexError:  # another thread has taken the last one
                return
            call(start, stop)

    others = [_threads(os.getpid(), threads - 1).submit(work) for _ in range(1, threads)]
    try:
        work()
    finally:
        for other in others:
            other.result()


@cache
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """Return threads of this process: those of a parent are not there after a fork."""
    return ThreadPoolExecutor(count, thread_name_prefix="shardadam")


# Memory


def _generated(function: Callable[..., Any]) -> Any:
    """Let ``function`` generate LLVM's instructions for a call of it."""
    return intrinsic(function)


def _pointer_to(element: Any) -> Any:
    @_generated
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


int8_at, uint8_at = _pointer_to(types.int8), _pointer_to(types.uint8)
int16_at, int32_at, int64_at = _pointer_to(types.int16), _pointer_to(types.int32), _pointer_to(types.int64)
float32_at, float64_at = _pointer_to(types.float32), _pointer_to(types.float64)


@compiled
def load(out_at, address, start, n, element):
    """Write elements ``start : start + n`` of a flat tensor to ``out``, in float32."""
    out = carray(float32_at(out_at), n)
    if element == FLOAT32:
        floats = carray(float32_at(address + 4 * start), n)
        for i in range(n):
            out[i] = floats[i]
    else:
        bits = carray(int16_at(address + 2 * start), n)
        if element == BFLOAT16:
            for i in range(n):
                out[i] = from_bfloat16(bits[i])
        else:
            for i in range(n):
                out[i] = from_float16(bits[i])


@compiled
def add(out_at, address, start, n, element):
    """Add elements ``start : start + n`` of a flat tensor to ``out``, in float32."""
    out = carray(float32_at(out_at), n)
    if element == FLOAT32:
        floats = carray(float32_at(address + 4 * start), n)
        for i in range(n):
            out[i] += floats[i]
    else:
        bits = carray(int16_at(address + 2 * start), n)
        if element == BFLOAT16:
            for i in range(n):
                out[i] += from_bfloat16(bits[i])
        else:
            for i in range(n):
                out[i] += from_float16(bits[i])


@compiled
def store(values_at, address, start, n, element):
    """Write float32 values to elements ``start : start + n`` of a flat tensor, rounded to the nearest, ties to even."""
    values = carray(float32_at(values_at), n)
    if element == FLOAT32:
        floats = carray(float32_at(address + 4 * start), n)
        for i in range(n):
            floats[i] = values[i]
    else:
        bits = carray(int16_at(address + 2 * start), n)
        if element == BFLOAT16:
            for i in range(n):
                bits[i] = to_bfloat16(values[i])
        else:
            for i in range(n):
                bits[i] = to_float16(values[i])


@compiled
def load_sum(out_at, sources, count, start, n, element, scale):
    """Write ``scale`` times the sum of elements ``start : start + n`` of flat tensors to ``out``, in their order.

    Args:
        sources: address of their addresses, int64.
    """
    addresses = carray(int64_at(sources), count)
    load(out_at, addresses[0], start, n, element)
    for source in range(1, count):
        add(out_at, addresses[source], start, n, element)
    if scale != f32(1.0):
        out = carray(float32_at(out_at), n)
        for i in range(n):
            out[i] *= scale


@compiled
def load_scattered(out_at, address, start, numel, n, element):
    """Write elements ``start : start + n`` of a tensor of ``numel`` elements to ``out``.

    Writes zeros beyond its end, and where its address is 0.
    """
    inside = max(min(n, numel - start), 0) if address != 0 else 0
    load(out_at, address, start, inside, element)
    out = carray(float32_at(out_at + 4 * inside), n - inside)
    for i in range(n - inside):
        out[i] = f32(0.0)


@inlined
def owner_of(blocks, block_bytes, row):
    """Return the parameter that a block of the shard belongs to."""
    if block_bytes == 2:
        return int(carray(int16_at(blocks), row + 1)[row])
    return int(carray(int32_at(blocks), row + 1)[row])


# Dtypes. bfloat16 and float16 are passed as int16, their bits.


@inlined
def from_bfloat16(bits):
    return i32(i32(bits) << i32(16)).view(np.float32)


@inlined
def to_bfloat16(value):
    """Round to the nearest, ties to even."""
    bits = f32(value).view(np.int32)
    odd = i32(i32(bits >> i32(16)) & i32(1))
    rounded = i32(bits + odd + i32(0x7FFF)) if value == value else i32(bits | i32(0x400000))
    return np.int16(i32(rounded >> i32(16)))


@_generated
def from_float16(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@_generated
def to_float16(typing_context, value):
    """Round to the nearest, ties to even."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate
