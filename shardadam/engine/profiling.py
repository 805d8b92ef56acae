# SPDX-License-Identifier: Apache-2.0
"""Names for what a step does, in torch's profiler; free where nobody profiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING: AbstractContextManager[Any] = nullcontext()


def record(name: str) -> AbstractContextManager[Any]:
    """What runs inside is shown as ``shardadam.<name>``."""
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"shardadam.{name}")
    return _NOTHING
