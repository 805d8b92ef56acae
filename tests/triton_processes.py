# SPDX-License-Identifier: Apache-2.0
"""Processes that interpret or compile Triton kernels. A process does one of them, decided when Triton is imported."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def process(*, interpret: bool) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(1, mp_context=context, initializer=_enter, initargs=(interpret, cache)) as pool,
    ):
        yield pool


def _enter(interpret: bool, cache: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # NumPy warns of infinities, which are intended
    os.environ.update(SHARDADAM_NUMBA="0")  # CPU tensors are for Triton's kernels here
    os.environ.update(TRITON_INTERPRET=str(int(interpret)), TRITON_CACHE_DIR=cache)
