# SPDX-License-Identifier: Apache-2.0
"""Sums of gradient slices with their statistics, in one pass, and where gradients lie before they are reduced.

``reference`` is slow, readable and defines the result; ``kernel`` equals it bit for bit by Triton. Nothing here
communicates.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch

KERNEL_DEVICES = {"cuda"}
"""Types of devices with kernels; tests add "cpu", for Triton's interpreter."""


def has_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether Triton kernels work on gradients and parameters of ``dtype`` on ``device``.

    Ranks may differ in it, so what ranks exchange and how state is stored must not depend on it. In a process that has
    not used CUDA, such as a planner, kernels are taken to work.
    """
    if dtype == torch.float64 or device.type not in KERNEL_DEVICES or find_spec("triton") is None:
        return False
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
