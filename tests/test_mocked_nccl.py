# SPDX-License-Identifier: Apache-2.0
"""Over NCCL, groups are built by their members alone, and small tensors on the CPU go over Gloo.

NCCL is mocked (``mocked_nccl``): nothing here runs on a GPU.
"""

from __future__ import annotations

from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from shardadam import ShardedAdamW
from shardadam.checks import arguments
from shardadam.transport import ByDeviceTransport, HybridTransport, NcclTransport, connect
from tests.mocked_nccl import MockedNccl, init_nccl, recorded_collectives, recorded_groups
from tests.ranks import Ranks, ranks_of

TIMEOUT_S = 17.0
PAIR_TIMEOUT_S = 19.0

# What torch gives a group


class BuildGroups:
    """Build transports over groups of mocked NCCL, whenever told."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "nccl-store"

    def __call__(self, rank: int, pipe: Connection) -> None:
        init_nccl(rank, 4, self.store, timeout_s=TIMEOUT_S)
        timeout = timedelta(seconds=PAIR_TIMEOUT_S)
        for _ in range(2 if rank in (1, 3) else 1):  # ranks are in different numbers of groups
            dist.new_group([1, 3], timeout=timeout, use_local_synchronization=True)
        pair = dist.new_group([0, 2], timeout=timeout)
        mesh = DeviceMesh("cuda", torch.tensor([[0, 1], [2, 3]]), mesh_dim_names=("replica", "shard"))
        cases = {"world": None, "pair": pair, "mesh": mesh["shard"], "hybrid": mesh}
        splits_of_users = [made.nccl_options.split_from is not None for made in MockedNccl.made]
        pipe.send((splits_of_users, MockedNccl.world_splits))
        while True:
            case = pipe.recv()
            before, splits = len(MockedNccl.made), MockedNccl.world_splits
            with recorded_groups() as groups, recorded_collectives() as collectives:
                transport = connect(cases[case], kind="collective")
            kinds = [type(one).__name__ for one in parts_of(transport)]
            default: Any = dist.group.WORLD
            pipe.send(
                {
                    "groups": [describe(given) for given in groups],
                    "splits": [made.nccl_options.split_from is not None for made in MockedNccl.made[before:]],
                    "world splits": MockedNccl.world_splits - splits,
                    "collectives": len(collectives),
                    "collectives of the world": sum(group in (None, default) for group in collectives),
                    "kinds": kinds,
                    "bound": str(default.bound_device_id),
                }
            )


def parts_of(transport: Any) -> list[Any]:
    parts = [transport._shard, transport._replica] if isinstance(transport, HybridTransport) else [transport]
    return [part._stream if isinstance(part, ByDeviceTransport) else part for part in parts]


def describe(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "ranks": list(given["global_ranks_in_group"]),
        "size": given["group_size"],
        "rank": given["group_rank"],
        "backend": str(given["backend"]),
        "name": given["group_name"],
        "timeout": given["timeout"].total_seconds(),
        "devices": (given["bound"], given.get("device_id"), given.get("backend_options")),
    }


def build(ranks: Ranks, case: str, members: list[int]) -> dict[int, Any]:
    for rank in members:
        ranks.pipes[rank].send(case)
    return {rank: ranks.hear(rank) for rank in members}


def test_groups_are_built_from_their_members_alone(tmp_path: Path) -> None:
    """With a bound device, torch splits NCCL's communicator: all ranks of the world must take part, and those that
    build no optimizer do not. Here they wait for the next case, so a collective of the world would hang.
    """
    with ranks_of(4, tmp_path / "store", BuildGroups(tmp_path), timeout_s=TIMEOUT_S) as ranks:
        users = [ranks.hear(rank) for rank in range(4)]
        assert all(any(splits) for splits, _ in users) and sum(count for _, count in users) > 0, "torch splits no more"
        every, names = [0, 1, 2, 3], set()
        for case, members, built in (
            ("pair", [0, 2], [[0, 2]]),
            ("mesh", [2, 3], [[2, 3]]),  # one row only: the others build nothing
            ("hybrid", every, [every, [0, 1], [2, 3], [0, 2], [1, 3]]),
            ("world", every, [every]),
            ("world", every, []),  # the groups of the first one are used by it
        ):
            found = build(ranks, case, members)
            by_name: dict[str, list[tuple[int, dict[str, Any]]]] = {}
            for rank, one in found.items():
                assert one["world splits"] == 0 and one["bound"] == f"cuda:{rank}"
                assert one["collectives"] > 0 and one["collectives of the world"] == 0
                assert not any(one["splits"]) and len(one["splits"]) == len(one["kinds"])
                assert all(kind == NcclTransport.__name__ for kind in one["kinds"])
                for group in one["groups"]:
                    by_name.setdefault(group["name"], []).append((rank, group))
            for name, groups in by_name.items():
                own = groups[0][1]["ranks"]
                assert [rank for rank, _ in groups] == own, "all members, and no others, build it under this name"
                assert name not in names
                names.add(name)
                for rank, group in groups:
                    assert group["ranks"] == own and group["size"] == len(own) and own[group["rank"]] == rank
                    assert group["devices"] == (None, None, None)
                    assert group["backend"] == ("gloo" if name.endswith("/control") else "nccl")
                    assert group["timeout"] == (PAIR_TIMEOUT_S if case == "pair" else TIMEOUT_S)
            ranks_built = [groups[0][1]["ranks"] for groups in by_name.values()]
            assert all(expected in ranks_built for expected in built)


# Tensors on the CPU


class TrainNothingOnTheCpu:
    """Build an optimizer over mocked NCCL and let it move tensors on the CPU: there are no others here."""

    def __init__(self, directory: Path, mesh: tuple[int, int] | None) -> None:
        self.store = directory / "nccl-store"
        self.mesh = mesh

    def __call__(self, rank: int, pipe: Connection) -> None:
        world_size = 2 if self.mesh is None else self.mesh[0] * self.mesh[1]
        init_nccl(rank, world_size, self.store, timeout_s=TIMEOUT_S)
        try:
            pipe.send(self.found(rank))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
        pipe.recv()

    def found(self, rank: int) -> dict[str, Any]:
        group = None
        if self.mesh is not None:
            group = DeviceMesh("cuda", torch.arange(self.mesh[0] * self.mesh[1]).view(self.mesh))
        frozen = nn.Parameter(torch.full((3, 5), float(rank)), requires_grad=False)
        optimizer = ShardedAdamW([("frozen", frozen)], process_group=group)
        found: dict[str, Any] = {"frozen": float(frozen.sum())}

        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        with torch.no_grad():
            for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
                tensor.fill_(rank + 1.0)
        optimizer.sync_module(model)
        found["synced"] = {float(t.detach().mean(dtype=torch.float32)) for t in (*model.parameters(), *model.buffers())}

        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, rank + 1.0) if index or rank else None
        optimizer.average_gradients(model.parameters())
        found["means"] = [parameter.grad.unique().tolist() for parameter in model.parameters()]  # type: ignore[union-attr]
        optimizer.check_in_sync(model)
        if rank == 1:
            with torch.no_grad():
                next(model.parameters())[0, 0] += 1
        found["in sync"] = raised(lambda: optimizer.check_in_sync(model))

        trainable = [("on_cpu", nn.Parameter(torch.ones(3)))]
        found["added"] = raised(lambda: optimizer.add_param_group({"params": trainable}))
        found["built"] = raised(lambda: ShardedAdamW(trainable, process_group=group))
        frozen.requires_grad_(True)
        found["unfrozen"] = raised(optimizer.step)
        frozen.requires_grad_(False)
        optimizer.sync_module(model)  # the groups are usable
        return found


def raised(call: Any) -> str:
    try:
        call()
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("mesh", [None, (2, 2), (2, 1)])
def test_small_tensors_on_the_cpu_go_over_gloo(mesh: tuple[int, int] | None, tmp_path: Path) -> None:
    """A frozen parameter or a buffer on the CPU of a model on GPUs ended in an error over an NCCL-only group."""
    world_size = 2 if mesh is None else mesh[0] * mesh[1]
    with ranks_of(world_size, tmp_path / "store", TrainNothingOnTheCpu(tmp_path, mesh), timeout_s=TIMEOUT_S) as ranks:
        for rank in range(world_size):
            found = ranks.hear(rank)
            assert isinstance(found, dict), found
            assert found["frozen"] == 0.0 and found["synced"] == {1.0, 0.0}  # of rank 0; num_batches_tracked is 0
            total = sum(range(1, world_size + 1))
            assert found["means"] == [[(total - 1) / world_size]] + [[total / world_size]] * 3
            assert "Ranks hold different values of parameter '0.weight'" in found["in sync"]
            expected = "on_cpu' is on cpu, expected a device that the process group has a backend for: cuda. Move it"
            for what in ("added", "built"):
                assert found[what].startswith("ValueError: ") and expected in found[what]
                assert 'init_process_group("cpu:gloo,cuda:nccl")' in found[what]
            assert found["unfrozen"].startswith("ValueError: Parameter 'frozen' is on cpu, expected a device that")


class WithoutGloo:
    devices = frozenset({"cuda"})
    trainable_devices = None


def test_without_gloo_the_error_says_what_tensors_on_the_cpu_need() -> None:
    transport: Any = WithoutGloo()
    with mock.patch.object(dist, "is_gloo_available", lambda: False), pytest.raises(ValueError) as raised:
        arguments.check_device("A tensor", torch.ones(2), transport)
    assert str(raised.value).endswith(
        "for: cuda. Move it there, or install a build of PyTorch that has Gloo, which sends tensors on the CPU."
    )
