# SPDX-License-Identifier: Apache-2.0
"""Reads one checkpoint, and verifies what it reads: the manifest by its schema, everything else by its checksum.

Knows no optimizers. Reads regular files only, and never more at once than an item or an object.
"""

from __future__ import annotations

import errno
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.boxes import BoxSpec, Region, Run, common
from shardadam.checkpoint.checksums import CHUNK_BYTES, Checksum, Chunk, Crc32, SumsChecksum, memory_of
from shardadam.checkpoint.directory import newest
from shardadam.checkpoint.disk import on_disk
from shardadam.checkpoint.files import (
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    VERSIONS,
    CheckpointError,
    CheckpointRemovedError,
    Item,
    StoredBox,
    open_regular,
    read_regular,
)
from shardadam.checkpoint.objects import ARCHIVE_START, check_object, unpickled
from shardadam.checkpoint.schema import MODEL_PREFIX, Manifest, checksum_of, manifest_of, parsed, shown
from shardadam.layout import ITEM_BYTES, cut

MAX_CHOICES = 10
"""How often a checkpoint is chosen anew, if the chosen one is removed each time."""

_MAX_OPEN = 64
_LARGE_OBJECT_BYTES = 2**28
_CALL_BYTES = ITEM_BYTES // CHUNK_BYTES * CHUNK_BYTES
"""How much is read in one call at most: whole chunks."""
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class Reader:
    """Reads one checkpoint, and verifies what it reads.

    ``manifest`` is checked; ``checksum`` tells manifests apart; ``bytes_read`` counts the bytes of data read so far.
    Files stay open, up to 64 of them: they can be read to the end even if the checkpoint is removed.

    Args:
        path: the directory that holds ``checkpoint.json``.

    Raises:
        CheckpointRemovedError: the directory does not exist (any more).
        CheckpointError: it is no checkpoint, or is incomplete or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self._descriptors: dict[int, int] = {}
        self._buffer = bytearray()
        self._item_checksum: type[Checksum] = SumsChecksum
        self.checksum, self.manifest = self._read_manifest()
        self.index = self.manifest.index
        try:
            for file in range(len(self.index.files)):
                self._check_file(file)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def read_(self, key: str, box: BoxSpec, start: int, target: Tensor) -> None:
        """Fills ``target`` (1-D, contiguous, on the CPU, of the stored dtype) with the elements from ``start`` on of a
        box of the tensor, in the box's memory order. The tensor may be stored as any other boxes.
        """
        tensor = self.index.tensors[key]
        for stored in tensor.boxes:
            if stored.spec == box:
                self.read_stored_(key, stored, start, target)
                return
        run = Run(box, start, target)
        for stored in tensor.boxes:
            for item in items_within(stored, run.regions):
                run.copy_(Run(stored.spec, item.start, self.read_item(key, item)))

    def read_stored_(self, key: str, box: StoredBox, start: int, target: Tensor) -> None:
        """As ``read_``, of a box that is stored."""
        itemsize = self.index.tensors[key].spec.dtype.itemsize
        memory, stop = memory_of(target), start + target.numel()
        position = bisect_right(box.starts, start) - 1
        while start < stop:
            item = box.items[position]
            end = min(stop, item.start + item.numel)
            into = memory[: (end - start) * itemsize]
            if end - start == item.numel:
                self._read_item(key, item, itemsize, into)
            else:
                whole = self._scratch(item.numel * itemsize)
                self._read_item(key, item, itemsize, whole)
                begin = (start - item.start) * itemsize
                into[:] = whole[begin : begin + len(into)]
            memory, start, position = memory[len(into) :], end, position + 1

    def read_item(self, key: str, item: Item) -> Tensor:
        """Returns an item of a tensor, 1-D."""
        dtype = self.index.tensors[key].spec.dtype
        flat = torch.empty(item.numel, dtype=dtype, device="cpu")
        self._read_item(key, item, dtype.itemsize, memory_of(flat))
        return flat

    def read_object(self, key: str) -> Any:
        """Returns an object, of which ``objects.check_object`` approves."""
        stored = self.index.objects[key]
        if stored.nbytes > _LARGE_OBJECT_BYTES:  # the model's own may be: the rest is small
            start = bytearray(len(ARCHIVE_START))
            self._read(key, stored.file, stored.offset, memoryview(start), Crc32())
            if start != ARCHIVE_START or not key.startswith(MODEL_PREFIX):
                raise CheckpointError(
                    f"{self.path} is damaged: {key} has {stored.nbytes} bytes, expected what torch.save wrote, or at "
                    f"most {_LARGE_OBJECT_BYTES} bytes. {self._remedy()}"
                )
        try:
            content = bytearray(stored.nbytes)
            self._read_verified(key, stored.file, stored.offset, memoryview(content), Crc32(), stored.crc32)
            value = unpickled(f"{self.path}: {key}", content)
        except MemoryError as error:
            raise CheckpointError(f"{self.path}: {key} ({stored.nbytes} bytes) does not fit in memory.") from error
        optimizer = self.manifest.optimizer
        try:
            check_object(key, value, groups=len(optimizer.groups) if optimizer else 0)
        except ValueError as error:
            raise CheckpointError(f"{self.path} is damaged: {key}: {error}. {self._remedy()}") from error
        return value

    def verify(self) -> Iterator[tuple[str, int]]:
        """Reads everything; yields key and bytes of each item. Raises CheckpointError at the first damage."""
        for key, tensor in self.index.tensors.items():
            for item in tensor.items:
                nbytes = item.numel * tensor.spec.dtype.itemsize
                self._read_item(key, item, tensor.spec.dtype.itemsize, self._scratch(nbytes))
                yield key, nbytes
        for key, stored in self.index.objects.items():
            self.read_object(key)
            yield key, stored.nbytes

    def _read_item(self, key: str, item: Item, itemsize: int, into: memoryview) -> None:
        what, checksum = f"{key}, from element {item.start}", self._item_checksum()
        self._read_verified(what, item.file, item.offset, into, checksum, item.checksum)

    def _read_verified(
        self, what: str, file: int, offset: int, into: memoryview, checksum: Checksum, expected: int
    ) -> None:
        for start, stop in cut(0, len(into), _CALL_BYTES):  # one call for a large object would look as if the disk hung
            self._read(what, file, offset + start, into[start:stop], checksum)
        if checksum.value() != expected:
            path = self.path / self.index.files[file][0]
            raise CheckpointError(
                f"{path} is damaged: the {len(into)} bytes at {offset} ({what}) do not match their checksum. "
                f"{self._remedy()}"
            )

    def _read(self, what: str, file: int, offset: int, into: memoryview, checksum: Checksum) -> None:
        """Fills ``into``, and adds what is read to ``checksum``."""
        path = self.path / self.index.files[file][0]
        if file not in self._descriptors:
            if len(self._descriptors) >= _MAX_OPEN:
                self.close()
            self._check_file(file)
        call = _ReadCall(self._descriptors[file], offset, into, checksum)
        try:
            on_disk(f"reading {path}", call)
        except OSError as error:
            raise self._unreadable(path, error) from error
        finally:
            call.abandon()
        if call.done < len(into):
            raise CheckpointError(f"{path} is damaged: it ends within {what}. {self._remedy()}")
        self.bytes_read += len(into)

    def _scratch(self, nbytes: int) -> memoryview:
        if len(self._buffer) < nbytes:
            self._buffer = bytearray(nbytes)
        return memoryview(self._buffer)[:nbytes]

    def _read_manifest(self) -> tuple[str, Manifest]:
        path = self.path / MANIFEST
        try:
            text = on_disk(f"reading {path}", lambda: read_regular(path, max_bytes=MAX_MANIFEST_BYTES))
        except OSError as error:
            raise self._unreadable(path, error) from error
        try:
            found = parsed(text)
            if type(found) is not dict or found.get("format") != FORMAT or "content" not in found:
                raise ValueError("it is no manifest of a checkpoint")
            checksum = checksum_of(found["content"])
            if found.get("sha256") != checksum:
                raise ValueError("its content does not match its checksum")
            version: Any = found.get("version")
            manifest = manifest_of(found["content"]) if type(version) is int and version in VERSIONS else None
        except MemoryError as error:
            raise CheckpointError(f"{path} ({len(text)} bytes) does not fit in memory.") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}. {self._remedy()}") from error
        if manifest is None:
            raise CheckpointError(
                f"{path} has format version {shown(version)}, expected {VERSIONS[-1]}. Update shardadam."
            )
        self._item_checksum = SumsChecksum if version >= 4 else Crc32
        return checksum, manifest

    def _check_file(self, file: int) -> None:
        """Opens a file, and checks its size. Keeps it open unless too many are."""
        name, expected = self.index.files[file]
        path = self.path / name
        try:
            descriptor, found = on_disk(f"opening {path}", open_regular, path)
        except OSError as error:
            raise self._unreadable(path, error) from error
        if len(self._descriptors) < _MAX_OPEN:
            self._descriptors[file] = descriptor
        else:
            os.close(descriptor)
        if found != expected:
            raise CheckpointError(f"{path} is damaged: found {found} bytes, expected {expected}. {self._remedy()}")

    def _unreadable(self, path: Path, error: OSError) -> CheckpointError:
        if error.errno in _GONE and not os.path.isdir(self.path):
            return CheckpointRemovedError(
                f"{self.path} does not exist, or has been removed since it was chosen. A job that saves with keep=... "
                "removes older checkpoints. Load again, or raise keep in that job."
            )
        if error.errno == errno.ENOENT and path.name == MANIFEST:
            return CheckpointError(f"{self.path} is not a whole checkpoint: {MANIFEST} is missing. {self._remedy()}")
        if error.errno in _GONE:
            return CheckpointError(
                f"{self.path} is not whole: {path.name} cannot be read ({error.strerror}). {self._remedy()}"
            )
        remedy = "" if isinstance(error, TimeoutError) else f" {self._remedy()}"
        return CheckpointError(f"{path} cannot be read: {error.strerror}.{remedy}")

    def _remedy(self) -> str:
        return "Copy it again from an intact source, or load another checkpoint by its own directory."


class _ReadCall:
    """Reads bytes of a file, in one call to the file system as far as its time limit goes.

    Reads into memory of its own and copies: a call that hangs may go on when others use ``into`` again.
    """

    def __init__(self, descriptor: int, offset: int, into: memoryview, checksum: Checksum) -> None:
        self._descriptor, self._offset, self._into, self._checksum = descriptor, offset, into, checksum
        self._lock, self._is_abandoned = threading.Lock(), False
        self.done = 0

    def __call__(self) -> None:
        """Stops at the end of the file; ``done`` says how much was read."""
        chunk = Chunk()
        while self.done < len(self._into):
            found = self._read(chunk.bytes[: len(self._into) - self.done])
            if len(found) == 0:
                return
            self._checksum.add(chunk, len(found))
            with self._lock:
                if self._is_abandoned:
                    return
                self._into[self.done : self.done + len(found)] = found
                self.done += len(found)

    def abandon(self) -> None:
        """Writes to ``into`` no more."""
        with self._lock:
            self._is_abandoned = True

    def _read(self, landing: memoryview) -> memoryview:
        """Fills ``landing`` as far as the file goes; returns what was filled."""
        filled = 0
        while filled < len(landing):
            count = os.preadv(self._descriptor, [landing[filled:]], self._offset + self.done + filled)
            if count == 0:
                break
            filled += count
        return landing[:filled]


def items_within(box: StoredBox, regions: Sequence[Region]) -> list[Item]:
    """Returns the items of a stored box that have elements of ``regions``, ascending."""
    found: set[int] = set()
    for region, part in product(regions, box.spec.parts):
        shared = common(region, part)
        if shared is None:
            continue
        # Of a region, its first corner comes first in every order of dimensions, and its last corner last.
        last = tuple(at + size - 1 for at, size in zip(shared.offset, shared.shape, strict=True))
        first_item, last_item = (bisect_right(box.starts, box.spec.position(end)) - 1 for end in (shared.offset, last))
        for number in range(first_item, last_item + 1):
            item = box.items[number]
            of_item = box.spec.regions(item.start, item.start + item.numel)
            if number not in found and any(common(shared, one) is not None for one in of_item):
                found.add(number)
    return [box.items[number] for number in sorted(found)]


def open_newest(directory: Path) -> Reader:
    """Opens the newest checkpoint in ``directory``, or ``directory`` itself if it is one. Local.

    If the chosen one is removed before it is open, the one that is the newest then.

    Raises:
        CheckpointError: there is none, or it is incomplete or damaged.
    """
    chosen: list[Path] = []
    while True:
        path = newest(directory)
        try:
            return Reader(path)
        except CheckpointRemovedError:
            if path in chosen or len(chosen) >= MAX_CHOICES:
                raise
            chosen.append(path)
