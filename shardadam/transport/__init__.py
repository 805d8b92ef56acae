# SPDX-License-Identifier: Apache-2.0
"""What moves bytes between ranks, and therefore allocates the buffers it moves.

Nothing outside this package calls a collective of torch.distributed (but ``agreement.py``, which compares what ranks
hold before any training does). All methods are collective, called in the same order on all ranks, and stream-ordered.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardadam.agreement import exchange
from shardadam.chunks import Visit
from shardadam.transport.base import Pending, Staging, Transport
from shardadam.transport.collective import CollectiveTransport
from shardadam.transport.groups import Lease, backend_of_device, lease_groups, lease_mesh, timeout_s
from shardadam.transport.hybrid import HybridTransport
from shardadam.transport.links import Links
from shardadam.transport.links import connect as connect_links
from shardadam.transport.shared_memory import SharedMemoryTransport
from shardadam.transport.single import SingleProcessTransport

__all__ = [
    "CollectiveTransport",
    "HybridTransport",
    "Pending",
    "SharedMemoryTransport",
    "SingleProcessTransport",
    "Staging",
    "Transport",
    "Visit",
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
        return _connect_group(lease_groups(process_group), kind=kind, exact_sums=exact_sums)
    mesh = lease_mesh(process_group)
    shard = _connect_group(mesh.shard, kind=kind, exact_sums=exact_sums)
    if mesh.replica is None:
        return shard
    assert mesh.meeting is not None
    return HybridTransport(shard, CollectiveTransport(mesh.replica), control=mesh.control, meeting=mesh.meeting)


def _connect_group(lease: Lease | None, *, kind: str, exact_sums: bool) -> Transport:
    """The transport for a shard group; None: of this rank alone."""
    if lease is None:
        return SingleProcessTransport()
    collective = CollectiveTransport(lease, exact_sums=exact_sums)
    # Ranks that want different things are told so later, when all that they must agree on is compared.
    if set(exchange(kind, lease.control)) != {kind} or kind == "collective":
        return collective
    links: Links | str = "the process group has no backend for the CPU"
    if "cpu" in backend_of_device(lease.training):
        ranks = dist.get_process_group_ranks(lease.training)
        exchange_here = partial(exchange, group=lease.control)
        links = connect_links(collective.rank, ranks, exchange_here, timeout_s(lease.training))
    if isinstance(links, Links):
        return SharedMemoryTransport(collective, links)
    if kind == "shared_memory":
        collective.close(clean=True)
        raise RuntimeError(
            f'transport: "shared_memory" is not possible here: {links}. Use "auto", which then takes "collective".'
        )
    return collective
