# SPDX-License-Identifier: Apache-2.0
"""Unix-domain sockets between all ranks of one host, for short records and file descriptors of shared memory.

A received record is a memory barrier on every architecture: the receiver sees what the sender wrote to shared memory
before. Nothing has a name in the file system, waiting uses no CPU time, and the end of a rank is noticed at once.

Note: who may connect
    Any local user can connect to an abstract socket; all are listed in /proc/net/unix. So both ends check the other's
    user id as the kernel reports it (SO_PEERCRED), and the connecting end sends a secret that the ranks have exchanged
    over their process group.

Note: end-of-file does not show every death
    A child process that a rank has forked (a DataLoader worker) inherits its sockets, and keeps them open after the
    rank has died. ``os.register_at_fork`` closes them in children that Python forks. For other children, each rank also
    polls a pidfd of every peer.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from shardadam.ranks import desync

RECORD = struct.Struct("=BxxxIQ")
"""Kind, number and value; the transport defines what they mean."""

_PACKET_BYTES = 2048
_MSG_CMSG_CLOEXEC = 0x40000000
_CONNECT_TIMEOUT_S = 30.0
_HELLO_TIMEOUT_S = 2.0
_LONGEST_POLL_S = 3600.0  # poll takes at most 2^31 ms, but users may set timeouts of months

OnRecord = Callable[[int, int, int, int, "int | None"], None]
"""Called with (rank, kind, number, value, descriptor); must close the descriptor."""


def host_identity() -> str:
    """Return an id that is equal for two processes if and only if they can reach each other's abstract sockets.

    That requires the same kernel and the same network namespace.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return f"{socket.gethostname()} without /proc"


@dataclass(eq=False, slots=True)
class Peer:
    """The connection to another rank. ``outbox``: records and descriptors that the socket had no room for yet."""

    rank: int
    socket: socket.socket
    pid: int
    pidfd: int | None
    outbox: deque[tuple[bytes, int | None]] = field(default_factory=deque)
    has_ended: bool = False

    def clear_outbox(self) -> None:
        while self.outbox:
            _, descriptor = self.outbox.popleft()
            if descriptor is not None:
                os.close(descriptor)


class PeerSockets:
    """This rank's sockets to all other ranks. Built by ``connect``; set ``on_record`` before any use.

    Args:
        rank: this rank's position in ``global_ranks``.
        global_ranks: of all ranks, for messages.
        timeout_s: how long to wait for a rank whose process is running.
    """

    def __init__(self, rank: int, peers: Sequence[Peer], global_ranks: Sequence[int], timeout_s: float) -> None:
        self.rank = rank
        self.on_record: OnRecord = _no_handler
        self._peers = list(peers)
        self.global_ranks = global_ranks
        self._timeout_s = timeout_s
        self._poll = select.poll()
        self._by_fd: dict[int, Peer] = {}
        for peer in peers:
            for fd in (peer.socket.fileno(), peer.pidfd):
                if fd is not None:
                    self._by_fd[fd] = peer
                    self._poll.register(fd, select.POLLIN)
        self._is_open = True
        self._failure: str | None = None  # why this rank has aborted
        _instances.add(self)

    def send(self, kind: int, number: int, value: int = 0, descriptor: int | None = None) -> None:
        """Send a record to every peer, without waiting."""
        self.check_open("Sending to the other ranks")
        record = RECORD.pack(kind, number, value)
        for peer in self._peers:
            if descriptor is not None:
                peer.outbox.append((record, os.dup(descriptor)))
            elif peer.outbox and peer.outbox[-1][1] is None and len(peer.outbox[-1][0]) < _PACKET_BYTES:
                peer.outbox.append((peer.outbox.pop()[0] + record, None))
            else:
                peer.outbox.append((record, None))
            self._flush(peer)

    def poll(self, seconds: float = 0.0) -> None:
        """Handle the records that have arrived; if there are none, wait for one for up to ``seconds``."""
        if self._is_open:
            self._handle(self._poll.poll(seconds * 1000))

    def check_open(self, what: str) -> None:
        """Raise RankDesyncError if an earlier call has failed, RuntimeError if the sockets are closed.

        Args:
            what: what this rank is doing; begins the message.
        """
        if self._failure is not None:
            raise desync.RankDesyncError(
                f"{what}: the ranks cannot continue together, as an earlier call failed: {self._failure} Restart all "
                "ranks from the last checkpoint."
            )
        if not self._is_open:
            raise RuntimeError(
                f"{what}: the sockets to the other ranks are closed in this process. Use the optimizer in the process "
                "that built it, not in a forked child."
            )

    def wait_for(self, has_arrived: Callable[[int], bool], what: str, *, until_sent: bool = True) -> None:
        """Wait until ``has_arrived(rank)`` is True for all peers.

        Any error closes the sockets. So the peers notice it, and later records cannot be mistaken for those that this
        rank was waiting for.

        Args:
            what: what this rank is doing; begins the message.
            until_sent: also wait until all records of this rank are sent. Then it may do something else for long, or
                end, without leaving peers waiting. Requires that all peers handle records now.

        Raises:
            RankDesyncError: a peer has ended, has raised an error, or has deleted its optimizer.
            TimeoutError: a peer did not answer within the timeout of the process group.
        """
        try:
            self._wait_for(has_arrived, what, until_sent=until_sent)
        except (desync.RankDesyncError, TimeoutError) as error:
            raise self.abort_with(error) from None
        except BaseException as error:
            self.abort(str(error) or f"{type(error).__name__}.")
            raise

    def abort_with(self, error: Exception) -> Exception:
        """Close the sockets; return ``error`` with the status of all ranks added to its message."""
        if not self._is_open:
            return error
        self.abort(str(error))
        return type(error)(f"{error}\n{desync.report(self.global_ranks)}")

    def abort(self, reason: str) -> None:
        """Close the sockets, so that no peer waits for this rank. Later calls raise ``reason``."""
        if self._is_open:
            self._failure = reason
            self.close()

    def _wait_for(self, has_arrived: Callable[[int], bool], what: str, *, until_sent: bool) -> None:
        def is_late(peer: Peer) -> bool:
            return not has_arrived(peer.rank) or (until_sent and bool(peer.outbox))

        late = [peer for peer in self._peers if is_late(peer)]
        if not late:
            return
        self.check_open(what)
        self._handle(self._poll.poll(0))
        deadline = time.monotonic() + self._timeout_s
        while late := [peer for peer in late if is_late(peer)]:
            for peer in late:
                if peer.has_ended:
                    raise desync.RankDesyncError(
                        f"{what}: rank {self.global_ranks[peer.rank]} (process {peer.pid}) has ended, has raised an "
                        "error, or has deleted its optimizer, while this rank was waiting for it. Check its log."
                    )
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                ranks = ", ".join(f"{self.global_ranks[peer.rank]} (process {peer.pid})" for peer in late)
                raise TimeoutError(
                    f"{what}: no answer from rank {ranks} within {self._timeout_s:g} s, although it is running. Find "
                    "out what delays it, or raise the timeout of init_process_group."
                )
            self._handle(self._poll.poll(min(remaining, _LONGEST_POLL_S) * 1000))

    def close(self) -> None:
        """Close the sockets. Peers that wait for this rank raise. Local."""
        if not self._is_open:
            return
        self._is_open = False
        self.on_record = _no_handler  # breaks the reference cycle with the transport
        for peer in self._peers:
            peer.socket.close()
            if peer.pidfd is not None:
                os.close(peer.pidfd)
            peer.clear_outbox()

    def _handle(self, events: Sequence[tuple[int, int]]) -> None:
        for fd, event in events:
            peer = self._by_fd[fd]
            if fd == peer.pidfd:
                self._poll.unregister(fd)
                self._receive(peer)  # the records it sent before it ended
                self._end(peer)
                continue
            if event & select.POLLOUT:
                self._flush(peer)
            if event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                self._receive(peer)

    def _receive(self, peer: Peer) -> None:
        while not peer.has_ended:
            try:
                data, descriptors, _, _ = socket.recv_fds(peer.socket, _PACKET_BYTES * 2, 1, _MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            if not data:
                self._end(peer)
                return
            descriptor = descriptors[0] if descriptors else None
            for kind, number, value in RECORD.iter_unpack(data):
                self.on_record(peer.rank, kind, number, value, descriptor)

    def _flush(self, peer: Peer) -> None:
        if peer.has_ended:  # a child that it forked may keep its socket open, but nobody reads from it
            peer.clear_outbox()
        outbox = peer.outbox
        while outbox:
            record, descriptor = outbox[0]
            try:
                if descriptor is None:
                    peer.socket.send(record, socket.MSG_NOSIGNAL)
                else:
                    socket.send_fds(peer.socket, [record], [descriptor], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._poll.modify(peer.socket.fileno(), select.POLLIN | select.POLLOUT)
                return
            except OSError:  # the peer has ended; wait_for raises
                pass
            if descriptor is not None:
                os.close(descriptor)
            outbox.popleft()
            if not outbox and not peer.has_ended:
                self._poll.modify(peer.socket.fileno(), select.POLLIN)

    def _end(self, peer: Peer) -> None:
        if not peer.has_ended:
            peer.has_ended = True
            peer.clear_outbox()
            with suppress(KeyError):
                self._poll.unregister(peer.socket.fileno())


def _no_handler(*record: Any) -> None:
    raise AssertionError("on_record is not set")


# Connecting


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a rank tells the others about itself before they connect.

    Args:
        host: its ``host_identity``.
        address: of its listening socket, in the abstract namespace.
        secret: to be sent by the ranks that connect to it.
        problem: why it cannot share memory; None if it can.
    """

    host: str
    address: bytes
    secret: bytes
    pid: int
    problem: str | None


def connect(
    rank: int,
    global_ranks: Sequence[int],
    exchange: Callable[[Any], list[Any]],
    timeout_s: float,
) -> PeerSockets | str:
    """Connect all ranks with each other. Collective: all ranks must call it.

    Args:
        rank: this rank's position in ``global_ranks``, which are used in messages.
        exchange: returns the values that all ranks have passed to it, in rank order; collective.
        timeout_s: of the ``PeerSockets``.

    Returns:
        ``PeerSockets`` on all ranks; or, on all ranks, the reason why they cannot share memory.
    """
    peers: list[Peer] = []
    problem, has_timed_out = None, False
    with _listening_socket() as (listener, address, listener_problem):
        own = Endpoint(host_identity(), address, secrets.token_bytes(16), os.getpid(), listener_problem)
        endpoints: list[Endpoint] = exchange(own)
        unable = [f"rank {r}: {one.problem}" for r, one in zip(global_ranks, endpoints, strict=True) if one.problem]
        if len({endpoint.host for endpoint in endpoints}) > 1:
            problem = "the ranks are not on one host (or not in one network namespace)"
        elif unable:
            problem = unable[0]
        else:
            assert listener is not None
            try:
                peers += _connect_peers(rank, listener, endpoints, min(_CONNECT_TIMEOUT_S, timeout_s / 2))
            except OSError as error:
                problem = f"rank {global_ranks[rank]} cannot connect: {error}"
                has_timed_out = isinstance(error, TimeoutError)
    problems = [found for found in exchange((has_timed_out, problem)) if found[1] is not None]
    if problems:
        for peer in peers:
            peer.socket.close()
            if peer.pidfd is not None:
                os.close(peer.pidfd)
        return str(min(problems)[1])  # a timeout is only a consequence of another rank's problem
    return PeerSockets(rank, peers, global_ranks, timeout_s)


class _listening_socket:
    """Context manager: a listening socket with a random address; yields (socket, address, None), or why there is none.

    Checks also that memory can be shared.
    """

    def __enter__(self) -> tuple[socket.socket | None, bytes, str | None]:
        self._socket = None
        address = b"\0shardadam-" + secrets.token_hex(16).encode()
        try:
            _check_memory()
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.bind(address)
            self._socket.listen(socket.SOMAXCONN)
        except OSError as error:
            return None, address, str(error)
        return self._socket, address, None

    def __exit__(self, *exception: Any) -> None:
        if self._socket is not None:
            self._socket.close()


def why_unsupported() -> str | None:
    """Return why ranks on this host cannot share memory, as far as one process can tell; None if they can. Local."""
    with _listening_socket() as (_, _, problem):
        return problem


def _check_memory() -> None:
    """Raise OSError if memory cannot be shared by a file descriptor."""
    if not hasattr(os, "memfd_create"):
        raise OSError("this system has no memfd_create")
    descriptor = os.memfd_create("shardadam", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        read_only = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            mmap.mmap(read_only, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ).close()
        finally:
            os.close(read_only)
    finally:
        os.close(descriptor)


def _connect_peers(rank: int, listener: socket.socket, endpoints: Sequence[Endpoint], timeout_s: float) -> list[Peer]:
    """Connect to the ranks before this one, and accept connections from those after it.

    Raises:
        OSError: a rank cannot be reached, belongs to another user, or did not connect within ``timeout_s``.
    """
    connections: dict[int, socket.socket] = {}
    try:
        for other in range(rank):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connections[other] = connection
            connection.settimeout(timeout_s)
            connection.connect(endpoints[other].address)
            _check_user(connection)
            connection.send(struct.pack("=I", rank) + endpoints[other].secret)
        deadline = time.monotonic() + timeout_s
        while len(connections) < len(endpoints) - 1:
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            connection, _ = listener.accept()
            connection.settimeout(min(_HELLO_TIMEOUT_S, timeout_s / 2))  # a rank sends its hello at once
            sender = _receive_hello(connection, endpoints[rank].secret)
            if sender is None or not rank < sender < len(endpoints) or sender in connections:
                connection.close()  # not a rank of this group
            else:
                connections[sender] = connection
    except OSError:
        for connection in connections.values():
            connection.close()
        raise
    for connection in connections.values():
        connection.setblocking(False)
    return [
        Peer(other, connection, endpoints[other].pid, _pidfd(connection))
        for other, connection in sorted(connections.items())
    ]


def _receive_hello(connection: socket.socket, secret: bytes) -> int | None:
    """Return the rank at the other end; None if it is another user's or does not know ``secret``."""
    try:
        _check_user(connection)
        hello = connection.recv(64)
    except OSError:
        return None
    if len(hello) != 4 + len(secret) or not secrets.compare_digest(hello[4:], secret):
        return None
    return int(struct.unpack("=I", hello[:4])[0])


def _check_user(connection: socket.socket) -> None:
    uid = _credentials(connection)[1]
    if uid != os.geteuid():
        raise PermissionError(f"the other end belongs to user {uid}, expected {os.geteuid()}")


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Return the process, user and group ids of the other end, as the kernel recorded them when it connected."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", credentials)
    return pid, uid, gid


def _pidfd(connection: socket.socket) -> int | None:
    """Return a pidfd of the other end; None if the kernel lacks them, or its process id is not visible here.

    Without a pidfd, only end-of-file shows that the process has ended.
    """
    try:
        return os.pidfd_open(_credentials(connection)[0])
    except (AttributeError, OSError):
        return None


_instances: weakref.WeakSet[PeerSockets] = weakref.WeakSet()


def _close_in_child() -> None:
    for sockets in list(_instances):
        sockets.close()


os.register_at_fork(after_in_child=_close_in_child)
