# SPDX-License-Identifier: Apache-2.0
"""CPU tensors between the ranks of one host: each rank reads its peers' memory. Sockets carry small records only.

Each rank allocates its own buffers, and peers map them read-only. A reduce-scatter sums this rank's slice of all ranks'
staging buffers, in rank order; an all-gather copies the peers' slices out of their parameter buffers. Tensors that are
not in shared memory (on other devices, or allocated elsewhere) use the inner transport.

Note: the protocol of a transfer
    Transfers have numbers, which are the same on all ranks. A rank sends STARTED when its data for a transfer may be
    read, and READ when it has read the data of all peers. It may overwrite its data when all peers have sent READ
    (``is_released``). Sockets keep the order of records, so STARTED for one transfer implies it for all before. STARTED
    also describes the transfer. If descriptions differ, all ranks raise before they read anything.

Note: anonymous shared memory
    Buffers are memfds, which have no name in the file system; their descriptors are sent over the sockets. Seals keep
    them from being resized, and keep peers from mapping them for writing. The kernel frees a buffer when no process
    maps it, however those processes end; tensors keep theirs mapped. A forked child shares the buffers of its parent,
    without a copy.
"""

from __future__ import annotations

import ctypes
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

from shardadam import pages
from shardadam.ranks import desync
from shardadam.ranks.transfer_log import with_article
from shardadam.transport.base import Finished, Pending, ReduceScatter, Staging, Transport, own_slice
from shardadam.transport.unix_sockets import PeerSockets

_F_SEAL_FUTURE_WRITE = 0x0010  # Linux 5.1
_ALL_REDUCE_BYTES = 1 << 16
_STAGING_BITS = 24
_NBYTES_BITS = 36


class _Record(IntEnum):
    """Kinds of records, and what their number and value mean."""

    STARTED = 0  # number of the transfer; value: ``_Transfer.pack``
    READ = 1  # number of the transfer
    SHARED_BUFFER = 2  # with a descriptor; index of a buffer that all ranks allocate; value: bytes
    STAGING_BUFFER = 3  # with a descriptor; index of a staging buffer of the sender; value: bytes
    STAGING_FREED = 4  # index of a staging buffer of the sender


class _Operation(IntEnum):
    REDUCE_SCATTER = 0
    ALL_GATHER = 1
    BROADCAST = 2
    ALL_REDUCE = 3
    FENCE = 4

    @property
    def with_article(self) -> str:
        """The name in a sentence: ``an all-reduce``."""
        return with_article(self.name.lower().replace("_", "-"))


@dataclass(frozen=True, slots=True)
class _Transfer:
    """A transfer as one rank describes it to the others.

    Args:
        nbytes: of its data; only the lowest 36 bits are sent.
        staging: for a reduce-scatter, the index of the staging buffer that holds the data.
    """

    operation: _Operation
    nbytes: int
    staging: int = 0

    def pack(self) -> int:
        signature = self.operation << _NBYTES_BITS | self.nbytes % (1 << _NBYTES_BITS)
        return signature << _STAGING_BITS | self.staging

    @classmethod
    def unpack(cls, value: int) -> _Transfer:
        signature, staging = value >> _STAGING_BITS, value % (1 << _STAGING_BITS)
        return cls(_Operation(signature >> _NBYTES_BITS), signature % (1 << _NBYTES_BITS), staging)

    def matches(self, other: _Transfer) -> bool:
        return self.operation == other.operation and (self.nbytes - other.nbytes) % (1 << _NBYTES_BITS) == 0

    def __str__(self) -> str:
        size = "" if self.operation is _Operation.FENCE else f" of {self.nbytes:,} bytes"
        return self.operation.with_article + size


class SharedMemoryTransport(Transport):
    """
    Args:
        inner: between the same ranks, for tensors that are not in shared memory.
        sockets: between the same ranks.
    """

    def __init__(self, inner: Transport, sockets: PeerSockets) -> None:
        self.rank = inner.rank
        self.world_size = inner.world_size
        self.control = inner.control
        self.store_barrier = inner.store_barrier
        self.devices = inner.devices
        self._inner = inner
        self._sockets = sockets
        sockets.on_record = self._on_record
        self._peers = [rank for rank in range(self.world_size) if rank != self.rank]
        # Transfers
        self._last_number = 0
        self._last_started = [0] * self.world_size  # by rank: the number of its last transfer
        self._started: dict[tuple[int, int], _Transfer] = {}  # by rank and number, until this rank waits for it
        self._unread: list[set[int]] = [set() for _ in range(self.world_size)]  # by rank: numbers without READ from it
        self._all_reduce_buffer: Tensor | None = None
        self._all_reduce_count = 0
        # Buffers, as bytes
        self._shared: dict[int, dict[int, Tensor]] = {}  # by index, then by rank
        self._shared_count = 0
        self._staging: dict[tuple[int, int], Tensor] = {}  # by rank and index
        self._staging_index: dict[int, int] = {}  # by address: of this rank's own staging buffers
        self._staging_count = 0
        # Caches, by address and size
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._slices: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    # Buffers

    def allocate_parameters(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type != "cpu" or numel == 0:
            return self._inner.allocate_parameters(numel, dtype, device)
        return self._allocate_shared(numel * dtype.itemsize).view(dtype)

    def allocate_gradients(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        if device.type != "cpu" or numel == 0:
            return None
        return self._allocate_shared(numel * dtype.itemsize).view(dtype)

    def sources(self, flat: Tensor) -> list[Tensor]:
        views = self._views_of(flat)
        assert views is not None
        return [own_slice(view, self.rank, self.world_size) for view in views]

    def allocate_staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        if device.type != "cpu":
            return self._inner.allocate_staging(numel, dtype, device)
        memory, descriptor = _allocate(numel * dtype.itemsize)
        index = self._staging_count
        self._staging_count += 1
        self._staging_index[memory.data_ptr()] = index
        self._sockets.send(_Record.STAGING_BUFFER, index, memory.nbytes, descriptor)
        os.close(descriptor)
        return Staging(memory.view(dtype), None)

    def free_staging(self, staging: Staging) -> None:
        index = self._staging_index.pop(staging.send.data_ptr(), None)
        if index is not None:
            self._sockets.send(_Record.STAGING_FREED, index)
        else:
            self._inner.free_staging(staging)

    def _allocate_shared(self, nbytes: int) -> Tensor:
        """Allocate a buffer of one size on each rank, map those of the peers, and return this rank's. Collective."""
        index = self._shared_count
        self._shared_count += 1
        memory, descriptor = _allocate(nbytes)
        buffers = self._shared.setdefault(index, {})
        buffers[self.rank] = memory
        self._sockets.send(_Record.SHARED_BUFFER, index, nbytes, descriptor)
        os.close(descriptor)
        self._sockets.wait_for(buffers.__contains__, "Allocating shared memory")
        return memory

    def _views_of(self, flat: Tensor) -> list[Tensor] | None:
        """Return ``flat`` in the memory of each rank, in rank order; None if ``flat`` is not in a shared buffer."""
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
        """Return for each peer its slice of ``flat``, in this rank's memory and in its own; None as ``_views_of``."""
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
        index = self._staging_index.get(send.data_ptr())
        if index is None:
            return self._announced(_Operation.REDUCE_SCATTER, send, self._inner.reduce_scatter(request))

        def read(transfers: dict[int, _Transfer]) -> None:
            sources = []
            for rank in range(self.world_size):
                if rank == self.rank:
                    whole = send
                else:
                    whole = self._staging[rank, transfers[rank].staging].view(send.dtype)[: request.numel]
                sources.append(own_slice(whole, self.rank, self.world_size))
            request.sum_(sources)

        return _PeerRead(self, self._start(_Transfer(_Operation.REDUCE_SCATTER, send.nbytes, index)), read)

    def all_gather(self, flat: Tensor) -> Pending:
        slices = self._slices_of(flat)
        if slices is None:
            return self._announced(_Operation.ALL_GATHER, flat, self._inner.all_gather(flat))

        def read(_: dict[int, _Transfer]) -> None:
            for target, source in slices:
                # Unlike torch's copy, memmove does not read long targets before it writes them.
                ctypes.memmove(target.data_ptr(), source.data_ptr(), target.nbytes)

        return _PeerRead(self, self._start(_Transfer(_Operation.ALL_GATHER, flat.nbytes)), read)

    def broadcast(self, tensor: Tensor) -> Pending:
        views = self._views_of(tensor) if tensor.device.type == "cpu" and tensor.is_contiguous() else None
        if views is None:
            return self._announced(_Operation.BROADCAST, tensor, self._inner.broadcast(tensor))

        def read(_: dict[int, _Transfer]) -> None:
            if self.rank != 0:
                tensor.copy_(views[0])
                pages.leave_shared(views[0])  # the whole of rank 0's parameters; all-gathers read parts of them

        return _PeerRead(self, self._start(_Transfer(_Operation.BROADCAST, tensor.nbytes)), read)

    def all_reduce(self, block: Tensor) -> Pending:
        if block.device.type != "cpu" or not block.is_contiguous():
            return self._announced(_Operation.ALL_REDUCE, block, self._inner.all_reduce(block))
        if self._all_reduce_buffer is None or self._all_reduce_buffer.nbytes < 2 * block.nbytes:
            self._all_reduce_buffer = self._allocate_shared(max(_ALL_REDUCE_BYTES, 4 * block.nbytes))
        self._sockets.check_open("An all-reduce")  # a forked child would write its parent's buffer
        # All-reduces use the halves in turn. A half is not written again before all peers have started the all-reduce
        # in the other half, and so have read this one.
        start = self._all_reduce_count % 2 * (self._all_reduce_buffer.nbytes // 2)
        self._all_reduce_count += 1
        views = self._views_of(self._all_reduce_buffer[start : start + block.nbytes])
        assert views is not None
        blocks = [view.view(block.dtype).view(block.shape) for view in views]
        blocks[self.rank].copy_(block)
        self.await_started(self._start(_Transfer(_Operation.ALL_REDUCE, block.nbytes), is_read=False))
        block.copy_(blocks[0])
        for other in blocks[1:]:
            block += other
        return Finished()

    def fence(self) -> None:
        self.await_started(self._start(_Transfer(_Operation.FENCE, 0), is_read=False))

    def sum_dtype(self, wire_dtype: torch.dtype, exact_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return exact_dtype if device.type == "cpu" else self._inner.sum_dtype(wire_dtype, exact_dtype, device)

    def scales_sums(self, device: torch.device) -> bool:
        return device.type == "cpu" or self._inner.scales_sums(device)

    def expect_progress(self, device: torch.device) -> None:
        self._inner.expect_progress(device)

    def poll(self, seconds: float) -> bool:
        self._sockets.poll(seconds)
        return True

    def abort(self) -> None:
        self._sockets.abort("this rank was interrupted during a call.")

    def close(self, *, clean: bool) -> None:
        self._sockets.close()
        self._inner.close(clean=clean)

    # The protocol

    def _announced(self, operation: _Operation, tensor: Tensor, transfer: Pending) -> Pending:
        """Return ``transfer``, of the inner transport, which then raises if another rank has started a different one.

        The inner transport itself would wait for it. On other devices than the CPU, the host must not wait here.
        """
        if tensor.device.type != "cpu":
            return transfer
        return _InnerTransfer(self, self._start(_Transfer(operation, tensor.nbytes), is_read=False), transfer)

    def _start(self, transfer: _Transfer, *, is_read: bool = True) -> int:
        """Send STARTED to all peers; return the number of the transfer.

        Args:
            is_read: peers will send READ for it.
        """
        self._last_number += 1
        if is_read:
            for rank in self._peers:
                self._unread[rank].add(self._last_number)
        self._started[self.rank, self._last_number] = transfer
        self._sockets.send(_Record.STARTED, self._last_number, transfer.pack())
        return self._last_number

    def await_started(self, number: int, *, until_sent: bool = True) -> dict[int, _Transfer]:
        """Wait until all peers have started the transfer; return their descriptions of it, by rank.

        Raises:
            RankDesyncError: a peer has started a different transfer.
            RankDesyncError, TimeoutError: as in ``PeerSockets.wait_for``, which has ``until_sent``, too.
        """
        own = self._started[self.rank, number]
        self._sockets.wait_for(
            lambda rank: self._last_started[rank] >= number, f"In {own.operation.with_article}", until_sent=until_sent
        )
        transfers = {rank: self._started[rank, number] for rank in self._peers}
        global_ranks = self._sockets.global_ranks
        for rank, transfer in transfers.items():
            if not transfer.matches(own):
                raise self._sockets.abort_with(
                    desync.RankDesyncError(
                        f"Rank {global_ranks[rank]} has started {transfer}, but rank {global_ranks[self.rank]} has "
                        f"started {own}: they have made different calls, or different numbers of backward passes."
                    )
                )
        for rank in range(self.world_size):
            del self._started[rank, number]
        return transfers

    def has_started(self, number: int) -> bool:
        """Return True if all peers have started the transfer. Does not wait."""
        self._sockets.poll()
        return all(self._last_started[rank] >= number for rank in self._peers)

    def send_read(self, number: int) -> None:
        """Tell all peers that this rank has read their data of the transfer."""
        self._sockets.send(_Record.READ, number)

    def is_released(self, number: int) -> bool:
        """Return True if all peers have read this rank's data of the transfer. Does not wait."""
        self._sockets.poll()
        return not any(number in self._unread[rank] for rank in self._peers)

    def await_release(self, number: int) -> None:
        self._sockets.wait_for(lambda rank: number not in self._unread[rank], "Waiting for the other ranks to read")

    def _on_record(self, rank: int, kind: int, number: int, value: int, descriptor: int | None) -> None:
        if kind == _Record.STARTED:
            self._last_started[rank] = number
            self._started[rank, number] = _Transfer.unpack(value)
        elif kind == _Record.READ:
            self._unread[rank].discard(number)
        elif kind == _Record.STAGING_FREED:
            del self._staging[rank, number]
        else:
            assert descriptor is not None
            try:
                memory = _map(descriptor, value, writable=False)
            finally:
                os.close(descriptor)
            if kind == _Record.SHARED_BUFFER:
                self._shared.setdefault(number, {})[rank] = memory
            else:
                self._staging[rank, number] = memory


class _InnerTransfer(Pending):
    """A transfer of the inner transport that this one has announced to its peers."""

    def __init__(self, transport: SharedMemoryTransport, number: int, transfer: Pending) -> None:
        self._transport = transport
        self._number = number
        self._transfer = transfer
        self._has_started = False

    def done(self) -> bool:
        return self._transfer.done() and (self._has_started or self._transport.has_started(self._number))

    def wait(self) -> None:
        if not self._has_started:
            self._transport.await_started(self._number, until_sent=False)
            self._has_started = True
        self._transfer.wait()


class _PeerRead(Pending):
    """A transfer that reads the peers' memory once all of them have started it.

    Args:
        read: called with the peers' descriptions of the transfer, by rank.
    """

    def __init__(
        self, transport: SharedMemoryTransport, number: int, read: Callable[[dict[int, _Transfer]], None]
    ) -> None:
        self._transport = transport
        self._number = number
        self._read = read
        self._transfers: dict[int, _Transfer] | None = None  # of the peers, once all have started it

    def done(self) -> bool:
        return self._transfers is not None or self._transport.has_started(self._number)

    def wait(self) -> None:
        # until_sent could deadlock: a peer that needs nothing more for this transfer may not handle records for long.
        # If `_read` raises (memory), this may be called again.
        if self._transfers is None:
            self._transfers = self._transport.await_started(self._number, until_sent=False)
        self._read(self._transfers)
        self._transport.send_read(self._number)

    def is_released(self) -> bool:
        return self._transport.is_released(self._number)

    def await_release(self) -> None:
        self._transport.await_release(self._number)


def _allocate(nbytes: int) -> tuple[Tensor, int]:
    """Return zeroed memory, as bytes, and a read-only descriptor of it for the peers."""
    descriptor = os.memfd_create("shardadam", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        memory = _map(descriptor, nbytes, writable=True)
        with suppress(OSError):  # before Linux 5.1; peers still get a read-only descriptor
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        return memory, os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(descriptor)


def _map(descriptor: int, nbytes: int, *, writable: bool) -> Tensor:
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    # A mapping needs no descriptor, but Python keeps one open unless trackfd is False.
    options: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    memory = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=access, **options)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of read-only memory
        return torch.frombuffer(memory, dtype=torch.uint8)
