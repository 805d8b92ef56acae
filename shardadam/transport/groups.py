# SPDX-License-Identifier: Apache-2.0
"""Process groups of our own, so that no collective of the user's can meet one of training's."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def own_group(process_group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """A new group over the ranks of ``process_group``, or None where this process is alone.

    Collective: all ranks of ``process_group`` must call it.

    Args:
        process_group: None for the default group, or for this process alone where none is initialised.

    Raises:
        ValueError: this rank is not in ``process_group``.
        TypeError: ``process_group`` is something else.
    """
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
                f"process_group: found a DeviceMesh of {process_group.ndim} dimensions, expected 1. Pass "
                "mesh['name'] for the dimension to shard over; hybrid sharding is not supported yet."
            )
        if process_group.get_coordinate() is None:
            raise ValueError(
                f"process_group: rank {dist.get_rank()} is not in it. Build the optimizer only on the ranks that are."
            )
        process_group = process_group.get_group()
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
        raise ValueError(
            f"process_group: rank {dist.get_rank()} is not in it. Build the optimizer only on the ranks that are."
        )
    if process_group is None:
        process_group = dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: found {type(process_group).__name__}, expected a ProcessGroup, a 1-D DeviceMesh or None."
        )
    ranks = dist.get_process_group_ranks(process_group)
    if dist.get_rank() not in ranks:
        raise ValueError(f"process_group: rank {dist.get_rank()} is not in it, its ranks are {ranks}.")
    if len(ranks) == 1:
        return None
    # Members alone must be able to build the group, but torch's way to do so names groups by how many this process has
    # made: where everybody takes part, the ordinary way is the safer one.
    group: dist.ProcessGroup = dist.new_group(
        ranks,
        backend=_backend_name(process_group),
        timeout=_timeout(process_group),
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


def release_group(group: dist.ProcessGroup) -> None:
    """Destroys a group of our own, if the user has not destroyed all groups before.

    NCCL communicators are left to ``destroy_process_group()``: taking one down is not something to do whenever a
    garbage collector pleases.
    """
    if not dist.is_initialized() or "nccl" in dist.get_backend_config():
        return
    try:
        dist.destroy_process_group(group)
    except (ValueError, AssertionError):  # torch's ways of saying that the group is gone already
        return
