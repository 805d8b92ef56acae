# SPDX-License-Identifier: Apache-2.0
"""A one-rank NCCL transport and CUDA graph capture, for tests and benchmarks on a GPU.

The library never uses NCCL with one rank. Here its transfers run on their own stream, so code that does not wait for
them fails.
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from shardadam.ranks.store_barrier import StoreBarrier
from shardadam.transport import NcclTransport
from shardadam.transport.groups import CommGroups, GroupCache


def nccl_of_one() -> NcclTransport:
    """Return a transport over a new group of one rank, on the first CUDA device."""
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
    cache = GroupCache("shardadam", dist.new_group(backend="gloo"), StoreBarrier(None, 0, [0]))
    cache.training[0] = dist.new_group(backend="nccl")
    return NcclTransport(CommGroups(cache.control, cache.training[0], cache, 0))


def warm_up(step: Callable[[], object]) -> None:
    """Run ``step`` three times on a side stream, which a capture requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Capture a warmed-up ``step`` as one CUDA graph and return its replay function."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
