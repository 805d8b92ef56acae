# SPDX-License-Identifier: Apache-2.0
"""Process groups of our own, so that no collective of the user's can meet one of training's.

Note: groups are leased, not destroyed
    An optimizer dies when the garbage collector pleases, at different times on different ranks. Destroying its groups
    then would upset torch: it names the groups that only their members build by counting how many a process has, and
    ranks with unlike counts wait for each other for ever. So groups stay, and the next optimizer over the same ranks
    takes one that all of them have free.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardadam.agreement import Meeting


@dataclass(eq=False)
class Lease:
    """Two groups over the same ranks, for one optimizer alone until ``release``.

    Args:
        control: a Gloo group for small Python objects; shared with the optimizers over the same ranks.
        training: what gradients and parameters travel on; of the same backends as the user's group.
    """

    control: dist.ProcessGroup
    training: dist.ProcessGroup
    pool: GroupPool
    slot: int

    def release(self, *, clean: bool) -> None:
        """Local. ``clean``: every collective that this rank has started on the group has been completed."""
        if clean:
            self.pool.free.add(self.slot)


@dataclass(eq=False)
class GroupPool:
    """The groups of ours over the ranks of one group of the user's. ``free`` is what this rank knows to be so."""

    control: dist.ProcessGroup
    meeting: Meeting
    training: list[dist.ProcessGroup] = field(default_factory=list)
    free: set[int] = field(default_factory=set)


_pools: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupPool] = weakref.WeakKeyDictionary()
_meetings: weakref.WeakKeyDictionary[dist.ProcessGroup, Meeting] = weakref.WeakKeyDictionary()


def lease_groups(process_group: dist.ProcessGroup | DeviceMesh | None) -> Lease | None:
    """Groups of our own over the ranks of ``process_group``, or None where this process is alone.

    Collective: all ranks of ``process_group`` must call it.

    Args:
        process_group: None for the default group, or for this process alone where none is initialised.

    Raises:
        ValueError: this rank is not in ``process_group``.
        TypeError: ``process_group`` is something else.
    """
    users = _resolve(process_group)
    if users is None or dist.get_world_size(users) == 1:
        return None
    pool = _pool_of(users)
    everybody: list[set[int]] = [set()] * dist.get_world_size(users)
    dist.all_gather_object(everybody, pool.free, group=pool.control)
    free_everywhere = set.intersection(*everybody)
    if free_everywhere:
        slot = min(free_everywhere)
        pool.free.remove(slot)
    else:
        slot = len(pool.training)
        pool.training.append(_new_group(users, _backend_name(users)))
    return Lease(pool.control, pool.training[slot], pool, slot)


def meeting_of(process_group: dist.ProcessGroup | DeviceMesh | None) -> Meeting | None:
    """Where the ranks of ``process_group`` meet; None where this process is alone. Local."""
    users = _resolve(process_group)
    return None if users is None or dist.get_world_size(users) == 1 else _meeting_of(users)


def _meeting_of(users: dist.ProcessGroup) -> Meeting:
    if users not in _meetings:
        # torch tells the store of a group to nobody but its own modules. Groups have names that are theirs alone.
        everybodys = dist.distributed_c10d._get_default_store()
        store = dist.distributed_c10d.PrefixStore(f"shardadam/{users.group_name}", everybodys)
        _meetings[users] = Meeting(store, dist.get_rank(users), dist.get_process_group_ranks(users))
    return _meetings[users]


def _pool_of(users: dist.ProcessGroup) -> GroupPool:
    if users not in _pools:
        control = _new_group(users, "gloo" if dist.is_gloo_available() else _backend_name(users))
        _pools[users] = GroupPool(control, _meeting_of(users))
    return _pools[users]


def _resolve(process_group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The user's group, with this rank in it; None where torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is None:
            return None
        raise ValueError(
            "process_group: given, but torch.distributed is not initialised. Call init_process_group first, or start "
            "the script with torchrun."
        )
    outside = f"process_group: rank {dist.get_rank()} is not in it. Build the optimizer only on the ranks that are."
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group: found a DeviceMesh of {process_group.ndim} dimensions, expected 1. Pass "
                "mesh['name'] for the dimension to shard over; hybrid sharding is not supported yet."
            )
        if process_group.get_coordinate() is None:
            raise ValueError(outside)
        process_group = process_group.get_group()
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
        raise ValueError(outside)
    if process_group is None:
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: found {type(process_group).__name__}, expected a ProcessGroup, a 1-D DeviceMesh or None."
        )
    if dist.get_rank() not in dist.get_process_group_ranks(process_group):
        raise ValueError(outside)
    return process_group


def _new_group(users: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    ranks = dist.get_process_group_ranks(users)
    group: dist.ProcessGroup = dist.new_group(
        ranks,
        backend=backend,
        timeout=_timeout(users),
        # Members alone must be able to build it; where everybody takes part, the ordinary way is the safer one.
        use_local_synchronization=len(ranks) < dist.get_world_size(),
        group_desc="shardadam",
    )
    return group


def backend_of_device(group: dist.ProcessGroup) -> dict[str, str]:
    """``{"cpu": "gloo", "cuda": "nccl"}``."""
    return dict(entry.split(":", 1) for entry in dist.get_backend_config(group).split(","))


def _backend_name(group: dist.ProcessGroup) -> str:
    """``"gloo"`` where one backend serves all devices, else ``"cpu:gloo,cuda:nccl"``."""
    names = set(backend_of_device(group).values())
    return names.pop() if len(names) == 1 else dist.get_backend_config(group)


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """How long the user lets collectives wait; None, for torch's default, where torch does not tell."""
    options = getattr(group._get_backend(torch.device(next(iter(backend_of_device(group))))), "options", None)
    timeout = getattr(options, "_timeout", None)
    return timeout if isinstance(timeout, timedelta) else None
