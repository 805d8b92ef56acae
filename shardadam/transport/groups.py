# SPDX-License-Identifier: Apache-2.0
"""Process groups of the optimizer's own, so that its collectives never mix with the user's.

Note: groups depend on their members only
    Ranks may be in different numbers of process groups (tensor, pipeline, expert parallelism). torch names a group that
    only its members build after the number of groups of the process, and members with different numbers wait for each
    other under different names. With a device bound to the default group (``init_process_group(device_id=...)``), torch
    splits NCCL's communicator, and waits for all ranks of the world. So ranks first meet in the store, under a key made
    of the members, and agree on a name; then the group is built under that name, with no bound device.

Note: groups are cached, not destroyed
    Python's garbage collector may free an optimizer at different times on different ranks, and destroying a group of
    NCCL's waits for its other ranks. So groups are cached, and the next optimizer over the same ranks takes a group
    that is free on all of them.
"""

from __future__ import annotations

import json
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from hashlib import sha256
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shardadam.ranks import desync
from shardadam.ranks.agreement import by_value, exchange
from shardadam.ranks.desync import ProcessInfo, RankDesyncError
from shardadam.ranks.store import StoreClient, default_store
from shardadam.ranks.store_barrier import StoreBarrier

_BUILDING = "Building the optimizer"
_OTHER_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Set by srun and mpirun, which also start processes that are to train alone (a search over learning rates)."""


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
    """The process groups that were built over the same ranks, with the same backends and timeout.

    Args:
        name: begins the names of the groups; all members have agreed on it, and no other cache has it.
        training: by index.
        free: indices of the groups in ``training`` that no optimizer of this rank uses.
    """

    name: str
    control: dist.ProcessGroup
    store_barrier: StoreBarrier
    training: dict[int, dist.ProcessGroup] = field(default_factory=dict)
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


@dataclass(frozen=True, slots=True)
class _Members:
    """The ranks that build groups together, in the order of the user's group, and what the groups have in common."""

    ranks: tuple[int, ...]
    backend: str
    timeout: timedelta

    @staticmethod
    def of(user_group: dist.ProcessGroup, ranks: Sequence[int] = ()) -> _Members:
        """Return the ranks of ``user_group``, or ``ranks``, with its backends and timeout."""
        chosen = tuple(ranks or dist.get_process_group_ranks(user_group))
        return _Members(chosen, _backend_name(user_group), _timeout(user_group) or dist.default_pg_timeout)

    @property
    def position(self) -> int:
        return self.ranks.index(dist.get_rank())


@dataclass(eq=False)
class _World:
    """What was built while one default group stood."""

    caches: dict[_Members, GroupCache] = field(default_factory=dict)
    store_barriers: dict[str, StoreBarrier] = field(default_factory=dict)


_worlds: weakref.WeakKeyDictionary[dist.ProcessGroup, _World] = weakref.WeakKeyDictionary()
"""By the default group."""


def comm_groups(process_group: dist.ProcessGroup | DeviceMesh | None) -> CommGroups | None:
    """Return groups over the ranks of ``process_group``; None if that is this process only.

    Collective: all ranks of ``process_group`` must call it.

    Args:
        process_group: a ProcessGroup or a 1-D DeviceMesh; None for the default group, or for this process only if
            torch.distributed is not initialised.

    Raises:
        ValueError: this rank is not in ``process_group``, or it is a mesh of more dimensions.
        TypeError: ``process_group`` is something else.
        RuntimeError: torchrun has started several processes, and torch.distributed is not initialised.
        RankDesyncError: names the ranks that did not come within the timeout of the process group.
    """
    user_group = _resolve(process_group)
    if user_group is None or dist.get_world_size(user_group) == 1:
        return None
    return _comm_groups(_Members.of(user_group))


def comm_groups_over(ranks: Sequence[int]) -> CommGroups:
    """Return groups over these ranks, several, with the backends of the default group. Collective over them."""
    return _comm_groups(_Members.of(_default_group(), ranks))


def control_over(ranks: Sequence[int]) -> tuple[dist.ProcessGroup, StoreBarrier]:
    """Return the control group and store barrier of these ranks, several. Collective over them."""
    cache = _cache_of(_Members.of(_default_group(), ranks))
    return cache.control, cache.store_barrier


def ranks_of(argument: str, group: dist.ProcessGroup | DeviceMesh) -> list[int]:
    """Return the ranks of a group or of a DeviceMesh of any dimensions, ascending. Local.

    Args:
        argument: its name, for messages.

    Raises:
        ValueError: this rank is not in it.
        TypeError: it is something else.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{argument}: given, but torch.distributed is not initialised. Call init_process_group first.")
    if isinstance(group, DeviceMesh):
        ranks = sorted(group.mesh.flatten().tolist())
    elif isinstance(group, dist.ProcessGroup):
        ranks = sorted(dist.get_process_group_ranks(group))
    elif group == dist.GroupMember.NON_GROUP_MEMBER:
        ranks = []
    else:
        raise TypeError(f"{argument}: found {type(group).__name__}, expected a ProcessGroup or a DeviceMesh.")
    if dist.get_rank() not in ranks:
        raise ValueError(
            f"{argument}: rank {dist.get_rank()} is not in it (ranks {ranks}), expected a group that this rank is in."
        )
    return ranks


def _default_group() -> dist.ProcessGroup:
    default: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    return default


def _comm_groups(members: _Members) -> CommGroups:
    cache = _cache_of(members)
    mine = (cache.free, max(cache.training, default=-1))
    answers = exchange(mine, cache.control)
    free_everywhere = set.intersection(*(free for free, _ in answers))
    if free_everywhere:
        index = min(free_everywhere)
        cache.free.remove(index)
    else:
        index = 1 + max(last for _, last in answers)
        cache.training[index] = _new_group(members, members.backend, f"{cache.name}/{index}")
    return CommGroups(cache.control, cache.training[index], cache, index)


def mesh_comm_groups(mesh: DeviceMesh) -> MeshCommGroups:
    """Return groups for hybrid sharding over a 2-D ``mesh``: its rows are shard groups, its columns replica groups.

    Collective: all ranks of ``mesh`` must call it.

    Raises:
        ValueError: this rank is not in ``mesh``, or a row of it is not in ascending order.
        RankDesyncError: names the ranks that did not come within the timeout of the process group.
    """
    _check_is_in(mesh)
    ranks: list[list[int]] = mesh.mesh.tolist()
    if any(row != sorted(row) for row in ranks):
        # torch sorts the ranks of a group: in an unsorted row, a shard's rank would differ from that of its replicas.
        raise ValueError(
            f"process_group: found a DeviceMesh of ranks {ranks}, expected ranks in ascending order in every row (a "
            "shard group). Build it with init_device_mesh."
        )
    whole = None
    if len(ranks) > 1 and len(ranks[0]) > 1:  # first, so that all ranks of the mesh name one that is absent
        whole = _cache_of(_Members.of(mesh.get_group(1), sorted(rank for row in ranks for rank in row)))
    shard, replica = comm_groups(mesh.get_group(1)), comm_groups(mesh.get_group(0))
    if whole is not None:
        return MeshCommGroups(shard, replica, whole.control, whole.store_barrier)
    only = shard or replica
    return MeshCommGroups(shard, replica, *(None, None) if only is None else (only.control, only.cache.store_barrier))


def store_barrier_of(process_group: dist.ProcessGroup | DeviceMesh | None) -> StoreBarrier | None:
    """Return the store barrier of the ranks of ``process_group``; None if that is this process only. Local."""
    user_group = _resolve(process_group)
    if user_group is None or dist.get_world_size(user_group) == 1:
        return None
    return _store_barrier(_Members.of(user_group), "calls")


def _world() -> _World:
    return _worlds.setdefault(_default_group(), _World())


def _store_barrier(members: _Members, purpose: str) -> StoreBarrier:
    """Return the store barrier of ``members`` for ``purpose``. Its keys depend on nothing else. Local."""
    barriers = _world().store_barriers
    key = f"{purpose}/{sha256(repr(members.ranks).encode()).hexdigest()}"
    if key not in barriers:
        barriers[key] = StoreBarrier(StoreClient(default_store(key)), members.position, members.ranks)
    return barriers[key]


def _cache_of(members: _Members) -> GroupCache:
    """Return the cache of ``members``, a new one unless all of them have it. Collective over ``members``."""
    caches = _world().caches
    known = caches.get(members)
    name = _meet(members, None if known is None else known.name)
    if known is not None and known.name == name:
        return known
    control = _new_group(members, "gloo" if dist.is_gloo_available() else members.backend, f"{name}/control")
    caches[members] = GroupCache(name, control, _store_barrier(members, "calls"))
    return caches[members]


def _meet(members: _Members, name: str | None) -> str:
    """Wait until all ``members`` build an optimizer; return ``name`` if all of them pass it, else a new one.

    From then on, desync reports know their processes.

    Raises:
        RankDesyncError: a rank did not come in time.
        ValueError: on every rank, if the process groups that they have passed have different backends.
    """
    mine: dict[str, Any] = {
        "name": name,
        "new_name": f"shardadam/{uuid4().hex}",
        "backend": members.backend,
        "process": asdict(ProcessInfo.here()),
    }
    if "fake" in members.backend:  # torch's group for one process that acts as one of many
        answers = [mine] * len(members.ranks)
    else:
        desync.register({})  # so that this rank answers while it waits
        timeout = members.timeout.total_seconds()
        try:
            texts = _store_barrier(members, "building").exchange(json.dumps(mine), what=_BUILDING, timeout_s=timeout)
        except (RuntimeError, TimeoutError) as error:
            limit = " The limit is the timeout of init_process_group." * isinstance(error, TimeoutError)
            raise RankDesyncError(f"{error}{limit}\n{desync.report(members.ranks)}") from error
        answers = [json.loads(text) for text in texts]
    processes = [ProcessInfo(**answer["process"]) for answer in answers]
    desync.register(dict(zip(members.ranks, processes, strict=True)))
    if len({answer["backend"] for answer in answers}) > 1:
        found = by_value([answer["backend"] for answer in answers], members.ranks)
        raise ValueError(
            f"process_group: found the backends {found}, expected the same on all ranks. Pass the same process group."
        )
    if name is not None and all(answer["name"] == name for answer in answers):
        return name
    return str(answers[0]["new_name"])


def _resolve(process_group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """Return the user's group, which this rank is in; None if torch.distributed is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is None:
            _check_is_alone()
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


def launched_processes() -> int:
    """Return the size of the default group; without one, how many processes torchrun has started (``WORLD_SIZE``)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


def _check_is_alone() -> None:
    """Raise RuntimeError if torchrun has started other processes, which nothing joins; warn if SLURM or MPI has."""
    count = launched_processes()
    if count > 1:
        raise RuntimeError(
            f"process_group: found WORLD_SIZE={count} in the environment, but torch.distributed is not initialised: "
            f"each of the {count} processes would train a model of its own. Call torch.distributed.init_process_group "
            "first; with accelerate, create the Accelerator first (on CPUs with cpu=True). If this process trains "
            "alone, unset WORLD_SIZE."
        )
    for name in _OTHER_LAUNCHERS:
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 1:
            warnings.warn(
                f"Found {name}={text} in the environment, but torch.distributed is not initialised: this process "
                "trains alone. If the processes are to train one model, call torch.distributed.init_process_group "
                f"before building the optimizer. If each trains its own, unset {name} to silence this warning.",
                stacklevel=2,
            )
            return


def _check_is_in(mesh: DeviceMesh) -> None:
    if mesh.get_coordinate() is None:
        raise ValueError(_not_a_member())


def _not_a_member() -> str:
    return f"process_group: rank {dist.get_rank()} is not in it. Build the optimizer only on the ranks that are."


def _new_group(members: _Members, backend: str, name: str) -> dist.ProcessGroup:
    """Build a group over ``members`` under ``name``, which all of them pass. Collective over ``members``.

    ``dist.new_group`` chooses the name itself, so this calls what ``dist.new_group`` calls.

    Raises:
        RankDesyncError: a rank has ended meanwhile.
    """
    c10d: Any = dist.distributed_c10d
    try:
        with _no_bound_device():
            group, _ = c10d._new_process_group_helper(
                len(members.ranks),
                members.position,
                list(members.ranks),
                c10d.Backend(backend),
                c10d._get_default_store(),
                name,
                timeout=members.timeout,
                pg_tag=name,  # torch does not choose this group for functional collectives of the user's
                group_desc="shardadam",
            )
    except RuntimeError as error:
        raise desync.desync_error(f"{_BUILDING}: connecting the ranks", error, members.ranks) from error
    c10d._world.pg_group_ranks[group] = {rank: position for position, rank in enumerate(members.ranks)}
    if len(members.ranks) < dist.get_world_size():
        # The number of groups in pg_names is a part of the next name that torch chooses for a group of the user's.
        del c10d._world.pg_names[group]
        weakref.finalize(dist.group.WORLD, group.shutdown).atexit = False  # as torch does for those in pg_names
    return group  # type: ignore[no-any-return]


@contextmanager
def _no_bound_device() -> Iterator[None]:
    """Context manager: hide the device that is bound to the default group."""
    default: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
    bound = default.bound_device_id
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound


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
