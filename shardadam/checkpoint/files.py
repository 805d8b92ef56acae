# SPDX-License-Identifier: Apache-2.0
"""The format of a checkpoint: files of plain bytes, ``rank-00000.bin`` and so on, and the manifest ``checkpoint.json``.

Every tensor is cut into items of at most ``ITEM_BYTES``, by positions in memory order; each item has a checksum.
Describes files, writes them, and opens them; ``schema`` checks what a manifest says, ``reader`` reads. Knows no
optimizers, and ranks only as numbers of files.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardadam.checkpoint.disk import on_disk
from shardadam.layout import ITEM_BYTES, cut

MANIFEST = "checkpoint.json"
FORMAT, VERSION = "shardadam checkpoint", 1


MAX_MANIFEST_BYTES = 512 * 2**20
"""Enough for 40 TB of tensors. A larger manifest is not read, so it is not written either."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read, or does not fit what it is loaded into.

    Messages quote names that come from files, so all that a terminal might obey in them is escaped.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(str(message), keep="\n"))


class CheckpointRemovedError(CheckpointError):
    """The checkpoint has been removed since it was chosen, as ``save(keep=...)`` of another job does."""


def printable(text: str, *, keep: str = "") -> str:
    """Returns ``text`` with everything unprintable escaped as in Python ("\\x1b"), except the characters in ``keep``.

    Escape sequences, line breaks and marks that reorder text could otherwise change what a terminal shows.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class Item(NamedTuple):
    """``tensor[start : start + numel]``, 1-D in memory order, lies at byte ``offset`` of file number ``file``."""

    start: int
    numel: int
    file: int
    offset: int
    crc32: int


class StoredObject(NamedTuple):
    """A pickle for ``torch.load``: ``nbytes`` bytes from ``offset`` on in file number ``file``."""

    file: int
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A whole tensor. ``order``: its dimensions, from the outermost to the innermost in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(slots=True)
class StoredTensor:
    spec: TensorSpec
    items: list[Item]
    starts: list[int] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.spec.numel * self.spec.dtype.itemsize


@dataclass(slots=True)
class Index:
    """What one rank wrote, or all ranks. ``files``: name and size in bytes."""

    files: list[tuple[str, int]] = field(default_factory=list)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    objects: dict[str, StoredObject] = field(default_factory=dict)


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.bin"


# Writing


class PartWriter:
    """Writes one rank's file of a checkpoint."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / file_name(rank)
        self._rank = rank
        self._file = on_disk(f"creating {self._path}", create_exclusively, self._path)
        self._offset = 0
        self._writeback_until = 0
        self.index = Index()

    def add_tensor(self, key: str, spec: TensorSpec) -> None:
        """Adds a tensor to the index. Each rank adds all tensors that it writes a part of, and empty ones."""
        known = self.index.tensors.setdefault(key, StoredTensor(spec, []))
        if known.spec != spec:
            raise CheckpointError(f"Two different tensors are called {key!r}: {known.spec} and {spec}.")

    def write(self, key: str, spec: TensorSpec, start: int, flat: Tensor) -> None:
        """Writes ``flat`` (1-D, contiguous, on the CPU) as the elements from ``start`` on."""
        self.add_tensor(key, spec)
        items = self.index.tensors[key].items
        for low, high in cut(start, start + flat.numel(), ITEM_BYTES // spec.dtype.itemsize):
            offset, crc32 = self._append(memory_of(flat[low - start : high - start]), flat)
            items.append(Item(low, high - low, self._rank, offset, crc32))

    def write_object(self, key: str, pickled: bytes) -> None:
        """Writes what ``objects.safely_pickled`` returned."""
        offset, crc32 = self._append(memoryview(pickled), pickled)
        self.index.objects[key] = StoredObject(self._rank, offset, len(pickled), crc32)

    def close(self) -> Index:
        """Returns the index once everything is on the disk."""
        for low, high in cut(0, self._offset, _WAIT_BYTES):  # one call for all would look as if the disk hung
            if not on_disk(f"writing {self._path}", _wait_for_writeback, self._file, low, high):
                break
        on_disk(f"fsync of {self._path}", os.fsync, self._file)
        on_disk(f"closing {self._path}", os.close, self._file)
        self._file = -1
        self.index.files = [(self._path.name, self._offset)]
        return self.index

    def abandon(self) -> None:
        if self._file >= 0:
            with suppress(OSError):
                on_disk(f"closing {self._path}", os.close, self._file)
            self._file = -1

    def _append(self, content: memoryview, owner: object) -> tuple[int, int]:
        """Appends ``content``, which is memory of ``owner``; returns its offset and checksum."""
        offset, crc32 = self._offset, zlib.crc32(content)
        for low, high in cut(0, len(content), ITEM_BYTES):  # one call for a large object would look as if the disk hung
            on_disk(f"writing {self._path}", _write_all, self._file, content[low:high], owner)
        self._offset += len(content)
        if self._offset - self._writeback_until >= ITEM_BYTES:
            _start_writeback(self._file, self._writeback_until, self._offset)
            self._writeback_until = self._offset
        return offset, crc32


def _write_all(descriptor: int, content: memoryview, owner: object) -> None:
    """``owner`` is an argument so that a call that hangs keeps the memory."""
    written = 0
    while written < len(content):
        written += os.write(descriptor, content[written:])


def _start_writeback(descriptor: int, start: int, stop: int) -> None:
    """Asks Linux to start writing these bytes to the disk now. Otherwise it would start at the fsync, after everything
    else (``benchmarks/checkpoint.py``). Guarantees nothing; fsync does.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(stop - start), _SYNC_FILE_RANGE_WRITE)


def _wait_for_writeback(descriptor: int, start: int, stop: int) -> bool:
    """Waits until Linux has written these bytes; returns False where it cannot. Guarantees nothing; fsync does.

    Raises:
        OSError: they could not be written. The fsync would not tell it again.
    """
    if _sync_file_range is None:
        return False
    size, flags = ctypes.c_int64(stop - start), _SYNC_FILE_RANGE_WAIT
    if _sync_file_range(descriptor, ctypes.c_int64(start), size, flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
        raise OSError(number, os.strerror(number))
    return False


_sync_file_range: Any = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2
_SYNC_FILE_RANGE_WAIT = 7  # WAIT_BEFORE | WRITE | WAIT_AFTER
_WAIT_BYTES = 16 * ITEM_BYTES


def memory_of(flat: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor on the CPU, without a copy. The tensor must outlive them."""
    nbytes = flat.numel() * flat.element_size()
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(flat.data_ptr())).cast("B")


def merge(parts: Sequence[Index]) -> Index:
    """Merges the indices of all ranks.

    Raises:
        CheckpointError: items are missing or overlap.
    """
    merged = Index()
    for part in parts:
        merged.files += part.files
        merged.objects.update(part.objects)
        for key, tensor in part.tensors.items():
            known = merged.tensors.setdefault(key, StoredTensor(tensor.spec, []))
            if known.spec != tensor.spec:
                raise CheckpointError(
                    f"{key} is {known.spec} on one rank and {tensor.spec} on another, expected the same."
                )
            known.items += tensor.items
    for key, tensor in merged.tensors.items():
        tensor.items.sort()
        check_whole(key, tensor)
    return merged


def check_whole(key: str, tensor: StoredTensor) -> None:
    """Raises CheckpointError unless the items make up the tensor."""
    end = 0
    for item in tensor.items:
        if item.start != end or item.numel < 1:
            raise CheckpointError(f"{key}: found an item at element {item.start}, expected one at {end}")
        end += item.numel
    if end != tensor.spec.numel:
        raise CheckpointError(f"{key}: found items up to element {end}, expected {tensor.spec.numel}")


def write_durably(path: Path, text: str, *, through: Path) -> None:
    """Replaces the file by one with this text. A crash leaves the old file or the new one, whole.

    Args:
        through: a new file on the same file system, which becomes ``path``.
    """

    def write() -> None:
        with open(create_exclusively(through), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(through, path)

    on_disk(f"writing {path}", write)


def manifest_text(content: Mapping[str, Any]) -> str:
    """Raises CheckpointError if the manifest would be larger than what is read."""
    content = json.loads(json.dumps(content))  # as a reader finds it: no tuples, all keys are texts
    text = json.dumps(
        {"format": FORMAT, "version": VERSION, "sha256": digest(content), "content": content}, separators=(",", ":")
    )
    if len(text) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"The manifest would have {len(text)} bytes, expected at most {MAX_MANIFEST_BYTES}. Pass less as extra."
        )
    return text


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def index_to_json(index: Index) -> dict[str, Any]:
    return {
        "files": index.files,
        "tensors": {
            key: {
                "dtype": str(tensor.spec.dtype).removeprefix("torch."),
                "shape": tensor.spec.shape,
                "order": tensor.spec.order,
                "items": tensor.items,
            }
            for key, tensor in index.tensors.items()
        },
        "objects": index.objects,
    }


# Opening files


def open_regular(path: Path) -> tuple[int, int]:
    """Opens a file to read it; returns its descriptor and its size in bytes.

    Refuses everything but a regular file before it opens it: a FIFO would block, and a device might act.

    Raises:
        OSError: it is no regular file, is missing, or cannot be opened.
    """
    _check_regular(path, os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        found = os.fstat(descriptor)
        _check_regular(path, found)  # it may have been replaced in between
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, found.st_size


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(found.st_mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file", str(path))


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """Reads a whole file.

    Raises:
        OSError: as ``open_regular``; or it is larger than ``max_bytes``.
    """
    descriptor, nbytes = open_regular(path)
    with open(descriptor, "rb") as file:
        if nbytes > max_bytes:
            raise OSError(errno.EFBIG, f"it has {nbytes} bytes, expected at most {max_bytes}", str(path))
        return file.read(nbytes)


def create_exclusively(path: Path) -> int:
    """Creates a file that did not exist, not even as a link, and returns its descriptor for writing.

    Raises:
        OSError: it exists, or cannot be created.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
