# SPDX-License-Identifier: Apache-2.0
"""Building an optimizer depends on its members only: not on other groups of a rank, nor on their order. A rank that
does not come, dies or fails is named on the others.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import socket
import sys
import weakref
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from shardadam import ShardedAdamW, pages
from shardadam.engine import parameters, storage
from shardadam.transport import connect, groups
from shardadam.update import formats
from tests.ranks import on_ranks, rank_and_size, ranks_of


def trained(process_group: Any = None, transport: str = "collective") -> float:
    """Build an optimizer, take a step with gradients that differ by rank; return the sum of its parameters."""
    rank, _ = rank_and_size()
    parameter = nn.Parameter(torch.arange(5.0) + rank)
    optimizer = ShardedAdamW([parameter], lr=0.1, process_group=process_group, transport=transport)  # type: ignore[arg-type]
    (parameter * (rank + 1)).sum().backward()
    optimizer.step()
    return float(parameter.detach().sum())


# Groups


def build_in_different_numbers_of_groups(transport: str) -> list[float]:
    """Ranks are in different numbers of groups, and build over overlapping groups in different orders."""
    rank, _ = rank_and_size()
    for ranks in ([0], [0, 3], [3], [3]):
        dist.new_group(ranks)
    pairs = {pair: dist.new_group(list(pair)) for pair in [(0, 1), (0, 2), (1, 2)]}
    mesh = DeviceMesh("cpu", torch.tensor([[0, 1], [2, 3]]))
    orders = {0: [(0, 1), (0, 2)], 1: [(0, 1), (1, 2)], 2: [(1, 2), (0, 2)], 3: []}
    found = [trained(pairs[pair], transport) for pair in orders[rank]]
    found.append(trained(mesh, transport))
    if rank == 1:
        found.append(trained(dist.new_group([1], use_local_synchronization=True), transport))
    found.append(trained(mesh, transport))
    found.append(trained(None, transport))
    dist.barrier()
    return found


@pytest.mark.parametrize("transport", ["collective", "shared_memory"])
def test_ranks_may_be_in_different_numbers_of_groups(transport: str) -> None:
    """torch names a group that only its members build after the number of groups of the process: ranks with different
    numbers waited for each other for ever.
    """
    results = on_ranks(4, build_in_different_numbers_of_groups, transport, deadline_s=25.0)
    assert results[0][0] == results[1][0] and results[1][1] == results[2][0] and results[0][1] == results[2][1]
    assert all(result[-2:] == results[0][-2:] for result in results)


def names_that_torch_counts() -> tuple[int, int]:
    rank, _ = rank_and_size()
    pair = dist.new_group([0, 1])
    before = len(c10d._world.pg_names)
    if rank < 2:
        trained(pair)
    after = len(c10d._world.pg_names)
    dist.barrier()
    return before, after


def test_groups_of_an_optimizer_do_not_change_the_names_of_the_users_groups() -> None:
    """A group of the user's that only its members build is named after the number of groups in ``pg_names``."""
    for before, after in on_ranks(3, names_that_torch_counts):
        assert before == after


def two_at_once() -> list[list[str]]:
    rank, _ = rank_and_size()
    pair, same = dist.new_group([0, 1]), dist.new_group([0, 1])
    if rank == 2:
        dist.new_group([2], use_local_synchronization=True)
        return []
    names = []
    for _ in range(2):
        transports: list[Any] = [connect(group, kind="collective") for group in (pair, same, pair)]
        names.append([transport._group.group_name for transport in transports])
        if rank == 0:
            transports.reverse()
        for transport in transports:
            transport.close(clean=True)
    return names


def test_optimizers_over_the_same_ranks_have_groups_of_their_own_and_use_them_again() -> None:
    first, second, _ = on_ranks(3, two_at_once)
    assert first == second
    assert len(set(first[0])) == 3 and set(first[0]) == set(first[1])


def bound_devices_seen() -> tuple[list[Any], Any, bool]:
    default: Any = dist.group.WORLD
    pair = dist.new_group([0, 1])
    made, seen, original = [], [], c10d._new_process_group_helper

    def helper(*arguments: Any, **options: Any) -> Any:
        seen.append((default.bound_device_id, options.get("device_id"), arguments[4] is c10d._get_default_store()))
        made.append(original(*arguments, **options))
        return made[-1]

    groups._worlds.pop(default, None)  # so that all groups are new
    c10d._new_process_group_helper = helper
    default.bound_device_id = torch.device("cuda", 0)
    try:
        transport = connect(pair, kind="collective")
        return seen, str(default.bound_device_id), transport.world_size == 2
    finally:
        default.bound_device_id = None
        c10d._new_process_group_helper = original


def test_groups_are_built_without_the_device_that_is_bound_to_the_default_group() -> None:
    """With a bound device, torch splits NCCL's communicator, for which all ranks of the world are needed."""
    for seen, after, connected in on_ranks(2, bound_devices_seen):
        assert seen == [(None, None, True)] * 2 and after == "cuda:0" and connected


def build_over_groups_of_other_backends() -> str:
    rank, _ = rank_and_size()
    pair = dist.new_group([0, 1])
    with mock.patch.object(groups, "_backend_name", return_value=["gloo", "cpu:gloo,cuda:nccl"][rank]):
        message = message_of_build(process_group=pair)
    assert message_of_build(process_group=[pair, None][rank]) == "built"  # equal members, and equal backends
    return message


def test_groups_of_other_backends_are_a_difference() -> None:
    expected = "ValueError: process_group: found the backends gloo on rank 0, cpu:gloo,cuda:nccl on rank 1, expected"
    for message in on_ranks(2, build_over_groups_of_other_backends):
        assert message.startswith(expected)


# Ranks that do not come, die or fail


def message_of_build(**options: Any) -> str:
    try:
        ShardedAdamW(nn.Linear(8, 8).parameters(), **options)
        return "built"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def build_when_told(rank: int, pipe: Connection) -> None:
    while True:
        pipe.recv()
        pipe.send(message_of_build())


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    with ranks_of(3, tmp_path / "store", build_when_told, timeout_s=1.5) as ranks:

        def build_on(*chosen: int) -> list[str]:
            for rank in chosen:
                ranks.pipes[rank].send(None)
            return [ranks.hear(rank) for rank in chosen]

        for rank, message in zip((0, 2), build_on(0, 2), strict=True):
            assert message.startswith("RankDesyncError: Building the optimizer: rank 1 did not arrive within 1.5 s. A")
            assert "The limit is the timeout of init_process_group." in message
            assert "  rank 1: has not come to build its optimizer, or has ended" in message
            assert f"  rank {2 - rank}: in call 1 of ShardedAdamW() for" in message
        # The late rank does not meet those that have given up; all of them may try again.
        (late,) = build_on(1)
        assert "ranks 0, 2 did not arrive within 1.5 s" in late and "s after call 1 of ShardedAdamW()" in late
        assert build_on(0, 1, 2) == ["built"] * 3
        # Once a rank has built an optimizer, the report says where it is.
        later, _ = build_on(0, 2)
        assert "rank 1 did not arrive within 1.5 s" in later
        assert "s after call 2 of ShardedAdamW(), at test_building.py" in later


def die_while_building(rank: int, pipe: Connection) -> None:
    if rank == 1:
        groups.exchange = lambda *_: os._exit(9)  # type: ignore[attr-defined]
    pipe.send(message_of_build())


def test_a_rank_that_dies_while_it_builds_is_named(tmp_path: Path) -> None:
    """The message was "torch.distributed is no longer initialised"."""
    with ranks_of(2, tmp_path / "store", die_while_building, timeout_s=5.0) as ranks:
        message = ranks.hear(0)
        # Rank 0 may still be connecting when rank 1, which has connected, is gone.
        failures = ("An exchange of small objects between ranks", "Building the optimizer: connecting the ranks")
        assert message.startswith(tuple(f"RankDesyncError: {what} failed" for what in failures))
        assert "  rank 1: has ended" in message


def fail_on_the_host_of_the_store(rank: int, pipe: Connection) -> None:
    """Initialise again with a store in the process of rank 0, which then cannot allocate, and ends."""
    port = pipe.recv()
    dist.destroy_process_group()
    timeout = timedelta(seconds=8)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3, timeout=timeout)

    def allocate(*_: Any, **__: Any) -> Any:
        raise MemoryError("no memory for the optimizer")

    if rank == 0:
        parameters.allocate = allocate
    pipe.send(message_of_build(transport="collective"))
    if rank == 0:
        os._exit(1)


def test_the_host_of_the_store_tells_the_others_why_it_fails(tmp_path: Path) -> None:
    """The others said that the store could not be reached."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ranks_of(3, tmp_path / "store", fail_on_the_host_of_the_store) as ranks:
        for pipe in ranks.pipes:
            pipe.send(port)
        assert ranks.hear(0) == "MemoryError: no memory for the optimizer"
        for rank in (1, 2):
            message = ranks.hear(rank)
            assert message.startswith("RankDesyncError: A broadcast with the other ranks failed: ")
            assert "rank 0: could not build its optimizer: MemoryError: no memory for the optimizer" in message


# Memory


def freed_before_the_state() -> list[bool]:
    """Return for each parameter whether its old memory had been freed when the state was allocated."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).to(torch.bfloat16)
    before = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    found: list[bool] = []
    allocate = formats.allocate

    def allocate_state(*arguments: Any) -> dict[str, torch.Tensor]:
        gc.collect()
        found.extend(storage() is None for storage in before)
        return allocate(*arguments)

    with mock.patch.object(formats, "allocate", allocate_state):
        ShardedAdamW(model.parameters())
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_state_is_allocated_when_the_parameters_old_memory_is_free(world_size: int) -> None:
    for found in on_ranks(world_size, freed_before_the_state):
        assert found == [True] * 6


MODEL_BYTES = 48 << 21
SMAPS = Path("/proc/self/smaps_rollup")


def memory_of_process() -> dict[str, float]:
    """Return this process's share of memory by kind, in units of the model's size."""
    lines = [line.split() for line in SMAPS.read_text().splitlines()[1:]]
    return {kind: 1024 * int(kb) / MODEL_BYTES for kind, kb, *_ in lines if kind.startswith("Pss")}


def memory_while_building(transport: str) -> tuple[float, dict[str, float], dict[str, float]]:
    """Return how much more memory this rank has than before, with the model alone: at most while parameters are bound,
    then when the optimizer is built, and after a step.
    """

    def more() -> dict[str, float]:
        return {kind: size - before[kind] for kind, size in memory_of_process().items()}

    def bind_and_measure(*arguments: Any) -> None:
        bind(*arguments)
        peak.append(more()["Pss:"])

    trained()  # loads libraries
    torch.empty(1 << 24, dtype=torch.uint8)  # now glibc allocates blocks of up to 16 MiB where freed ones stay
    model = [nn.Parameter(torch.ones(1 << 19)) for _ in range(48)]
    random.Random(0).shuffle(model)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, bind, peak = memory_of_process(), storage.bind, [0.0]
    with mock.patch.object(storage, "bind", bind_and_measure):
        optimizer = ShardedAdamW(model, bucket_mb=8, transport=transport)  # type: ignore[arg-type]
    dist.barrier()
    built = more()
    sum(parameter.sum() for parameter in model).backward()  # type: ignore[union-attr]
    optimizer.step()
    dist.barrier()
    return max(peak), built, more()


def test_zeros_where_pages_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then torch allocates them, whose errors say what there is too little of."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pages.mmap, "mmap", refuse)
    found = pages.zeros(1 << 20, torch.float32, torch.device("cpu"))
    assert found.shape == (1 << 20,) and not found.any()


@pytest.mark.quiet  # what a process is charged for shared libraries depends on how many others use them
@pytest.mark.skipif(sys.platform != "linux" or not SMAPS.exists(), reason="reads /proc")
@pytest.mark.parametrize("transport", ["shared_memory", "collective"])
def test_building_needs_little_more_memory_than_the_model(transport: str) -> None:
    """The model existed twice; moments took their memory with it, before a step; and a rank mapped all of rank 0's."""
    moved = 1 if transport == "shared_memory" else 0  # what leaves the process's own memory for shared memory
    for peak, built, stepped in on_ranks(2, memory_while_building, transport):
        assert peak < 0.35
        assert built["Pss_Anon:"] + moved < 0.2  # moments are not there yet
        assert built["Pss_Shmem:"] - moved < 0.1
        assert stepped["Pss_Anon:"] - built["Pss_Anon:"] > 1.4  # moments and the gradient shard
