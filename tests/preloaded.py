# SPDX-License-Identifier: Apache-2.0
"""What the fork server of ``tests/ranks.py`` imports once, so that no process that it forks has to.

The kernels are prepared as well: reading their machine code takes a second in each process. Everything is then hidden
from the garbage collector, which would visit it after each test on each rank, and copy its pages.
"""

from __future__ import annotations

import gc
import warnings

import pytest  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.optim
import torch.utils.checkpoint

from shardadam.sums import has_numba

torch.set_num_threads(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a test in which a rank prepares them for itself sees warnings
    if has_numba():
        from shardadam.update import compiled

        compiled._prepare()
gc.collect()
gc.freeze()
