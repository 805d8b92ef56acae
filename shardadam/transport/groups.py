# SPDX-License-Identifier: Apache-2.0
"""Process groups of the optimizer's own, so that its collectives never mix with the user's.

Note: groups are cached, not destroyed
    Python's garbage collector may free an optimizer at different times on different ranks. If it destroyed its process
    groups then, later calls of ``dist.new_group`` could hang: torch names groups by counting those of a process, and
    ranks with different counts would wait for each other. So groups are cached, and the next optimizer over the same
    ranks takes a group that is free on all of them.
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
    """The communicator groups of one optimizer, until ``release``.

    Args:
        control: a Gloo group for small Python objects; shared by all optimizers over the same ranks.
        training: for gradients and parameters; used by this optimizer only. It has the backends of the user's group.
        cache: holds both groups.
        index: of ``training`` in ``cache.training``.
    """

    control: dist.ProcessGroup
    training: dist.ProcessGroup
    cache: GroupCache
    index: int

    def release(self, *, clean: bool) -> None:
        """Return the group to the cache. Local.

        Args:
            clean: every collective that this rank has started on the group is complete; otherwise it is not used again.
        """
        if clean:
            self.cache.free.add(self.index)


@dataclass(eq=False)
class GroupCache:
    """The process groups that were built over the ranks of one user's group.

    Args:
        free: indices of the groups in ``training`` that no optimizer of this rank uses.
    """

    control: dist.ProcessGroup
    store_barrier: StoreBarrier
    training: list[dist.ProcessGroup] = field(default_factory=list)
    free: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class MeshCommGroups:
    """The communicator groups for hybrid sharding. ``shard`` or ``replica`` is None if it would hold one rank.

    Args:
        control, store_barrier: over all ranks of the mesh; None if the mesh is one rank.
    """

    shard: CommGroups | None
    replica: CommGroups | None
    control: dist.ProcessGroup | None
    store_barrier: StoreBarrier | None


_caches: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupCache] = weakref.WeakKeyDictionary()
"""By the user's group."""
_mesh_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = (
    weakref.WeakKeyDictionary()
)
"""By the default group, and by ranks: groups over all ranks of a mesh that is a part of the world."""
_store_barriers: weakref.WeakKeyDictionary[dist.ProcessGroup, StoreBarrier] = weakref.WeakKeyDictionary()
"""By the user's group."""


def comm_groups(process_group: dist.ProcessGroup | DeviceMesh | None) -> CommGroups | None:
    """Return groups over the ranks of ``process_group``; None if that is this process only.

    Collective: all ranks of ``process_group`` must call it.

    Args:
        process_group: a ProcessGroup or a 1-D DeviceMesh; None for the default group, or for this process only if
            torch.distributed is not initialised.

    Raises:
        ValueError: this rank is not in ``process_group``, or it is a mesh of more dimensions.
        TypeError: ``process_group`` is something else.
    """
    user_group = _resolve(process_group)
    if user_group is None or dist.get_world_size(user_group) == 1:
        return None
    cache = _cache_of(user_group)
    free_everywhere = set.intersection(*exchange(cache.free, cache.control))
    if free_everywhere:
        index = min(free_everywhere)
        cache.free.remove(index)
    else:
        index = len(cache.training)
        cache.training.append(_new_group(user_group, _backend_name(user_group)))
    return CommGroups(cache.control, cache.training[index], cache, index)


def mesh_comm_groups(mesh: DeviceMesh) -> MeshCommGroups:
    """Return groups for hybrid sharding over a 2-D ``mesh``: its rows are shard groups, its columns replica groups.

    Collective: all ranks of ``mesh`` must call it.

    Raises:
        ValueError: this rank is not in ``mesh``, or a row of it is not in ascending order.
    """
    _check_is_in(mesh)
    ranks: list[list[int]] = mesh.mesh.tolist()
    if any(row != sorted(row) for row in ranks):
        # torch sorts the ranks of a group: in an unsorted row, a shard's rank would differ from that of its replicas.
        raise ValueError(
            f"process_group: found a DeviceMesh of ranks {ranks}, expected ranks in ascending order in every row (a "
            "shard group). Build it with init_device_mesh."
        )
    shard, replica = comm_groups(mesh.get_group(1)), comm_groups(mesh.get_group(0))
    if shard is None or replica is None:
        only = shard or replica
        return MeshCommGroups(
            shard, replica, *(None, None) if only is None else (only.control, only.cache.store_barrier)
        )
    whole = _cache_of(_group_over([rank for row in ranks for rank in row], like=mesh.get_group(1)))
    return MeshCommGroups(shard, replica, whole.control, whole.store_barrier)


def _group_over(ranks: list[int], *, like: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the default group if it has these ranks, else a cached or new group. Collective over ``ranks``."""
    default: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    if len(ranks) == dist.get_world_size():
        return default
    groups = _mesh_groups.setdefault(default, {})
    key = tuple(sorted(ranks))
    if key not in groups:
        groups[key] = _new_group(like, _control_backend(like), ranks)
    return groups[key]


def store_barrier_of(process_group: dist.ProcessGroup | DeviceMesh | None) -> StoreBarrier | None:
    """Return the store barrier of the ranks of ``process_group``; None if that is this process only. Local."""
    user_group = _resolve(process_group)
    if user_group is None or dist.get_world_size(user_group) == 1:
        return None
    return _store_barrier_of(user_group)


def _store_barrier_of(user_group: dist.ProcessGroup) -> StoreBarrier:
    if user_group not in _store_barriers:
        store = StoreClient(default_store(user_group.group_name))  # the name is unique
        ranks = dist.get_process_group_ranks(user_group)
        _store_barriers[user_group] = StoreBarrier(store, dist.get_rank(user_group), ranks)
    return _store_barriers[user_group]


def _cache_of(user_group: dist.ProcessGroup) -> GroupCache:
    """Return the cache of ``user_group``. Collective when it is new."""
    if user_group not in _caches:
        control = _new_group(user_group, _control_backend(user_group))
        processes = exchange(desync.ProcessInfo.here(), control)
        desync.register(dict(zip(dist.get_process_group_ranks(user_group), processes, strict=True)))
        _caches[user_group] = GroupCache(control, _store_barrier_of(user_group))
    return _caches[user_group]


def _resolve(process_group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """Return the user's group, which this rank is in; None if torch.distributed is not initialised."""
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
        raise ValueError(_not_a_member())
    if process_group is None:
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: found {type(process_group).__name__}, expected a ProcessGroup, a 1-D or 2-D DeviceMesh or "
            "None."
        )
    if dist.get_rank() not in dist.get_process_group_ranks(process_group):
        raise ValueError(_not_a_member())
    return process_group


def _check_is_in(mesh: DeviceMesh) -> None:
    if mesh.get_coordinate() is None:
        raise ValueError(_not_a_member())


def _not_a_member() -> str:
    return f"process_group: rank {dist.get_rank()} is not in it. Build the optimizer only on the ranks that are."


def _new_group(user_group: dist.ProcessGroup, backend: str, ranks: list[int] | None = None) -> dist.ProcessGroup:
    """Build a group over ``ranks``, by default those of ``user_group``, with the timeout of ``user_group``."""
    ranks = dist.get_process_group_ranks(user_group) if ranks is None else ranks
    group: dist.ProcessGroup = dist.new_group(
        ranks,
        backend=backend,
        timeout=_timeout(user_group),
        # Only the group's members call this. If they are the whole world, torch's default synchronization is safer.
        use_local_synchronization=len(ranks) < dist.get_world_size(),
        group_desc="shardadam",
    )
    return group


def _control_backend(user_group: dist.ProcessGroup) -> str:
    return "gloo" if dist.is_gloo_available() else _backend_name(user_group)


def backend_of_device(group: dist.ProcessGroup) -> dict[str, str]:
    """Return the backends by device type, such as ``{"cpu": "gloo", "cuda": "nccl"}``."""
    return dict(entry.split(":", 1) for entry in dist.get_backend_config(group).split(","))


def _backend_name(group: dist.ProcessGroup) -> str:
    """Return ``"gloo"`` if one backend serves all devices, else ``"cpu:gloo,cuda:nccl"``."""
    names = set(backend_of_device(group).values())
    return names.pop() if len(names) == 1 else dist.get_backend_config(group)


def _timeout(group: dist.ProcessGroup) -> timedelta | None:
    """Return the timeout of the user's group; None, for torch's default, if torch does not tell.

    If the group was built without a timeout, as DeviceMesh does, use the default group's.
    """
    options = getattr(group._get_backend(torch.device(next(iter(backend_of_device(group))))), "options", None)
    timeout = getattr(options, "_timeout", None)
    default: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    if timeout in (None, dist.default_pg_timeout) and group is not default:
        return _timeout(default)
    return timeout if isinstance(timeout, timedelta) else None


def timeout_s(group: dist.ProcessGroup) -> float:
    """Return the timeout of the user's group, in seconds."""
    return (_timeout(group) or dist.default_pg_timeout).total_seconds()
