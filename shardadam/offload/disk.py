# SPDX-License-Identifier: Apache-2.0
"""State in files, read ahead and written behind by two threads through two buffers.

Note: blocks of two buckets
    Files are read and written in whole blocks, and the state of a bucket seldom ends with one. So a bucket is read with
    the bytes of its neighbours in its first and last blocks, and written with them. What the neighbours have written
    there since is in ``_edges``: one thread writes all buckets, and keeps the blocks that it has written last.

Note: a buffer that is written and read at once
    While one bucket is updated in its buffer, the other buffer is written to the file and the next bucket read into it.
    Both go from its start to its end in chunks, and the read stays behind the write: a disk does both at once.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shardadam.layout import cut
from shardadam.offload.buffers import BufferedStore, Slot
from shardadam.offload.files import StateFile, aligned, memory_of
from shardadam.offload.policies import DiskOffload
from shardadam.offload.regions import (
    BLOCK_BYTES,
    Region,
    tensor_starts,
    views_of,
    whole_blocks,
)
from shardadam.offload.store import Reserved, StoredShard
from shardadam.precision import Format
from shardadam.update import formats

_MOST_WRITTEN_BYTES = 64 * 2**20
_CHUNK_BYTES = 4 * 2**20


class _Progress:
    """How far a buffer has been written to the file, in bytes from its start."""

    def __init__(self) -> None:
        self._done = 0.0
        self._changed = threading.Condition()

    def reach(self, position: float) -> None:
        with self._changed:
            self._done = max(self._done, position)
            self._changed.notify_all()

    def wait_for(self, position: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._done >= position)


@dataclass(slots=True, eq=False, kw_only=True)
class _Slot(Slot):
    """A buffer, what has been read into it, and what is being written from it.

    Args:
        memory: on the host, as long as ``on_device``, and ``on_device`` itself on the CPU; begins at a multiple of
            ``BLOCK_BYTES``. Pinned if there is a device.
        stream: on which the two are copied to each other; None on the CPU.
        reading: into the buffer, the state of ``holds``.
        progress: of ``writing``.
        loaded: the last copy to the device.
    """

    memory: Tensor
    stream: torch.cuda.Stream | None = None
    reading: Future[None] | None = None
    writing: Future[None] | None = None
    progress: _Progress | None = None
    loaded: torch.cuda.Event | None = None


class DiskStore(BufferedStore[_Slot]):
    """State in files of this process (``DiskOffload``)."""

    kind = "disk"

    def __init__(self, offload: DiskOffload) -> None:
        super().__init__()
        self._directory = Path(offload.directory)
        self._reader = ThreadPoolExecutor(1, "shardadam-read")
        self._writer = ThreadPoolExecutor(1, "shardadam-write")
        self._edges: dict[tuple[StateFile, int], bytes] = {}  # see "Note: blocks of two buckets"
        self._written_bytes = 0  # through the mapping, since its pages were given back

    def reserve(self, format: Format, numel: int, device: torch.device) -> Reserved:
        starts, nbytes = tensor_starts(format, numel)
        if nbytes == 0:
            return Reserved(self, format, numel, formats.allocate(format, numel, torch.device("cpu")))
        file = StateFile(self._directory, nbytes)
        state = {
            name: file.bytes[starts[name] : starts[name] + length * dtype.itemsize].view(dtype)
            for name, (length, dtype) in formats.tensors(format, numel).items()
        }
        return Reserved(self, format, numel, state, file)

    def expect(self, order: Sequence[StoredShard]) -> None:
        with self._lock:
            self.settle()
            self._expect(order)

    @contextmanager
    def on_device(self, stored: StoredShard) -> Iterator[dict[str, Tensor] | None]:
        with self._lock:
            slot = self._take(stored)
            assert slot.reading is not None
            slot.reading.result()
            if self.error is not None:
                yield None
                return
            self._fill_next(stored)
            if slot.loaded is not None:
                torch.cuda.current_stream(stored.device).wait_event(slot.loaded)
            yield views_of(stored.regions, slot.on_device)
            copied = _start_copy_back(slot, stored.device)
            slot.progress = _Progress()
            slot.writing = self._writer.submit(self._write, stored, slot.memory, copied, slot.progress)
            file: StateFile = stored.reserved.home
            if not file.is_direct:
                self._writer.submit(self._flush, stored)

    def end_step(self) -> None:
        self.settle()

    def settle(self) -> None:
        if self._is_settled:
            return
        with self._lock:
            for slot in self._all_slots():
                for future in (slot.reading, slot.writing):
                    if future is not None:
                        future.result()
                slot.holds = slot.reading = slot.writing = None
            self._next = {}
            self._edges.clear()
            self._is_settled = True

    def recover(self) -> None:
        self.settle()
        self.error = None

    def read(self, reserved: Reserved, name: str, elements: slice) -> Tensor:
        self.settle()
        target = reserved.state[name][elements]
        if target.numel() == 0:
            return target
        file: StateFile = reserved.home
        starts, _ = tensor_starts(reserved.format, reserved.numel)
        start = starts[name] + elements.start * target.itemsize
        first = start // BLOCK_BYTES * BLOCK_BYTES
        memory = aligned(whole_blocks(start + target.nbytes) - first, pinned=False)
        file.read(memory_of(memory), first)
        if not file.is_direct:
            file.flush(first, memory.numel())
        return memory[start - first : start - first + target.nbytes].view(target.dtype)

    def has_written(self, reserved: Reserved, nbytes: int) -> None:
        self._written_bytes += nbytes
        if self._written_bytes >= _MOST_WRITTEN_BYTES and reserved.home is not None:
            self._written_bytes = 0
            file: StateFile = reserved.home
            file.give_back()

    def close(self) -> None:
        for executor in (self._reader, self._writer):
            executor.shutdown(wait=False, cancel_futures=True)
        self._next = {}
        for slot in self._all_slots():
            if slot.stream is not None:  # the memory goes back to the stream that is current
                torch.cuda.current_stream(slot.on_device.device).wait_stream(slot.stream)
        self._slots = {}

    def _new_slot(self, nbytes: int, device: torch.device) -> _Slot:
        is_cpu = device.type == "cpu"
        memory = aligned(nbytes, pinned=not is_cpu)
        if is_cpu:
            return _Slot(on_device=memory, memory=memory)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))  # which may still use what the memory was before
        on_device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return _Slot(on_device=on_device, memory=memory, stream=stream)

    def _fill(self, stored: StoredShard, slot: _Slot) -> None:
        self._is_settled = False
        slot.holds = stored
        slot.reading = self._reader.submit(self._read, stored, slot, slot.progress)

    # In threads. They raise nothing: an error is remembered.

    def _read(self, stored: StoredShard, slot: _Slot, written: _Progress | None) -> None:
        if self.error is not None:
            return
        file: StateFile = stored.reserved.home
        try:
            content = memory_of(slot.memory)
            for region in stored.regions:
                for start, stop in _chunks(region):
                    if written is not None:
                        written.wait_for(stop)
                    file.read(content[start:stop], region.first_block + start - region.offset)
        except OSError as error:
            self._fail("reading", error)
            return
        if slot.stream is not None:
            with torch.cuda.stream(slot.stream):
                slot.on_device.copy_(slot.memory, non_blocking=True)
                slot.loaded = slot.stream.record_event()

    def _write(self, stored: StoredShard, memory: Tensor, copied: torch.cuda.Event | None, progress: _Progress) -> None:
        try:
            if self.error is None:
                self._write_regions(stored, memory, copied, progress)
        finally:
            progress.reach(math.inf)

    def _write_regions(
        self, stored: StoredShard, memory: Tensor, copied: torch.cuda.Event | None, progress: _Progress
    ) -> None:
        if copied is not None:
            copied.synchronize()
        file: StateFile = stored.reserved.home
        try:
            content = memory_of(memory)
            for region in stored.regions:
                self._join_edges(file, region, content[region.buffer_slice])
                for start, stop in _chunks(region):
                    file.write(content[start:stop], region.first_block + start - region.offset)
                    progress.reach(stop)
        except OSError as error:
            self._fail("writing", error)

    def _join_edges(self, file: StateFile, region: Region, blocks: memoryview) -> None:
        """Put what neighbours have written into the first and the last block; see "Note: blocks of two buckets"."""
        if region.start == region.stop:
            return
        for block in {region.first_block, region.blocks_stop - BLOCK_BYTES}:
            own = slice(max(region.start - block, 0), min(region.stop - block, BLOCK_BYTES))
            if own == slice(0, BLOCK_BYTES):
                continue
            at = block - region.first_block
            theirs = self._edges.get((file, block))
            if theirs is not None:
                blocks[at : at + own.start] = theirs[: own.start]
                blocks[at + own.stop : at + BLOCK_BYTES] = theirs[own.stop :]
            self._edges[file, block] = bytes(blocks[at : at + BLOCK_BYTES])

    def _flush(self, stored: StoredShard) -> None:
        file: StateFile = stored.reserved.home
        try:
            for region in stored.regions:
                file.flush(region.first_block, region.blocks_stop - region.first_block)
        except OSError as error:
            self._fail("writing", error)

    def _fail(self, what: str, error: OSError) -> None:
        if self.error is None:
            number = error.errno or 0
            self.error = f"{what} its state in {self._directory} failed ({os.strerror(number)}, errno {number})"


def _chunks(region: Region) -> Iterator[tuple[int, int]]:
    """Yield the parts of a region that are read or written at once: start and stop in the buffer."""
    yield from cut(region.buffer_slice.start, region.buffer_slice.stop, _CHUNK_BYTES)


def _start_copy_back(slot: _Slot, device: torch.device) -> torch.cuda.Event | None:
    """Copy the updated state to the host, in stream order; return when it is there."""
    if slot.stream is None:
        return None
    slot.stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(slot.stream):
        slot.memory.copy_(slot.on_device, non_blocking=True)
        copied: torch.cuda.Event = slot.stream.record_event()
    return copied
