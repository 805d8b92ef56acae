# SPDX-License-Identifier: Apache-2.0
"""Builds the process group of ranks that torchrun has started or restarted, and destroys it at the end of a run.

Note: keys of a restart
    torchrun's agents keep one store while workers restart (torch 2.13). `init_process_group` would read the addresses
    that dead ranks left in it, and wait for them. So rank 0 chooses a new prefix for each start, the others check that
    this rank 0 answers, and all use only keys under that prefix.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from arguments import Ranks


def join(ranks: Ranks, backend: str, *, timeout_s: float) -> None:
    """Calls `init_process_group` with a store without old keys; `timeout_s` is the group's timeout, too. Collective."""
    timeout = timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)  # rank 0 makes a new store
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    store = dist.PrefixStore(prefix_of_this_start(agents, ranks, timeout_s), agents)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)


def prefix_of_this_start(store: dist.Store, ranks: Ranks, timeout_s: float) -> str:
    """Returns the same new prefix on all ranks. Collective.

    Raises DistStoreError or TimeoutError if a rank is missing.
    """
    mine = uuid.uuid4().hex
    if ranks.rank == 0:
        store.set("pretrain/prefix", mine)
        for rank in range(1, ranks.world_size):
            store.set(f"{mine}/welcome/{rank}", store.get(f"{mine}/hello/{rank}"))
        return mine
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        prefix = store.get("pretrain/prefix").decode()
        store.set(f"{prefix}/hello/{ranks.rank}", mine)
        welcome = f"{prefix}/welcome/{ranks.rank}"
        if store.check([welcome]) and store.get(welcome).decode() == mine:  # and not for a dead rank
            return prefix
        time.sleep(0.02)
    raise TimeoutError(f"rank 0 did not join within {timeout_s:g} s (--timeout); check its log")


@contextmanager
def destroyed_on_success() -> Iterator[None]:
    """Context manager: destroys the process group after the block, unless the block raises.

    Note: a rank that fails
        `destroy_process_group` can hang on NCCL when a rank has failed: it waits for collectives that the others never
        join. Without it, Gloo aborts the process at its exit, and hides why the rank failed. So this rank's traceback
        is printed, exit handlers run, and then the process ends without either. torchrun ends the others.
    """
    statuses: list[int] = []

    def end_if_failed() -> None:
        if any(statuses):
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(statuses[0])

    atexit.register(end_if_failed)  # runs after the handlers that the block registers
    try:
        yield
    except BaseException as error:
        if dist.is_initialized():  # otherwise there is nothing to destroy, and the caller may handle the error
            statuses.append(exit_status(error))
        raise
    finally:
        if not any(statuses) and dist.is_initialized():
            dist.destroy_process_group()


def exit_status(error: BaseException) -> int:
    """The status with which Python ends after `error`."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1
