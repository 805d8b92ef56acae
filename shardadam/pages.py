# SPDX-License-Identifier: Apache-2.0
"""Pages of the CPU's memory: take them late, and give them back early. Does nothing special outside of Linux."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

_IS_LINUX = sys.platform == "linux"
_HUGE_PAGE_BYTES = 1 << 21


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``numel`` zeros, whose storage cannot be resized.

    Where they are many and on the CPU, they take no memory before they are written: the system zeroes a page when it is
    touched first. ``torch.zeros`` writes them at once.
    """
    nbytes = numel * dtype.itemsize
    if not _IS_LINUX or device.type != "cpu" or nbytes < _HUGE_PAGE_BYTES:
        return torch.zeros(numel, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return torch.zeros(numel, dtype=dtype, device=device)  # says what there is too little of
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def return_freed() -> None:
    """Return freed memory to the system: glibc keeps freed blocks of up to 32 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _IS_LINUX else None
    if trim is not None:
        trim(0)


def leave_shared(tensor: Tensor) -> None:
    """Take shared memory out of this process until it is touched again. Its contents stay as they are.

    Args:
        tensor: contiguous, in a shared mapping, whose pages hold nothing else that is private to this process.
    """
    page = mmap.PAGESIZE
    start, stop = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    if _IS_LINUX and start < stop:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
