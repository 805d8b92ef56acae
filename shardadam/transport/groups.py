# SPDX-License-Identifier: Apache-2.0
"""Process groups of our own, so that no collective of the user's can meet one of training's.

Note: groups are leased, not destroyed
    An optimizer dies when the garbage collector pleases, at different times on different ranks. Destroying its groups
    then would upset torch: it names the groups that only their params build by counting how many a process has, and
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

from shardadam.ranks import desync
from shardadam.ranks.agreement import exchange
from shardadam.ranks.store import StoreClient, default_store
from shardadam.ranks.store_barrier import StoreBarrier


@dataclass(eq=False)
class CommGroups:
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
    store_barrier: StoreBarrier
    training: list[dist.ProcessGroup] = field(default_factory=list)
    free: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class MeshCommGroups:
    """Groups for hybrid sharding. ``shard`` and ``replica`` are None where they would be of this rank alone.

    Args:
        control, store_barrier: as of a ``CommGroups``, over all ranks of the mesh; None where this process is alone.
    """

    shard: CommGroups | None
    replica: CommGroups | None
    control: dist.ProcessGroup | None
    store_barrier: StoreBarrier | None


_pools: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupPool] = weakref.WeakKeyDictionary()
_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)
"""By the default group of their time, and by ranks: groups over all ranks of a mesh, where the user has none."""
_store_barriers: weakref.WeakKeyDictionary[dist.ProcessGroup, StoreBarrier] = weakref.WeakKeyDictionary()


def comm_groups(process_group: dist.ProcessGroup | DeviceMesh | None) -> CommGroups | None:
    """Groups of our own over the ranks of ``process_group``, or None where this process is alone.

    Collective: all ranks of ``process_group`` must call it.

    Args:
        process_group: a ProcessGroup or a 1-D DeviceMesh; None for the default group, or for this process alone where
            none is initialised.

    Raises:
        ValueError: this rank is not in ``process_group``, or it is a mesh of more dimensions.
        TypeError: ``process_group`` is something else.
    """
    users = _resolve(process_group)
    if users is None or dist.get_world_size(users) == 1:
        return None
    pool = _pool_of(users)
    free_everywhere = set.intersection(*exchange(pool.free, pool.control))
    if free_everywhere:
        slot = min(free_everywhere)
        pool.free.remove(slot)
    else:
        slot = len(pool.training)
        pool.training.append(_new_group(users, _backend_name(users)))
    return CommGroups(pool.control, pool.training[slot], pool, slot)


def mesh_comm_groups(mesh: DeviceMesh) -> MeshCommGroups:
    """Groups of our own for hybrid sharding over a 2-D ``mesh``, whose rows are shard groups and whose columns are
    replica groups. Collective: all ranks of ``mesh`` must call it.

    Raises:
        ValueError: this rank is not in ``mesh``, or a row of it is not in ascending order.
    """
    _check_is_in(mesh)
    ranks: list[list[int]] = mesh.mesh.tolist()
    if any(row != sorted(row) for row in ranks):
        # Groups have their ranks in this order: a shard would have another place in each of its replicas.
        raise ValueError(
            f"process_group: found a DeviceMesh of ranks {ranks}, expected ranks in ascending order in every row (a "
            "shard group). Build it with init_device_mesh."
        )
    shard, replica = comm_groups(mesh.get_group(1)), comm_groups(mesh.get_group(0))
    if shard is None or replica is None:
        alone = shard or replica
        return MeshCommGroups(
            shard, replica, *(None, None) if alone is None else (alone.control, alone.pool.store_barrier)
        )
    everybody = _pool_of(_group_over([rank for row in ranks for rank in row], like=mesh.get_group(1)))
    return MeshCommGroups(shard, replica, everybody.control, everybody.store_barrier)


def _group_over(ranks: list[int], *, like: dist.ProcessGroup) -> dist.ProcessGroup:
    """The default group where it has these ranks, else one of our own. Collective over ``ranks``."""
    default: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    if len(ranks) == dist.get_world_size():
        return default
    groups = _groups.setdefault(default, {})
    key = tuple(sorted(ranks))
    if key not in groups:
        groups[key] = _new_group(like, _control_backend(like), ranks)
    return groups[key]


def store_barrier_of(process_group: dist.ProcessGroup | DeviceMesh | None) -> StoreBarrier | None:
    """Where the ranks of ``process_group`` meet; None where this process is alone. Local."""
    users = _resolve(process_group)
    return None if users is None or dist.get_world_size(users) == 1 else _meeting_of(users)


def _meeting_of(users: dist.ProcessGroup) -> StoreBarrier:
    if users not in _store_barriers:
        store = StoreClient(default_store(users.group_name))  # a name that no other group has
        _store_barriers[users] = StoreBarrier(store, dist.get_rank(users), dist.get_process_group_ranks(users))
    return _store_barriers[users]


def _pool_of(users: dist.ProcessGroup) -> GroupPool:
    if users not in _pools:
        control = _new_group(users, _control_backend(users))
        processes = exchange(desync.ProcessInfo.here(), control)
        desync.register(dict(zip(dist.get_process_group_ranks(users), processes, strict=True)))
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
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group: found a DeviceMesh of {process_group.ndim} dimensions, expected 1 or 2. Pass "
                "mesh['name'] for the dimension to shard over, or mesh['replica', 'shard'], by your names, for hybrid "
                "sharding."
            )
        _check_is_in(process_group)
        process_group = process_group.get_group()
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
        raise ValueError(_outside())
    if process_group is None:
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: found {type(process_group).__name__}, expected a ProcessGroup, a 1-D or 2-D DeviceMesh or "
            "None."
        )
    if dist.get_rank() not in dist.get_process_group_ranks(process_group):
        raise ValueError(_outside())
    return process_group


def _check_is_in(mesh: DeviceMesh) -> None:
    if mesh.get_coordinate() is None:
        raise ValueError(_outside())


def _outside() -> str:
    return f"process_group: rank {dist.get_rank()} is not in it. Build the optimizer only on the ranks that are."


def _new_group(users: dist.ProcessGroup, backend: str, ranks: list[int] | None = None) -> dist.ProcessGroup:
    """Over ``ranks``, or over those of ``users``, whose time limit it has."""
    ranks = dist.get_process_group_ranks(users) if ranks is None else ranks
    group: dist.ProcessGroup = dist.new_group(
        ranks,
        backend=backend,
        timeout=_timeout(users),
        # Members alone must be able to build it; where everybody takes part, the ordinary way is the safer one.
        use_local_synchronization=len(ranks) < dist.get_world_size(),
        group_desc="shardadam",
    )
    return group


def _control_backend(users: dist.ProcessGroup) -> str:
    return "gloo" if dist.is_gloo_available() else _backend_name(users)


def backend_of_device(group: dist.ProcessGroup) -> dict[str, str]:
    """``{"cpu": "gloo", "cuda": "nccl"}``."""
    return dict(entry.split(":", 1) for entry in dist.get_backend_config(group).split(","))


def _backend_name(group: dist.ProcessGroup) -> str:
    """``"gloo"`` where one backend serves all devices, else ``"cpu:gloo,cuda:nccl"``."""
    names = set(backend_of_device(group).values())
    return names.pop() if len(names) == 1 else dist.get_backend_config(group)


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """How long the user lets collectives wait; None, for torch's default, where torch does not tell.

    A group that was built without a limit of its own, as those of a DeviceMesh are, has that of the default group.
    """
    options = getattr(group._get_backend(torch.device(next(iter(backend_of_device(group))))), "options", None)
    timeout = getattr(options, "_timeout", None)
    default: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    if timeout in (None, dist.default_pg_timeout) and group is not default:
        return _timeout(default)
    return timeout if isinstance(timeout, timedelta) else None


def timeout_s(group: dist.ProcessGroup) -> float:
    """How long the user lets collectives wait, in seconds."""
    timeout = _timeout(group)
    return (timeout or dist.default_pg_timeout).total_seconds()
