# SPDX-License-Identifier: Apache-2.0
"""Ranks that share memory notice at once that a peer has ended, and within the timeout that it hangs. They leave no
process, memory, socket or file descriptor behind.
"""

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

pytestmark = pytest.mark.quiet

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


def sockets_of(optimizer: ShardedAdamW) -> PeerSockets:
    assert isinstance(optimizer._engine.transport, SharedMemoryTransport)
    return optimizer._engine.transport._sockets


# Ranks that end, or stop

VICTIM = 1


def lose_a_rank(how: str, during: str, rank: int, pipe: Connection) -> None:
    """Lose rank 1 before the third step; the others send the error that they get, and when."""
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
            with pytest.raises(RuntimeError, match=r"rank \d .* has raised an error"):
                advance(optimizer, [2])
            pipe.send("raised")
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
            with pytest.raises(RuntimeError, match=r"cannot continue together.*rank 1"):
                optimizer.step()
        pipe.send("raised again")
    time.sleep(DEADLINE_S)


class Losing:
    """``lose_a_rank`` with its first two arguments bound; can be pickled."""

    def __init__(self, how: str, during: str = "step") -> None:
        self.how, self.during = how, during

    def __call__(self, rank: int, pipe: Connection) -> None:
        lose_a_rank(self.how, self.during, rank, pipe)


def lose(tmp_path: Path, how: str, during: str, world_size: int) -> list[tuple[str, str, float]]:
    """Return what each other rank raises: type, message, and seconds since rank 1 was lost."""
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
            raised = [ranks.hear(rank) for rank in others]
            assert [ranks.hear(rank) for rank in others] == ["raised again"] * len(others)
            if how == "stops":  # once it runs again, it raises too
                os.kill(victim.pid, signal.SIGCONT)
                ranks.pipes[VICTIM].send("go on")
                assert ranks.hear(VICTIM) == "raised"
        finally:
            if child:
                os.kill(child, signal.SIGKILL)
            if how == "stops":
                os.kill(victim.pid, signal.SIGCONT)
        return [(kind, message, when - since) for kind, message, when in raised]


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


def test_a_stopped_rank_is_named_within_the_timeout(tmp_path: Path) -> None:
    for kind, message, seconds in lose(tmp_path, "stops", "step", 3):
        assert kind == "TimeoutError" and "no answer from rank 1 (process" in message and "within 3 s" in message
        assert "rank 1: does not answer" in message
        assert TIMEOUT_S - 1 < seconds < TIMEOUT_S + 3


def end_at_once(rank: int, pipe: Connection) -> None:
    optimizer = build()
    slow_down(optimizer, rank)
    advance(optimizer, range(3))
    if rank == 0:
        pipe.send("done")
        os.kill(os.getpid(), signal.SIGKILL)
    pipe.send("done")
    time.sleep(DEADLINE_S)


def slow_down(optimizer: ShardedAdamW, rank: int, send_buffer_bytes: int = 1) -> None:
    """Give rank 0 small send buffers, and make the other ranks read late."""
    if rank == 0:
        for peer in sockets_of(optimizer)._peers:
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    else:
        wait = shared_memory._PeerRead.wait

        def wait_late(transfer: Any) -> None:
            time.sleep(0.002)
            wait(transfer)

        shared_memory._PeerRead.wait = wait_late  # type: ignore[method-assign]


def test_a_rank_may_end_after_its_last_step(tmp_path: Path) -> None:
    with ranks_of(3, tmp_path / "store", end_at_once) as ranks:
        assert [ranks.hear(rank) for rank in range(3)] == ["done"] * 3


def use_barriers_between_calls(send_buffer_bytes: int) -> list[torch.Tensor]:
    """Train with a collective of the user's after every call of the optimizer; it does not read the sockets."""
    rank, _ = rank_and_size()
    wait = shared_memory._PeerRead.wait
    try:
        parameters = [torch.nn.Parameter(torch.ones(128)) for _ in range(40)]
        optimizer = ShardedAdamW(parameters, lr=0.1, bucket_mb=512 / 2**20)
        slow_down(optimizer, rank, send_buffer_bytes)
        for step in range(3):
            quadratic(parameters, rank, step).backward()
            optimizer.clip_grad_norm_(1.0)
            dist.barrier()
            optimizer.step()
            dist.barrier()
            optimizer.zero_grad()
        return clones(parameters)
    finally:
        shared_memory._PeerRead.wait = wait  # type: ignore[method-assign]


@pytest.mark.parametrize("send_buffer_bytes", [1, 9000])
def test_every_call_sends_all_its_records_before_it_returns(send_buffer_bytes: int) -> None:
    one, other = on_ranks(2, use_barriers_between_calls, send_buffer_bytes, deadline_s=DEADLINE_S)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Nothing is left


def memory_and_sockets() -> tuple[list[str], list[str]]:
    """Return inodes of this process's shared memory, and names of its sockets."""
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
    """Return the ids of processes that still map shared memory with these inodes."""
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


def test_deleted_optimizers_leave_no_descriptor_and_no_mapping() -> None:
    restart(2)  # new processes, without what earlier tests have cached
    for early, late in on_ranks(2, build_and_drop, 24, deadline_s=60.0):
        assert early == late and early[1] == 0


# PeerSockets alone


def pair(timeout_s: float = 1.0) -> tuple[PeerSockets, PeerSockets]:
    """Return two connected ranks in one process, with the smallest send buffers."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends = []
    for rank, end in enumerate((one, other)):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        ends.append(PeerSockets(rank, [Peer(1 - rank, end, os.getpid(), None)], [0, 1], timeout_s))
    return ends[0], ends[1]


def test_records_and_descriptors_arrive_in_order_through_a_full_socket() -> None:
    one, other = pair()
    received: list[tuple[int, str | None]] = []

    def on_record(rank: int, kind: int, number: int, value: int, descriptor: int | None) -> None:
        content = None
        if descriptor is not None:
            content = os.pread(descriptor, 100, 0).decode()
            os.close(descriptor)
        received.append((number, content))

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
    while len(received) < len(expected):
        other.poll()
        one.poll()
    assert received == expected
    assert not one._peers[0].outbox
    assert len(os.listdir("/proc/self/fd")) == open_before
    one.close()
    other.close()


def test_wait_for_returns_after_all_records_are_sent() -> None:
    """Records that did not fit into a full socket were only sent by the next call of the optimizer. If the rank first
    called a collective of the user's, or ended, the other ranks waited for them in vain.
    """
    one, other = pair(timeout_s=DEADLINE_S)
    received: list[int] = []
    other.on_record = lambda rank, kind, number, value, descriptor: received.append(number)
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
    assert received == list(range(100))
    other.close()


@pytest.mark.parametrize("end", ["close", "peer"])
def test_unsent_descriptors_are_closed_when_either_end_closes(end: str) -> None:
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


def test_closed_sockets_raise() -> None:
    one, other = pair()
    one.close()
    one.poll()
    for use in (lambda: one.send(0, 1), lambda: one.wait_for(lambda rank: False, "Waiting")):
        with pytest.raises(RuntimeError, match="closed in this process"):
            use()
    other.close()


def test_a_timeout_may_be_a_year() -> None:
    one, other = pair(timeout_s=timedelta(days=365).total_seconds())
    received = []
    one.on_record = lambda *record: received.append(record)
    later = threading.Timer(0.05, other.send, (0, 1))  # while wait_for waits
    later.start()
    one.wait_for(lambda rank: bool(received), "Waiting")
    later.join()
    one.close()
    other.close()


def test_records_to_an_ended_rank_are_dropped_though_its_socket_stays_open() -> None:
    """A child of the ended rank may keep the socket open. Records filled it, and then ``poll.modify`` raised for a
    descriptor that was no longer registered.
    """
    one, other = pair()
    gc.collect()
    open_before = len(os.listdir("/proc/self/fd"))
    child_exits, pidfd = os.pipe()[::-1]
    one._peers[0].pidfd = pidfd
    one._by_fd[pidfd] = one._peers[0]
    one._poll.register(pidfd)
    os.close(child_exits)  # poll reports the other end, as it reports a pidfd whose process has ended
    one.poll()
    for number in range(100):
        one.send(0, number)
        assert not one._peers[0].outbox
    one.wait_for(lambda rank: True, "Waiting")
    one.close()
    assert len(os.listdir("/proc/self/fd")) == open_before - 1
    other.close()
