# SPDX-License-Identifier: Apache-2.0
"""Ranks that share memory notice at once who has ended, and in time who keeps them waiting; nothing of them is left."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardadam import ShardedAdamW
from shardadam.transport import SharedMemoryTransport, shared_memory
from shardadam.transport.unix_sockets import Peer, PeerSockets
from tests.parity import build_parameters, clones, quadratic
from tests.ranks import on_ranks, rank_and_size, ranks_of, restart

TIMEOUT_S = 3.0
DEADLINE_S = 20.0


def build(**options: Any) -> ShardedAdamW:
    optimizer = ShardedAdamW(build_parameters(), lr=1e-2, **{"bucket_mb": 0.001, **options})
    assert isinstance(optimizer._engine.transport, SharedMemoryTransport)
    return optimizer


def advance(optimizer: ShardedAdamW, steps: Sequence[int]) -> None:
    rank, _ = rank_and_size()
    for step in steps:
        quadratic(optimizer.param_groups[0]["params"], rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def links_of(optimizer: ShardedAdamW) -> PeerSockets:
    assert isinstance(optimizer._engine.transport, SharedMemoryTransport)
    return optimizer._engine.transport._sockets


# Ranks that end, or stop

VICTIM = 1


def lose_a_rank(how: str, during: str, rank: int, pipe: Connection) -> None:
    """Rank 1 does not come to the third step; the others tell what they are told, and when."""
    optimizer: ShardedAdamW | None = build(gradient_sync="backward" if during == "backward" else "step")
    assert optimizer is not None
    advance(optimizer, range(2))
    if rank == VICTIM:
        child = 0
        if "child" in how:
            child = os.fork() if how == "child" else ctypes.PyDLL(None).fork()
            if child == 0:
                time.sleep(DEADLINE_S)
                os._exit(0)
        pipe.send(child)
        assert pipe.recv() == "go on"
        if how == "stops":
            with pytest.raises(RuntimeError, match=r"rank \d .* has given up"):
                advance(optimizer, [2])
            pipe.send("parted")
        del optimizer
        gc.collect()
        pipe.send(time.monotonic())
        time.sleep(DEADLINE_S)
    pipe.send("ready")
    try:
        advance(optimizer, [2])
        pipe.send(("nothing", "", time.monotonic()))
    except Exception as error:
        pipe.send((type(error).__name__, str(error), time.monotonic()))
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"have parted before.*rank 1"):
                optimizer.step()
        pipe.send("told again")
    time.sleep(DEADLINE_S)


class Losing:
    """``lose_a_rank`` with its first arguments, for another process."""

    def __init__(self, how: str, during: str = "step") -> None:
        self.how, self.during = how, during

    def __call__(self, rank: int, pipe: Connection) -> None:
        lose_a_rank(self.how, self.during, rank, pipe)


def lose(tmp_path: Path, how: str, during: str, world_size: int) -> list[tuple[str, str, float]]:
    """What the others raise, and seconds since rank 1 was lost."""
    with ranks_of(world_size, tmp_path / "store", Losing(how, during)) as ranks:
        victim = ranks.processes[VICTIM]
        child = ranks.hear(VICTIM)
        others = [rank for rank in range(world_size) if rank != VICTIM]
        try:
            assert [ranks.hear(rank) for rank in others] == ["ready"] * len(others)
            time.sleep(0.2)
            if how == "drops":
                ranks.pipes[VICTIM].send("go on")
                since = ranks.hear(VICTIM)
            else:
                since = time.monotonic()
                os.kill(victim.pid, signal.SIGSTOP if how == "stops" else signal.SIGKILL)
            told = [ranks.hear(rank) for rank in others]
            assert [ranks.hear(rank) for rank in others] == ["told again"] * len(others)
            if how == "stops":  # it finds out, instead of taking what comes next for what it waits for
                os.kill(victim.pid, signal.SIGCONT)
                ranks.pipes[VICTIM].send("go on")
                assert ranks.hear(VICTIM) == "parted"
        finally:
            if child:
                os.kill(child, signal.SIGKILL)
            if how == "stops":
                os.kill(victim.pid, signal.SIGCONT)
        return [(kind, message, when - since) for kind, message, when in told]


@pytest.mark.parametrize(
    ("how", "during", "world_size"),
    [
        ("ends", "step", 3),
        ("child", "step", 2),
        ("child unseen by Python", "backward", 2),
        ("drops", "step", 2),
        pytest.param("ends", "backward", 3, marks=pytest.mark.long),
        pytest.param("drops", "backward", 3, marks=pytest.mark.long),
        pytest.param("child unseen by Python", "step", 3, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_ends_is_named_at_once(tmp_path: Path, how: str, during: str, world_size: int) -> None:
    for kind, message, seconds in lose(tmp_path, how, during, world_size):
        assert kind == "RankDesyncError" and "rank 1 (process" in message and "has ended" in message
        assert seconds < 1.5


def test_a_rank_that_stops_is_named_in_time(tmp_path: Path) -> None:
    for kind, message, seconds in lose(tmp_path, "stops", "step", 3):
        assert kind == "TimeoutError" and "no answer from rank 1 (process" in message and "within 3 s" in message
        assert "rank 1: does not answer" in message
        assert TIMEOUT_S - 1 < seconds < TIMEOUT_S + 3


def end_at_once(rank: int, pipe: Connection) -> None:
    optimizer = build()
    slowly(optimizer, rank)
    advance(optimizer, range(3))
    if rank == 0:
        pipe.send("done")
        os.kill(os.getpid(), signal.SIGKILL)  # harder than any end of a script
    pipe.send("done")
    time.sleep(DEADLINE_S)


def slowly(optimizer: ShardedAdamW, rank: int, room: int = 1) -> None:
    """Others than rank 0 read late, and what it sends hardly finds room."""
    if rank == 0:
        for peer in links_of(optimizer)._peers:
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
    else:
        wait_for = shared_memory._Read.wait

        def wait_late(transfer: Any) -> None:
            time.sleep(0.002)
            wait_for(transfer)

        shared_memory._Read.wait = wait_late  # type: ignore[method-assign]


def test_a_rank_that_has_taken_its_last_step_may_end(tmp_path: Path) -> None:
    with ranks_of(3, tmp_path / "store", end_at_once) as ranks:
        assert [ranks.hear(rank) for rank in range(3)] == ["done"] * 3


def turn_to_something_else(room: int) -> list[torch.Tensor]:
    """Rank 0 waits in a collective of the user's after every call of ours, and looks at no socket meanwhile."""
    rank, _ = rank_and_size()
    wait_for = shared_memory._Read.wait
    try:
        parameters = [torch.nn.Parameter(torch.ones(128)) for _ in range(40)]
        optimizer = ShardedAdamW(parameters, lr=0.1, bucket_mb=512 / 2**20)
        slowly(optimizer, rank, room)
        for step in range(3):
            quadratic(parameters, rank, step).backward()
            optimizer.clip_grad_norm_(1.0)
            dist.barrier()
            optimizer.step()
            dist.barrier()
            optimizer.zero_grad()
        return clones(parameters)
    finally:
        shared_memory._Read.wait = wait_for  # type: ignore[method-assign]


@pytest.mark.parametrize("room", [1, 9000])
def test_a_rank_that_turns_to_something_else_has_told_everybody_all(room: int) -> None:
    one, other = on_ranks(2, turn_to_something_else, room, deadline_s=DEADLINE_S)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Nothing is left


def memory_and_sockets() -> tuple[list[str], list[str]]:
    """Inodes of this process's shared memory, and names of its sockets."""
    with open("/proc/self/maps") as file:
        inodes = [line.split()[4] for line in file if "memfd:shardadam" in line]
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:"):
            names.append(target[len("socket:[") : -1])
    with open("/proc/net/unix") as file:
        ours = [line.split()[-1] for line in file if "shardadam" in line and line.split()[6] in names]
    return sorted(set(inodes)), ours


def work_and_end(how: str, rank: int, pipe: Connection) -> None:
    optimizer = build(gradient_sync="step" if how == "exits" else "backward")
    advance(optimizer, range(3))
    pipe.send(memory_and_sockets())
    if how == "exits":
        return
    step = 3
    while True:
        advance(optimizer, [step])
        step += 1


class Working:
    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, rank: int, pipe: Connection) -> None:
        work_and_end(self.how, rank, pipe)


def holders(inodes: Sequence[str]) -> list[str]:
    """Processes that still map the shared memory of these inodes, or hold it open."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/maps") as file:
                if any("memfd:shardadam" in line and line.split()[4] in inodes for line in file):
                    found.append(pid)
        except OSError:
            continue
    return found


@pytest.mark.timeout(1500)
def test_nothing_is_left_of_ranks_that_exit_or_are_killed(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shm = {name for name in os.listdir("/dev/shm") if "shardadam" in name}
    for index in range(200 if request.config.getoption("--long") else 4):
        how = ("exits", "is killed")[index % 2]
        with ranks_of(2, tmp_path / f"store-{index}", Working(how), timeout_s=30) as ranks:
            inodes, names = [], []
            for rank in range(2):
                more_inodes, more_names = ranks.hear(rank)
                inodes += more_inodes
                names += more_names
            assert inodes and names
            pids = [process.pid for process in ranks.processes]
            if how == "is killed":
                time.sleep(0.01 * (index % 7))
                ranks.processes[index // 2 % 2].kill()
            for process in ranks.processes:
                process.join(DEADLINE_S)
            codes = [process.exitcode for process in ranks.processes]
            assert sorted(codes) == [0, 0] if how == "exits" else -signal.SIGKILL in codes and None not in codes, codes
        with open("/proc/net/unix") as file:
            left = file.read()
        assert not [name for name in names if name in left]
        assert holders(inodes) == []
        assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    assert {name for name in os.listdir("/dev/shm") if "shardadam" in name} <= shm


def mappings() -> int:
    with open("/proc/self/maps") as file:
        return sum("memfd:shardadam" in line for line in file)


def build_and_drop(times: int) -> list[tuple[int, int]]:
    counts = []
    for index in range(times):
        optimizer = build(gradient_sync=("step", "backward")[index % 2])
        advance(optimizer, range(2))
        del optimizer
        gc.collect()
        if index in (3, times - 1):
            dist.barrier()
            counts.append((len(os.listdir("/proc/self/fd")), mappings()))
    return counts


def test_optimizers_that_are_dropped_leave_no_descriptor_and_no_mapping() -> None:
    restart(2)  # what an earlier test has kept is none of this one's
    for early, late in on_ranks(2, build_and_drop, 24, deadline_s=60.0):
        assert early == late and early[1] == 0


# PeerSockets by themselves


def pair(timeout_s: float = 1.0) -> tuple[PeerSockets, PeerSockets]:
    """Two ends in one process."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends = []
    for rank, end in enumerate((one, other)):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        ends.append(PeerSockets(rank, [Peer(1 - rank, end, os.getpid(), None)], [0, 1], timeout_s))
    return ends[0], ends[1]


def test_records_and_descriptors_arrive_in_order_through_a_full_socket() -> None:
    one, other = pair()
    heard: list[tuple[int, str | None]] = []

    def on_record(rank: int, kind: int, number: int, value: int, descriptor: int | None) -> None:
        content = None
        if descriptor is not None:
            content = os.pread(descriptor, 100, 0).decode()
            os.close(descriptor)
        heard.append((number, content))

    other.on_record = on_record
    gc.collect()
    open_before = len(os.listdir("/proc/self/fd"))
    expected: list[tuple[int, str | None]] = []
    for number in range(500):
        if number % 7:
            one.send(0, number)
            expected.append((number, None))
        else:
            descriptor = os.memfd_create("test")
            os.write(descriptor, str(number).encode())
            one.send(0, number, descriptor=descriptor)
            os.close(descriptor)
            expected.append((number, str(number)))
    assert one._peers[0].outbox
    while len(heard) < len(expected):
        other.poll()
        one.poll()
    assert heard == expected
    assert not one._peers[0].outbox
    assert len(os.listdir("/proc/self/fd")) == open_before
    one.close()
    other.close()


def test_a_wait_ends_when_all_that_was_told_is_sent() -> None:
    """Records that had found a full socket waited for the next call of ours. A rank that turned to a collective of the
    user's, or ended, left the others waiting for them.
    """
    one, other = pair(timeout_s=DEADLINE_S)
    heard: list[int] = []
    other.on_record = lambda rank, kind, number, value, descriptor: heard.append(number)
    for number in range(100):
        one.send(0, number)
    one.wait_for(lambda rank: True, "Waiting", until_sent=False)
    assert one._peers[0].outbox
    later = threading.Timer(0.05, other.poll)
    later.start()
    one.wait_for(lambda rank: True, "Waiting")
    assert not one._peers[0].outbox
    later.join()
    one.close()
    other.poll()
    assert heard == list(range(100))
    other.close()


@pytest.mark.parametrize("end", ["close", "peer"])
def test_what_could_not_be_sent_is_forgotten_when_either_end_is_gone(end: str) -> None:
    gc.collect()
    open_before = len(os.listdir("/proc/self/fd"))
    one, other = pair()
    other.on_record = lambda *record: None
    for number in range(100):
        descriptor = os.memfd_create("test")
        one.send(0, number, descriptor=descriptor)
        os.close(descriptor)
    if end == "peer":
        other.close()
        with pytest.raises(RuntimeError, match=r"rank 1 .* has ended"):
            one.wait_for(lambda rank: False, "Waiting")
    one.close()
    other.close()
    del one, other
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_closed_links_say_so() -> None:
    one, other = pair()
    one.close()
    one.poll()
    for use in (lambda: one.send(0, 1), lambda: one.wait_for(lambda rank: False, "Waiting")):
        with pytest.raises(RuntimeError, match="closed here"):
            use()
    other.close()


def test_a_timeout_of_years_is_one() -> None:
    one, other = pair(timeout_s=timedelta(days=365).total_seconds())
    came = []
    one.on_record = lambda *record: came.append(record)
    later = threading.Timer(0.05, other.send, (0, 1))  # once the wait has begun
    later.start()
    one.wait_for(lambda rank: bool(came), "Waiting")
    later.join()
    one.close()
    other.close()


def test_what_is_said_to_a_dead_rank_is_forgotten_though_its_socket_stays_open() -> None:
    """A child of its own may hold that: it filled, and then poll was asked to watch what it had given up."""
    one, other = pair()
    gc.collect()
    open_before = len(os.listdir("/proc/self/fd"))
    child_exits, pidfd = os.pipe()[::-1]
    one._peers[0].pidfd = pidfd
    one._by_fd[pidfd] = one._peers[0]
    one._poll.register(pidfd)
    os.close(child_exits)  # what a pidfd is ready for when its process has ended
    one.poll()
    for number in range(100):
        one.send(0, number)
        assert not one._peers[0].outbox
    one.wait_for(lambda rank: True, "Waiting")
    one.close()
    assert len(os.listdir("/proc/self/fd")) == open_before - 1
    other.close()
