# SPDX-License-Identifier: Apache-2.0
"""Sums of gradient slices with their statistics, in one pass, and where gradients lie before they are reduced.

``reference`` is slow, readable and defines the result; ``kernel`` equals it bit for bit by Triton on GPUs, ``compiled``
by Numba on CPUs. Nothing here communicates.
"""

from __future__ import annotations

import os
import platform
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch

KERNEL_DEVICES = {"cuda"}
"""Types of devices with kernels; tests add "cpu", for Triton's interpreter."""


def has_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether Triton kernels work on gradients and parameters of ``dtype`` on ``device``.

    Ranks may differ in it, so what ranks exchange and how state is stored must not depend on it. In a process that has
    not used CUDA, such as a planner, kernels are taken to work, and on a machine without a GPU also without Triton.
    """
    if dtype == torch.float64 or device.type not in KERNEL_DEVICES:
        return False
    if find_spec("triton") is None:
        return device.type == "cuda" and not torch.cuda.is_available()
    has_context = device.type == "cuda" and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return not has_context or can_launch()


@cache
def can_launch() -> bool:
    """Return whether Triton can build and launch a kernel on the current CUDA device; warn once if not.

    Triton builds its launcher with a C compiler when a program runs, and GPU images often have none.
    """
    from shardadam.sums import kernel

    try:
        kernel.launch_nothing(torch.device("cuda"))
    except (
        Exception
    ) as error:  # a compiler or header that is missing or broken, an old driver or GPU: all look different
        warnings.warn(
            f"Triton cannot build a kernel here ({type(error).__name__}: {error}), so the optimizer uses torch's own "
            "kernels, which are slower. Install a C compiler such as gcc with Python's headers, or name one in the "
            "environment variable CC.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def kernels_for(device: torch.device) -> ModuleType:
    """Return the module with ``sum_``, ``measure`` and ``measure_scattered`` for arenas that kernels update."""
    if device.type == "cpu" and has_numba():
        from shardadam.sums import compiled

        return compiled
    from shardadam.sums import kernel

    return kernel


def has_numba() -> bool:
    """Return whether functions compiled by Numba work on CPU tensors here. ``SHARDADAM_NUMBA=0`` says no.

    Ranks may differ in it, as in ``has_kernel``.
    """
    return os.environ.get("SHARDADAM_NUMBA", "1") != "0" and find_spec("numba") is not None and _can_compile()


@cache
def _can_compile() -> bool:
    """Return whether Numba can be imported and knows a CPU's conversions to float16; warn once a host if not."""
    try:
        from llvmlite.binding import get_host_cpu_features  # type: ignore[import-untyped]
        from numba import njit  # noqa: F401
    except Exception as error:  # not only ImportError: a NumPy that is too new for it raises others
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks of a host import the same
            warnings.warn(
                f"Numba cannot be imported ({type(error).__name__}: {error}), so the optimizer uses torch's own "
                "kernels, which are slower for compressed state on CPUs. Mend or uninstall it, or set "
                "SHARDADAM_NUMBA=0.",
                RuntimeWarning,
                stacklevel=2,
            )
        return False
    return platform.machine() != "x86_64" or bool(get_host_cpu_features().get("f16c"))
