# SPDX-License-Identifier: Apache-2.0
"""One process as rank 0 of N, without the other ranks, over torch's ``fake`` process group, which moves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch.distributed as dist

from shardadam import transport


@contextmanager
def rank_0_of(ranks: int, *, as_nccl: bool = False) -> Iterator[None]:
    """Context manager: initialise a fake process group of this rank.

    Control messages use it, too, as Gloo would wait for the other ranks. The all-to-alls of gradients do nothing, as
    the fake ones require slices of equal size.

    Args:
        as_nccl: use the NCCL transport on CUDA, and allocate the memory that it needs.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if ranks == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(dist, "is_gloo_available", return_value=False))
            patches.enter_context(mock.patch.object(dist, "all_to_all_single"))
            if as_nccl:
                patches.enter_context(mock.patch.object(transport, "STREAM_BACKENDS", ("fake",)))
            yield
    finally:
        dist.destroy_process_group()
