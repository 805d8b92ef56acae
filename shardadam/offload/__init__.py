# SPDX-License-Identifier: Apache-2.0
"""Keeps the optimizer's state in files or in host memory, and brings it to the update bucket by bucket.

Knows layouts and formats; communicates nothing, and does no arithmetic.
"""

from shardadam.offload.planned import offload_planned
from shardadam.offload.policies import DiskOffload, HostOffload, Offload, check_offload
from shardadam.offload.store import Reserved, StateStore, StoredShard, open_store

__all__ = [
    "DiskOffload",
    "HostOffload",
    "Offload",
    "Reserved",
    "StateStore",
    "StoredShard",
    "check_offload",
    "offload_planned",
    "open_store",
]
