# SPDX-License-Identifier: Apache-2.0
"""Transports: they move bytes between ranks, and allocate the buffers for that.

Only this package and ``ranks/agreement.py`` call collectives of torch.distributed. All ranks must call a transport's
collective methods in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardadam.ranks.agreement import exchange
from shardadam.transport.base import Pending, ReduceScatter, Staging, Transport
from shardadam.transport.by_device import ByDeviceTransport
from shardadam.transport.gloo import GlooTransport
from shardadam.transport.groups import (
    CommGroups,
    backend_of_device,
    comm_groups,
    comm_groups_over,
    control_over,
    mesh_comm_groups,
    timeout_s,
)
from shardadam.transport.hybrid import HybridTransport
from shardadam.transport.job import Job, ranks_of_job
from shardadam.transport.nccl import STREAM_BACKENDS, NcclTransport
from shardadam.transport.shared_memory import SharedMemoryTransport
from shardadam.transport.single import SingleProcessTransport
from shardadam.transport.unix_sockets import PeerSockets
from shardadam.transport.unix_sockets import connect as connect_sockets

__all__ = [
    "ByDeviceTransport",
    "GlooTransport",
    "HybridTransport",
    "Job",
    "NcclTransport",
    "Pending",
    "ReduceScatter",
    "SharedMemoryTransport",
    "SingleProcessTransport",
    "Staging",
    "Transport",
    "connect",
    "connect_job",
]


def connect(
    process_group: dist.ProcessGroup | DeviceMesh | None, *, kind: str = "auto", exact_sums: bool = False
) -> Transport:
    """Return a transport between the ranks of ``process_group``. Collective: all of them must call it.

    Args:
        process_group: a ProcessGroup or a 1-D DeviceMesh to shard over; or a 2-D DeviceMesh (replicas, shards), whose
            rows are shard groups and whose columns are replica groups; None for the default group, or for this process
            only if torch.distributed is not initialised.
        kind: "collective": torch.distributed. "shared_memory": shared memory for CPU tensors, torch.distributed for
            others. "auto": "shared_memory" if all ranks of the shard group run on one host that supports it, else
            "collective".
        exact_sums: sum gradients in rank order and in the shard's dtype, even if the backend would sum in the dtype
            that is sent.

    Raises:
        RuntimeError: on every rank, if ``kind`` is "shared_memory" and it is not possible.
        ValueError: this rank is not in ``process_group``, or it is a mesh of other dimensions.
        TypeError: ``process_group`` is something else.
    """
    if not (isinstance(process_group, DeviceMesh) and process_group.ndim == 2):
        return _connect_group(comm_groups(process_group), kind=kind, exact_sums=exact_sums)
    mesh = mesh_comm_groups(process_group)
    shard = _connect_group(mesh.shard, kind=kind, exact_sums=exact_sums)
    if mesh.replica is None:
        return shard
    assert mesh.store_barrier is not None
    return HybridTransport(
        shard, _connect_collective(mesh.replica), control=mesh.control, store_barrier=mesh.store_barrier
    )


def connect_job(transport: Transport, model_parallel_ranks: Sequence[int]) -> Job:
    """Return the job of the data-parallel ``transport``. Collective over the job.

    Args:
        model_parallel_ranks: those that hold different parts of one copy of the model, with this rank, ascending.

    Raises:
        ValueError: the groups of all ranks are no grid.
    """
    if len(model_parallel_ranks) <= 1:
        return Job(transport.control, transport.store_barrier)
    model_parallel = _connect_collective(comm_groups_over(model_parallel_ranks))
    try:
        return Job(*control_over(ranks_of_job(transport, model_parallel)), model_parallel)
    except Exception:
        model_parallel.close(clean=True)
        raise


def _connect_collective(groups: CommGroups, *, exact_sums: bool = False) -> Transport:
    """Return the transport over torch.distributed for the backends of ``groups.training``."""
    backends = backend_of_device(groups.training)
    if backends.get("cuda") not in STREAM_BACKENDS:
        return GlooTransport(groups)
    nccl = NcclTransport(groups, exact_sums=exact_sums)
    if "cpu" in backends:
        return ByDeviceTransport(GlooTransport(groups), nccl, trains_on_host=True)
    if "cpu" in backend_of_device(groups.control):
        host = GlooTransport(replace(groups, training=groups.control))
        return ByDeviceTransport(host, nccl, trains_on_host=False)
    return nccl  # this build of torch has no Gloo


def _connect_group(groups: CommGroups | None, *, kind: str, exact_sums: bool) -> Transport:
    """Return the transport of a shard group; ``groups`` is None for one rank."""
    if groups is None:
        return SingleProcessTransport()
    collective = _connect_collective(groups, exact_sums=exact_sums)
    # If kinds differ, the agreement check of all arguments raises later.
    if set(exchange(kind, groups.control)) != {kind} or kind == "collective":
        return collective
    sockets: PeerSockets | str = "the process group has no backend for the CPU"
    if "cpu" in backend_of_device(groups.training):
        ranks = dist.get_process_group_ranks(groups.training)
        exchange_objects = partial(exchange, group=groups.control)
        sockets = connect_sockets(collective.rank, ranks, exchange_objects, timeout_s(groups.training))
    if isinstance(sockets, PeerSockets):
        return SharedMemoryTransport(collective, sockets)
    if kind == "shared_memory":
        collective.close(clean=True)
        raise RuntimeError(
            f'transport: "shared_memory" is not possible here: {sockets}. Use "auto", which falls back to "collective".'
        )
    return collective
