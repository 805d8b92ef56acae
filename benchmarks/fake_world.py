# SPDX-License-Identifier: Apache-2.0
"""One process as rank 0 of N that are not there, over torch's ``fake`` process group, which moves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch.distributed as dist

from shardadam import transport


@contextmanager
def rank_0_of(ranks: int, *, as_nccl: bool = False) -> Iterator[None]:
    """Control messages take the fake way too: Gloo would wait for them. The all-to-alls that gradients travel by are
    left out: the fake ones want slices of equal size.

    Args:
        as_nccl: take the way of transfers on a device's stream, and the room that NCCL needs, on CUDA.
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
