# SPDX-License-Identifier: Apache-2.0
"""What moves bytes between ranks, and therefore allocates the buffers it moves.

Nothing outside this package calls a collective of torch.distributed (but ``agreement.py``, which compares what ranks
hold before any training does). All methods are collective, called in the same order on all ranks, and stream-ordered.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardadam.chunks import OnChunk
from shardadam.ranks.agreement import exchange
from shardadam.transport.base import Pending, ReduceScatter, Staging, Transport
from shardadam.transport.by_device import ByDeviceTransport
from shardadam.transport.gloo import GlooTransport
from shardadam.transport.groups import CommGroups, backend_of_device, comm_groups, mesh_comm_groups, timeout_s
from shardadam.transport.hybrid import HybridTransport
from shardadam.transport.nccl import STREAM_BACKENDS, NcclTransport
from shardadam.transport.shared_memory import SharedMemoryTransport
from shardadam.transport.single import SingleProcessTransport
from shardadam.transport.unix_sockets import PeerSockets
from shardadam.transport.unix_sockets import connect as connect_sockets

__all__ = [
    "ByDeviceTransport",
    "GlooTransport",
    "HybridTransport",
    "NcclTransport",
    "OnChunk",
    "Pending",
    "ReduceScatter",
    "SharedMemoryTransport",
    "SingleProcessTransport",
    "Staging",
    "Transport",
    "connect",
]


def connect(
    process_group: dist.ProcessGroup | DeviceMesh | None, *, kind: str = "auto", exact_sums: bool = False
) -> Transport:
    """The transport for the ranks of ``process_group``; collective.

    Args:
        process_group: a ProcessGroup or a 1-D DeviceMesh, to shard over; a 2-D DeviceMesh, whose rows (along its last
            dimension) are shard groups and whose columns are replica groups, whatever its dimensions are called; None
            for the default group, or for this process alone where none is initialised.
        kind: "auto": shared memory where all ranks of a shard group are on one host and can reach each other there (for
            what is on the CPU), else torch.distributed; "collective": torch.distributed; "shared_memory".
        exact_sums: sum in rank order in the shard's dtype also where the backend could sum in the dtype that travels.

    Raises:
        RuntimeError: shared memory was asked for and is not possible, on every rank.
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


def _connect_collective(groups: CommGroups, *, exact_sums: bool = False) -> Transport:
    """The transport over torch.distributed for the backends of ``groups.training``."""
    backends = backend_of_device(groups.training)
    if backends.get("cuda") not in STREAM_BACKENDS:
        return GlooTransport(groups)
    nccl = NcclTransport(groups, exact_sums=exact_sums)
    return ByDeviceTransport(GlooTransport(groups), nccl) if "cpu" in backends else nccl


def _connect_group(groups: CommGroups | None, *, kind: str, exact_sums: bool) -> Transport:
    """The transport for a shard group; None: of this rank alone."""
    if groups is None:
        return SingleProcessTransport()
    collective = _connect_collective(groups, exact_sums=exact_sums)
    # Ranks that want different things are told so later, when all that they must agree on is compared.
    if set(exchange(kind, groups.control)) != {kind} or kind == "collective":
        return collective
    sockets: PeerSockets | str = "the process group has no backend for the CPU"
    if "cpu" in backend_of_device(groups.training):
        ranks = dist.get_process_group_ranks(groups.training)
        exchange_here = partial(exchange, group=groups.control)
        sockets = connect_sockets(collective.rank, ranks, exchange_here, timeout_s(groups.training))
    if isinstance(sockets, PeerSockets):
        return SharedMemoryTransport(collective, sockets)
    if kind == "shared_memory":
        collective.close(clean=True)
        raise RuntimeError(
            f'transport: "shared_memory" is not possible here: {sockets}. Use "auto", which then takes "collective".'
        )
    return collective
