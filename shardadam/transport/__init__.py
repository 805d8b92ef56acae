# SPDX-License-Identifier: Apache-2.0
"""What moves bytes between ranks, and therefore allocates the buffers it moves.

Nothing outside this package calls a collective of torch.distributed (but ``agreement.py``, which compares what ranks
hold before any training does). All methods are collective, called in the same order on all ranks, and stream-ordered.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardadam.transport.base import Pending, Staging, Transport, Visit
from shardadam.transport.collective import CollectiveTransport
from shardadam.transport.groups import lease_groups
from shardadam.transport.single import SingleProcessTransport

__all__ = [
    "CollectiveTransport",
    "Pending",
    "SingleProcessTransport",
    "Staging",
    "Transport",
    "Visit",
    "connect",
]


def connect(process_group: dist.ProcessGroup | DeviceMesh | None, *, exact_sums: bool = False) -> Transport:
    """The transport for the ranks of ``process_group``; collective. ``lease_groups`` says what may be passed.

    Args:
        exact_sums: sum in rank order in the shard's dtype also where the backend could sum in the dtype that travels.
    """
    lease = lease_groups(process_group)
    return SingleProcessTransport() if lease is None else CollectiveTransport(lease, exact_sums=exact_sums)
