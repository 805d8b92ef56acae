# SPDX-License-Identifier: Apache-2.0
"""Ranks of one host, on the CPU: they read each other's memory. No bytes go through sockets but fences.

Every rank's buffers are its own: nobody else may write them. Peers map them read-only and take what they need
straight out of them, in one pass: a reduce-scatter sums this rank's slice of everybody's staging, in rank order; an
all-gather copies everybody's slice out of their parameters. What is not in shared memory (tensors on other devices,
or that others have allocated) goes the way of the transport within.

Note: three things that a transfer waits for
    Transfers are numbered, alike on all ranks. A rank says READY when its part of one may be read; whoever has read
    everybody's says READ; a buffer may be written again when all others have said so (``is_released``). Records follow
    each other in a socket, so one that is READY for a transfer is so for all before it. It also says what the transfer
    is: where ranks have come to different ones nothing is read.

Note: memory without names
    Buffers are anonymous memfds, whose descriptors go to the peers over the sockets. They are sealed: nobody can
    resize them, and nobody who is sent one can map it for writing. The kernel frees them with the last process that
    maps them, however it ends; parameters in them live as long as their tensors do. A forked child shares them with
    its parent instead of copying them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from shardadam.ranks import desync
from shardadam.transport.base import Finished, Pending, ReduceScatter, Staging, Transport, own_slice
from shardadam.transport.unix_sockets import PeerSockets

_F_SEAL_FUTURE_WRITE = 0x0010  # Linux 5.1
_BOARD_BYTES = 1 << 16
_LIES_IN_BITS = 24
_NBYTES_BITS = 36


class _Kind(IntEnum):
    READY = 0  # number: the transfer; value: the staging buffer that it lies in, and what it is
    READ = 1  # number: the transfer
    SHARED = 2  # a descriptor; number: the how-manieth of those that all ranks allocate together; value: bytes
    STAGING = 3  # a descriptor; number: its own; value: bytes
    DISCARDED = 4  # number: of a staging buffer


class _What(IntEnum):
    REDUCE_SCATTER = 0
    ALL_GATHER = 1
    BROADCAST = 2
    ALL_REDUCE = 3
    FENCE = 4

    @property
    def words(self) -> str:
        """As in a sentence: ``an all-reduce``."""
        return f"{'an' if self.name[0] == 'A' else 'a'} {self.name.lower().replace('_', '-')}"


@dataclass(frozen=True, slots=True)
class _Begun:
    """What a rank says of a transfer that it has begun. ``lies_in``: the staging buffer, if it is a reduce-scatter."""

    what: _What
    nbytes: int
    lies_in: int = 0

    def packed(self) -> int:
        return (self.what << _NBYTES_BITS | self.nbytes % (1 << _NBYTES_BITS)) << _LIES_IN_BITS | self.lies_in

    @classmethod
    def unpacked(cls, value: int) -> _Begun:
        signature = value >> _LIES_IN_BITS
        return cls(_What(signature >> _NBYTES_BITS), signature % (1 << _NBYTES_BITS), value % (1 << _LIES_IN_BITS))

    def meets(self, other: _Begun) -> bool:
        return self.what == other.what and (self.nbytes - other.nbytes) % (1 << _NBYTES_BITS) == 0

    def __str__(self) -> str:
        return self.what.words if self.what is _What.FENCE else f"{self.what.words} of {self.nbytes:,} bytes"


class SharedMemoryTransport(Transport):
    """
    Args:
        inner: over the same ranks, for what is not in shared memory.
        sockets: to the same ranks.
    """

    def __init__(self, inner: Transport, sockets: PeerSockets) -> None:
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.control = inner.control
        self.store_barrier = inner.store_barrier
        self._inner = inner
        self._sockets = sockets
        sockets.on_record = self._on_record
        self._peers = [rank for rank in range(self.world_size) if rank != self.rank]
        self._last = 0  # the number of the last transfer
        self._ready = [0] * self.world_size  # of each rank: the last transfer it is READY for
        self._unread: list[set[int]] = [set() for _ in range(self.world_size)]  # transfers that a rank has not READ yet
        self._shared: dict[int, dict[int, Tensor]] = {}  # all ranks' buffers, as bytes
        self._shared_count = 0
        self._staging: dict[tuple[int, int], Tensor] = {}  # by rank and number, as bytes
        self._numbers: dict[int, int] = {}  # by address: of this rank's own staging
        self._staging_count = 0
        self._begun: dict[tuple[int, int], _Begun] = {}  # by rank and transfer
        self._board: Tensor | None = None
        self._blocks = 0  # how many have been all-reduced
        # By address and size.
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._slices: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    # Buffers

    def allocate_parameters(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu" or numel == 0:
            return self._inner.allocate_parameters(numel, dtype, device)
        return self._share(numel * dtype.itemsize).view(dtype)

    def allocate_gradients(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        if device.type != "cpu" or numel == 0:
            return None
        return self._share(numel * dtype.itemsize).view(dtype)

    def sources(self, flat: Tensor) -> list[Tensor]:
        views = self._views_of(flat)
        assert views is not None
        return [own_slice(view, self.rank, self.world_size) for view in views]

    def allocate_staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        if device.type != "cpu":
            return self._inner.allocate_staging(numel, dtype, device)
        memory, descriptor = _allocate(numel * dtype.itemsize)
        number = self._staging_count
        self._staging_count += 1
        self._numbers[memory.data_ptr()] = number
        self._sockets.send(_Kind.STAGING, number, memory.nbytes, descriptor)
        os.close(descriptor)
        return Staging(memory.view(dtype), None)

    def free_staging(self, staging: Staging) -> None:
        number = self._numbers.pop(staging.send.data_ptr(), None)
        if number is not None:
            self._sockets.send(_Kind.DISCARDED, number)
        else:
            self._inner.free_staging(staging)

    def _share(self, nbytes: int) -> Tensor:
        """A buffer of each rank's, of one size. Collective."""
        index = self._shared_count
        self._shared_count += 1
        memory, descriptor = _allocate(nbytes)
        buffers = self._shared.setdefault(index, {})
        buffers[self.rank] = memory
        self._sockets.send(_Kind.SHARED, index, nbytes, descriptor)
        os.close(descriptor)
        self._sockets.wait_for(buffers.__contains__, "Allocating shared memory")
        return memory

    def _views_of(self, flat: Tensor) -> list[Tensor] | None:
        """The same place in the memory of all ranks, in rank order; None if ``flat`` is not in a shared buffer."""
        key = (flat.data_ptr(), flat.nbytes)
        if key not in self._views:
            for buffers in list(self._shared.values()):
                own = buffers[self.rank]
                start = flat.data_ptr() - own.data_ptr()
                if start >= 0 and start + flat.nbytes <= own.nbytes:
                    self._views[key] = [
                        buffers[rank][start : start + flat.nbytes].view(flat.dtype) for rank in range(self.world_size)
                    ]
                    break
            else:
                return None
        return self._views[key]

    def _slices_of(self, flat: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """Every peer's slice of ``flat``: here, and in its own memory."""
        key = (flat.data_ptr(), flat.nbytes)
        if key not in self._slices:
            views = self._views_of(flat)
            if views is None:
                return None
            self._slices[key] = [
                (own_slice(flat, rank, self.world_size), own_slice(views[rank], rank, self.world_size))
                for rank in self._peers
            ]
        return self._slices[key]

    # Transfers

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        send = request.send
        lies_in = self._numbers.get(send.data_ptr())
        if lies_in is None:
            return self._inner.reduce_scatter(request)
        number = self._announce(_Begun(_What.REDUCE_SCATTER, send.nbytes, lies_in))

        def read(begun: dict[int, _Begun]) -> None:
            sources = []
            for rank in range(self.world_size):
                if rank == self.rank:
                    whole = send
                else:
                    whole = self._staging[rank, begun[rank].lies_in].view(send.dtype)[: request.numel]
                sources.append(own_slice(whole, self.rank, self.world_size))
            request.sum_(sources)

        return _Read(self, number, read)

    def all_gather(self, flat: Tensor) -> Pending:
        slices = self._slices_of(flat)
        if slices is None:
            return self._inner.all_gather(flat)

        def read(_: dict[int, _Begun]) -> None:
            for target, source in slices:
                target.copy_(source)

        return _Read(self, self._announce(_Begun(_What.ALL_GATHER, flat.nbytes)), read)

    def broadcast(self, tensor: Tensor) -> Pending:
        views = self._views_of(tensor) if tensor.device.type == "cpu" and tensor.is_contiguous() else None
        if views is None:
            return self._inner.broadcast(tensor)

        def read(_: dict[int, _Begun]) -> None:
            if self.rank != 0:
                tensor.copy_(views[0])

        return _Read(self, self._announce(_Begun(_What.BROADCAST, tensor.nbytes)), read)

    def all_reduce(self, block: Tensor) -> Pending:
        if block.device.type != "cpu" or not block.is_contiguous():
            return self._inner.all_reduce(block)
        if self._board is None or self._board.nbytes < 2 * block.nbytes:
            self._board = self._share(max(_BOARD_BYTES, 4 * block.nbytes))
        self._sockets.check_open("An all-reduce")  # a forked child would write its parent's board
        # Two halves in turn: whoever writes one again has seen all others begin with the other, and so end with this.
        start = self._blocks % 2 * (self._board.nbytes // 2)
        self._blocks += 1
        views = self._views_of(self._board[start : start + block.nbytes])
        assert views is not None
        blocks = [view.view(block.dtype).view(block.shape) for view in views]
        blocks[self.rank].copy_(block)
        self.await_ready(self._announce(_Begun(_What.ALL_REDUCE, block.nbytes), is_read=False))
        block.copy_(blocks[0])
        for other in blocks[1:]:
            block += other
        return Finished()

    def fence(self) -> None:
        self.await_ready(self._announce(_Begun(_What.FENCE, 0), is_read=False))

    def poll(self, seconds: float) -> bool:
        self._sockets.poll(seconds)
        return True

    def abort(self) -> None:
        self._sockets.abort("this rank has been interrupted in the middle of a transfer.")

    def close(self, *, clean: bool) -> None:
        self._sockets.close()
        self._inner.close(clean=clean)

    # What transfers need

    def _announce(self, begun: _Begun, *, is_read: bool = True) -> int:
        """Tells all that this rank is READY for its next transfer; ``is_read``: and that it waits for them to READ."""
        self._last += 1
        if is_read:
            for rank in self._peers:
                self._unread[rank].add(self._last)
        self._begun[self.rank, self._last] = begun
        self._sockets.send(_Kind.READY, self._last, begun.packed())
        return self._last

    def await_ready(self, number: int, *, until_sent: bool = True) -> dict[int, _Begun]:
        """What the others have begun, by rank.

        Raises:
            RankDesyncError: another transfer than this rank.
        """
        own = self._begun[self.rank, number]
        self._sockets.wait_for(lambda rank: self._ready[rank] >= number, f"In {own.what.words}", until_sent=until_sent)
        del self._begun[self.rank, number]
        begun = {rank: self._begun.pop((rank, number)) for rank in self._peers}
        names = self._sockets.names
        for rank, theirs in begun.items():
            if not theirs.meets(own):
                raise self._sockets.abort_with(
                    desync.RankDesyncError(
                        f"Rank {names[rank]} has begun {theirs} where rank {names[self.rank]} has begun {own}: they "
                        "have made different calls, or other numbers of backward passes."
                    )
                )
        return begun

    def is_ready(self, number: int) -> bool:
        self._sockets.poll()
        return all(self._ready[rank] >= number for rank in self._peers)

    def has_read(self, number: int) -> None:
        self._sockets.send(_Kind.READ, number)

    def is_released(self, number: int) -> bool:
        self._sockets.poll()
        return not any(number in self._unread[rank] for rank in self._peers)

    def await_release(self, number: int) -> None:
        self._sockets.wait_for(lambda rank: number not in self._unread[rank], "Waiting for the others to read")

    def _on_record(self, rank: int, kind: int, number: int, value: int, descriptor: int | None) -> None:
        if kind == _Kind.READY:
            self._ready[rank] = number
            self._begun[rank, number] = _Begun.unpacked(value)
        elif kind == _Kind.READ:
            self._unread[rank].discard(number)
        elif kind == _Kind.DISCARDED:
            del self._staging[rank, number]
        else:
            assert descriptor is not None
            try:
                memory = _map(descriptor, value, writable=False)
            finally:
                os.close(descriptor)
            if kind == _Kind.SHARED:
                self._shared.setdefault(number, {})[rank] = memory
            else:
                self._staging[rank, number] = memory


class _Read(Pending):
    """Reads from the peers when all of them are READY."""

    def __init__(
        self, transport: SharedMemoryTransport, number: int, read: Callable[[dict[int, _Begun]], None]
    ) -> None:
        self._transport = transport
        self._number = number
        self._read = read

    def done(self) -> bool:
        return self._transport.is_ready(self._number)

    def wait(self) -> None:
        # A peer that has all it needs for this one may not look at its socket before the next fence.
        self._read(self._transport.await_ready(self._number, until_sent=False))
        self._transport.has_read(self._number)

    def is_released(self) -> bool:
        return self._transport.is_released(self._number)

    def await_release(self) -> None:
        self._transport.await_release(self._number)


def _allocate(nbytes: int) -> tuple[Tensor, int]:
    """Zeroed memory, as bytes, and a descriptor by which others can read it."""
    descriptor = os.memfd_create("shardadam", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        memory = _map(descriptor, nbytes, writable=True)
        with suppress(OSError):  # the kernel may be too old for it; the descriptor is opened for reading all the same
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        return memory, os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(descriptor)


def _map(descriptor: int, nbytes: int, *, writable: bool) -> Tensor:
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    # A mapping needs no descriptor; Python keeps one all the same where it is not told otherwise.
    options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    memory = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=access, **options)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a read-only tensor had better not be written
        return torch.frombuffer(memory, dtype=torch.uint8)
