# SPDX-License-Identifier: Apache-2.0
"""How ranks that torchrun has started, or started again, find each other.

Note: a store of their own
    torchrun's agents keep one store while workers come and go (torch 2.13), and what dead ranks have left in it, their
    addresses among it, would be taken for the living's: `init_process_group` then waits for the dead. So rank 0 begins
    a life under a new name, the others ask whether it lives, and only what is under that name is read.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from arguments import Ranks


def join(ranks: Ranks, backend: str, *, timeout_s: float) -> None:
    """Collective: `init_process_group`, whatever ranks there have been before; `timeout_s` is the group's, too."""
    timeout = timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)  # rank 0 makes a new store
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    store = dist.PrefixStore(name_of_life(agents, ranks, timeout_s), agents)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)


def name_of_life(store: dist.Store, ranks: Ranks, timeout_s: float) -> str:
    """Collective: the same new name on all ranks. Raises DistStoreError or TimeoutError where one does not come."""
    mine = uuid.uuid4().hex
    if ranks.rank == 0:
        store.set("pretrain/life", mine)
        for rank in range(1, ranks.world_size):
            store.set(f"{mine}/welcome/{rank}", store.get(f"{mine}/hello/{rank}"))
        return mine
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        life = store.get("pretrain/life").decode()
        store.set(f"{life}/hello/{ranks.rank}", mine)
        welcome = f"{life}/welcome/{ranks.rank}"
        if store.check([welcome]) and store.get(welcome).decode() == mine:  # not one for a rank that is dead
            return life
        time.sleep(0.02)
    raise TimeoutError(f"rank 0 did not come within {timeout_s:g} s (--timeout); see its own output")
