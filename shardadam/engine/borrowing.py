# SPDX-License-Identifier: Apache-2.0
"""Parameters that other code stores (``fully_shard``), copied to flat storage while the optimizer needs them there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from shardadam.engine.storage import FlatArena, view_of


@contextmanager
def lent(arenas: Sequence[FlatArena], *, written: bool) -> Iterator[None]:
    """Context manager: give borrowed arenas a flat copy of their parameters.

    Args:
        written: copy the flat copy back at the end. Not if the block raises.
    """
    borrowed = [arena for arena in arenas if arena.is_borrowed]
    flats, locals_ = [], []
    for arena in borrowed:
        storage = arena.parameters.untyped_storage()
        storage.resize_(arena.parameters.numel() * arena.parameters.element_size())
        arena.parameters.zero_()
        flats += [view_of(arena.parameters, param) for param in arena.params]
        locals_ += [param.local.detach() for param in arena.params]
    try:
        if flats:
            torch._foreach_copy_(flats, locals_)
        yield
        if flats and written:
            torch._foreach_copy_(locals_, flats)
    finally:
        flats.clear()
        for arena in borrowed:
            arena.parameters.untyped_storage().resize_(0)
