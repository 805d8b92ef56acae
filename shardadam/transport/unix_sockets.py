# SPDX-License-Identifier: Apache-2.0
"""Unix-domain sockets between the ranks of one host: short records, and descriptors of memory, to and from every one.

A record that has been received orders memory: what its sender wrote before is there (the system calls see to it, on
every architecture). Nothing has a name in the file system, nothing spins, and a rank that ends is noticed at once.

Note: who may connect
    Names in the abstract namespace are open to every local user, and listed in /proc/net/unix. Both ends therefore look
    at the user id that the kernel vouches for (SO_PEERCRED), and the connecting end shows a secret that only the ranks
    know. It travelled over their process group.

Note: an end-of-file is not enough
    Processes forked by a rank (DataLoader workers) hold its sockets open after it has died. They are closed there by
    ``os.register_at_fork``, and ranks also poll a pidfd of each peer, for processes that Python has not forked.
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
"""Kind, number and value; what they mean is the transport's business."""

_PACKET_BYTES = 2048
_MSG_CMSG_CLOEXEC = 0x40000000
_CONNECT_TIMEOUT_S = 30.0
_HELLO_TIMEOUT_S = 2.0
_LONGEST_POLL_S = 3600.0  # poll takes no more than 2^31 ms, and users ask for timeouts of months

OnRecord = Callable[[int, int, int, int, "int | None"], None]
"""Called with (rank, kind, number, value, descriptor); the descriptor is the callee's to close."""


def host_identity() -> str:
    """Equal for two processes exactly if they can reach each other's abstract sockets: kernel and network namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return f"{socket.gethostname()} without /proc"


@dataclass(eq=False, slots=True)
class Peer:
    rank: int
    socket: socket.socket
    pid: int
    pidfd: int | None
    outbox: deque[tuple[bytes, int | None]] = field(default_factory=deque)
    has_ended: bool = False

    def forget_outbox(self) -> None:
        while self.outbox:
            _, descriptor = self.outbox.popleft()
            if descriptor is not None:
                os.close(descriptor)


class PeerSockets:
    """This rank's ends of the sockets to all others. ``connect`` builds it.

    Args:
        name_of: what a rank is called in messages.
        timeout_s: how long a rank that lives may keep this one waiting.
    """

    def __init__(self, rank: int, peers: Sequence[Peer], names: Sequence[int], timeout_s: float) -> None:
        self.rank = rank
        self.on_record: OnRecord = _refuse
        self._peers = list(peers)
        self.names = names
        self._timeout_s = timeout_s
        self._poll = select.poll()
        self._by_fd: dict[int, Peer] = {}
        for peer in peers:
            for fd in (peer.socket.fileno(), peer.pidfd):
                if fd is not None:
                    self._by_fd[fd] = peer
                    self._poll.register(fd, select.POLLIN)
        self._is_open = True
        self._failure: str | None = None  # why this rank has given up
        _live.add(self)

    def send(self, kind: int, number: int, value: int = 0, descriptor: int | None = None) -> None:
        """Sends a record to every peer, without waiting for any."""
        self.check_open("Telling the other ranks")
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
        """Takes what has come, or waits so long for something to come."""
        if self._is_open:
            self._handle(self._poll.poll(seconds * 1000))

    def check_open(self, what: str) -> None:
        """Raises RuntimeError where the sockets are closed."""
        if self._failure is not None:
            raise desync.RankDesyncError(
                f"{what}: the ranks have parted before, and cannot go on together: {self._failure} Start again, from "
                "the last checkpoint."
            )
        if not self._is_open:
            raise RuntimeError(
                f"{what}: the sockets to the other ranks are closed here. An optimizer works in the process that "
                "built it, not in its forked children."
            )

    def wait_for(self, has_come: Callable[[int], bool], what: str, *, until_sent: bool = True) -> None:
        """Waits until ``has_come(rank)`` for all peers.

        Args:
            until_sent: also until all that this rank has told has left it. It may turn to something else then, or
                end, while peers still wait for what it told. Only where all of them take in what has come so far.

        Raises:
            RuntimeError: a rank that it waits for has ended.
            TimeoutError: a rank has kept it waiting for longer than the process group's timeout.

        Whatever it raises, the sockets are closed: the others are told, and nobody takes what comes next for what this
        rank has not waited for.
        """
        try:
            self._wait_for(has_come, what, until_sent=until_sent)
        except (desync.RankDesyncError, TimeoutError) as error:
            raise self.abort_with(error) from None
        except BaseException as error:
            self.abort(str(error) or f"{type(error).__name__}.")
            raise

    def abort_with(self, error: Exception) -> Exception:
        """Gives up; returns ``error`` with where all ranks stand."""
        if not self._is_open:
            return error
        self.abort(str(error))
        return type(error)(f"{error}\n{desync.report(self.names)}")

    def abort(self, reason: str) -> None:
        """Closes the sockets, so that nobody waits for this rank."""
        if self._is_open:
            self._failure = reason
            self.close()

    def _wait_for(self, has_come: Callable[[int], bool], what: str, *, until_sent: bool) -> None:
        def is_late(peer: Peer) -> bool:
            return not has_come(peer.rank) or (until_sent and bool(peer.outbox))

        late = [n for n in self._peers if is_late(n)]
        if not late:
            return
        self.check_open(what)
        self._handle(self._poll.poll(0))
        deadline = time.monotonic() + self._timeout_s
        while late := [n for n in late if is_late(n)]:
            for peer in late:
                if peer.has_ended:
                    raise desync.RankDesyncError(
                        f"{what}: rank {self.names[peer.rank]} (process {peer.pid}) has ended, has given up "
                        "waiting, or has dropped its optimizer, while this rank was waiting for it. See its own "
                        "output."
                    )
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                ranks = ", ".join(f"{self.names[n.rank]} (process {n.pid})" for n in late)
                raise TimeoutError(
                    f"{what}: no answer from rank {ranks} within {self._timeout_s:g} s, though it lives. See what "
                    "keeps it; the limit is the timeout of init_process_group."
                )
            self._handle(self._poll.poll(min(remaining, _LONGEST_POLL_S) * 1000))

    def close(self) -> None:
        """Local. Peers that wait for this rank see that it is gone."""
        if not self._is_open:
            return
        self._is_open = False
        self.on_record = _refuse  # it refers to the transport, which refers to this
        for peer in self._peers:
            peer.socket.close()
            if peer.pidfd is not None:
                os.close(peer.pidfd)
            peer.forget_outbox()

    def _handle(self, events: Sequence[tuple[int, int]]) -> None:
        for fd, event in events:
            peer = self._by_fd[fd]
            if fd == peer.pidfd:
                self._poll.unregister(fd)
                self._receive(peer)  # what it said last
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
        if peer.has_ended:  # a child that it forked may hold its socket open, and nobody reads from it
            peer.forget_outbox()
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
            except OSError:  # it is gone; whoever waits for it will be told
                pass
            if descriptor is not None:
                os.close(descriptor)
            outbox.popleft()
            if not outbox and not peer.has_ended:
                self._poll.modify(peer.socket.fileno(), select.POLLIN)

    def _end(self, peer: Peer) -> None:
        if not peer.has_ended:
            peer.has_ended = True
            peer.forget_outbox()
            with suppress(KeyError):
                self._poll.unregister(peer.socket.fileno())


def _refuse(*record: Any) -> None:
    raise AssertionError("nobody listens yet")


# Connecting


def connect(
    rank: int,
    names: Sequence[int],
    exchange: Callable[[Any], list[Any]],
    timeout_s: float,
) -> PeerSockets | str:
    """PeerSockets to all other ranks, or why there are none: the same answer's kind on every rank. Collective.

    Args:
        rank: this rank's position among ``names``, which is what ranks are called in messages.
        exchange: collective: everybody's values, in rank order.
    """
    peers: list[Peer] = []
    problem, waited_in_vain = None, False
    with _listening() as (listener, name, listening_problem):
        secret = secrets.token_bytes(16)
        everybody = exchange((host_identity(), name, secret, os.getpid(), listening_problem))
        hosts = [host for host, *_ in everybody]
        if len(set(hosts)) > 1:
            problem = "the ranks are not on one host (or not in one network namespace)"
        elif any(entry[-1] is not None for entry in everybody):
            problem = next(f"rank {r}: {entry[-1]}" for r, entry in zip(names, everybody, strict=True) if entry[-1])
        else:
            assert listener is not None
            try:
                peers += _meet(rank, listener, everybody, min(_CONNECT_TIMEOUT_S, timeout_s / 2))
            except OSError as error:
                problem = f"rank {names[rank]} cannot connect: {error}"
                waited_in_vain = isinstance(error, TimeoutError)
    problems = [found for found in exchange((waited_in_vain, problem)) if found[1] is not None]
    if problems:
        for peer in peers:
            peer.socket.close()
            if peer.pidfd is not None:
                os.close(peer.pidfd)
        return str(min(problems)[1])  # rather what is wrong than who waited for it
    return PeerSockets(rank, peers, names, timeout_s)


class _listening:
    """A listening socket with a random name, for as long as the ranks connect."""

    def __enter__(self) -> tuple[socket.socket | None, bytes, str | None]:
        self._socket = None
        name = b"\0shardadam-" + secrets.token_hex(16).encode()
        try:
            _try_memory()
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.bind(name)
            self._socket.listen(socket.SOMAXCONN)
        except OSError as error:
            return None, name, str(error)
        return self._socket, name, None

    def __exit__(self, *exception: Any) -> None:
        if self._socket is not None:
            self._socket.close()


def why_not_here() -> str | None:
    """Why ranks of this host could not share memory, as far as one process can tell; None: it all works. Local."""
    with _listening() as (_, _, problem):
        return problem


def _try_memory() -> None:
    """Raises OSError where memory cannot be shared by its descriptor."""
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


def _meet(rank: int, listener: socket.socket, everybody: Sequence[tuple[Any, ...]], timeout_s: float) -> list[Peer]:
    """Connects to the ranks before this one, and is connected to by those after it."""
    found: dict[int, socket.socket] = {}
    try:
        for other in range(rank):
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            found[other] = link
            link.settimeout(timeout_s)
            link.connect(everybody[other][1])
            _check_user(link)
            link.send(struct.pack("=I", rank) + everybody[other][2])
        deadline = time.monotonic() + timeout_s
        while len(found) < len(everybody) - 1:
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            link, _ = listener.accept()
            link.settimeout(min(_HELLO_TIMEOUT_S, timeout_s / 2))  # one of ours speaks at once
            who = _who(link, everybody[rank][2])
            if who is None or not rank < who < len(everybody) or who in found:
                link.close()  # somebody else's
            else:
                found[who] = link
    except OSError:
        for link in found.values():
            link.close()
        raise
    for link in found.values():
        link.setblocking(False)
    return [
        Peer(other, link, everybody[other][3], _pidfd(link, everybody[other][3]))
        for other, link in sorted(found.items())
    ]


def _who(link: socket.socket, secret: bytes) -> int | None:
    """The rank at the other end; None if it is none of ours."""
    try:
        _check_user(link)
        hello = link.recv(64)
    except OSError:
        return None
    if len(hello) != 4 + len(secret) or not secrets.compare_digest(hello[4:], secret):
        return None
    return int(struct.unpack("=I", hello[:4])[0])


def _check_user(link: socket.socket) -> None:
    uid = _credentials(link)[1]
    if uid != os.geteuid():
        raise PermissionError(f"the other end belongs to user {uid}, expected {os.geteuid()}")


def _credentials(link: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end, as the kernel saw them when it connected."""
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", credentials)
    return pid, uid, gid


def _pidfd(link: socket.socket, pid: int) -> int | None:
    """None where the kernel has none, or the process is in a namespace of its own: an end-of-file must do then."""
    try:
        return os.pidfd_open(_credentials(link)[0])
    except (AttributeError, OSError):
        return None


_live: weakref.WeakSet[PeerSockets] = weakref.WeakSet()


def _close_in_child() -> None:
    for sockets in list(_live):
        sockets.close()


os.register_at_fork(after_in_child=_close_in_child)
