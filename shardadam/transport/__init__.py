# SPDX-License-Identifier: Apache-2.0
"""What moves bytes between ranks, and therefore allocates the buffers it moves.

Nothing outside this package calls a collective of torch.distributed (but ``agreement.py``, which compares what ranks
hold before any training does). All methods are collective, called in the same order on all ranks, and stream-ordered.
"""

from __future__ import annotations

from shardadam.transport.base import Pending, Staging, Transport
from shardadam.transport.collective import CollectiveTransport
from shardadam.transport.groups import own_group
from shardadam.transport.single import SingleProcessTransport

__all__ = [
    "CollectiveTransport",
    "Pending",
    "SingleProcessTransport",
    "Staging",
    "Transport",
    "own_group",
]
