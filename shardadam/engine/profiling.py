# SPDX-License-Identifier: Apache-2.0
"""Names for the phases of a step in torch's profiler, at almost no cost while it does not run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING: AbstractContextManager[Any] = nullcontext()


def record(name: str) -> AbstractContextManager[Any]:
    """Return a context manager that torch's profiler shows as ``shardadam.<name>``."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"shardadam.{name}")
    return _NOTHING
