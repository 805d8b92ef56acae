# SPDX-License-Identifier: Apache-2.0
"""NCCL with one rank: the library itself has no use for it, but its transfers run on a stream of their own, and what
does not wait for them shows.
"""

from __future__ import annotations

import atexit
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from shardadam.agreement import Meeting
from shardadam.transport import CollectiveTransport
from shardadam.transport.groups import GroupPool, Lease


def nccl_of_one() -> CollectiveTransport:
    """A transport over a new group of this process alone, on the first CUDA device."""
    if not dist.is_initialized():
        directory = tempfile.mkdtemp(prefix="shardadam-test-")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl",
            init_method=f"file://{Path(directory) / 'store'}",
            rank=0,
            world_size=1,
            device_id=torch.device("cuda", 0),
        )
        atexit.register(dist.destroy_process_group)
    pool = GroupPool(dist.new_group(backend="gloo"), Meeting(None, 0, [0]))
    pool.training.append(dist.new_group(backend="nccl"))
    return CollectiveTransport(Lease(pool.control, pool.training[0], pool, 0))
