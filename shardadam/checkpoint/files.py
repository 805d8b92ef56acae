# SPDX-License-Identifier: Apache-2.0
"""The format of a checkpoint: files of plain bytes, ``rank-00000.bin`` and so on, and the manifest ``checkpoint.json``.

A tensor is stored as boxes: one, the whole, unless DTensors of other ranks hold other parts of it. Each box is cut into
items of at most ``ITEM_BYTES``, by positions in its memory order; each item has a checksum. Describes files, writes
them, and opens them; ``schema`` checks what a manifest says, ``reader`` reads. Knows no
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

from shardadam.checkpoint.boxes import BoxSpec, check_tiling, whole_box
from shardadam.checkpoint.checksums import memory_of, sums_checksum
from shardadam.checkpoint.disk import on_disk
from shardadam.layout import ITEM_BYTES, cut

MANIFEST = "checkpoint.json"
FORMAT = "shardadam checkpoint"
VERSIONS = (1, 2, 3, 4)
"""Of the format; all are read, the last one is written. 2: tensors may be stored as several boxes. 3: there may be
averages of weights. 4: the checksum of an item is ``checksums.SumsChecksum``; it was the CRC-32."""


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
    """``box[start : start + numel]``, 1-D in memory order, lies at byte ``offset`` of file number ``file``."""

    start: int
    numel: int
    file: int
    offset: int
    checksum: int


class StoredObject(NamedTuple):
    """A pickle for ``torch.load``: ``nbytes`` bytes from ``offset`` on in file number ``file``."""

    file: int
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A whole tensor.

    Args:
        order: its dimensions, from the outermost to the innermost in memory.
        block_numel: if it is not 1, there is one element for each block of so many elements of each box. Only parts
            have such tensors; ``merge`` makes them 1-D.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...]
    block_numel: int = 1

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(slots=True)
class StoredBox:
    """``starts``: those of the items."""

    spec: BoxSpec
    items: list[Item]
    starts: list[int] = field(default_factory=list)


@dataclass(slots=True)
class StoredTensor:
    """``boxes``: ascending by offset."""

    spec: TensorSpec
    boxes: list[StoredBox]

    @property
    def nbytes(self) -> int:
        return self.spec.numel * self.spec.dtype.itemsize

    @property
    def items(self) -> list[Item]:
        """The items of all boxes."""
        return self.boxes[0].items if len(self.boxes) == 1 else [item for box in self.boxes for item in box.items]

    @property
    def is_plain(self) -> bool:
        """Whether it is one box, the whole, which needs no description of its own."""
        return len(self.boxes) == 1 and self.boxes[0].spec == whole_box(self.spec.shape, self.spec.order)


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

    def add_box(self, key: str, spec: TensorSpec, box: BoxSpec) -> StoredBox:
        """Adds a box of a tensor to the index. Each rank adds all boxes that it writes a part of, and empty tensors."""
        known = self.index.tensors.setdefault(key, StoredTensor(spec, []))
        if known.spec != spec:
            raise CheckpointError(f"Two different tensors are called {key!r}: {known.spec} and {spec}.")
        for stored in known.boxes:
            if stored.spec == box:
                return stored
        known.boxes.append(StoredBox(box, []))
        return known.boxes[-1]

    def write(self, key: str, spec: TensorSpec, box: BoxSpec, start: int, flat: Tensor) -> None:
        """Writes ``flat`` (1-D, contiguous, on the CPU) as the elements of the box from ``start`` on."""
        items = self.add_box(key, spec, box).items
        for low, high in cut(start, start + flat.numel(), ITEM_BYTES // spec.dtype.itemsize):
            content = memory_of(flat[low - start : high - start])
            checksum = sums_checksum(content)
            items.append(Item(low, high - low, self._rank, self._append(content, flat), checksum))

    def write_object(self, key: str, pickled: bytes) -> None:
        """Writes what ``objects.safely_pickled`` returned."""
        offset = self._append(memoryview(pickled), pickled)
        self.index.objects[key] = StoredObject(self._rank, offset, len(pickled), zlib.crc32(pickled))

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

    def _append(self, content: memoryview, owner: object) -> int:
        """Appends ``content``, which is memory of ``owner``; returns its offset."""
        offset = self._offset
        for low, high in cut(0, len(content), ITEM_BYTES):  # one call for a large object would look as if the disk hung
            on_disk(f"writing {self._path}", _write_all, self._file, content[low:high], owner)
        self._offset += len(content)
        if self._offset - self._writeback_until >= ITEM_BYTES:
            _start_writeback(self._file, self._writeback_until, self._offset)
            self._writeback_until = self._offset
        return offset


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


def merge(parts: Sequence[Index]) -> Index:
    """Merges the indices of all ranks, in rank order.

    Raises:
        CheckpointError: items or boxes are missing, or several ranks wrote the same elements.
    """
    merged = Index()
    for rank, part in enumerate(parts):
        merged.files += part.files
        merged.objects.update(part.objects)
        for key, tensor in part.tensors.items():
            known = merged.tensors.setdefault(key, StoredTensor(tensor.spec, []))
            if known.spec != tensor.spec:
                first = next(first for first, other in enumerate(parts) if key in other.tensors)
                raise CheckpointError(
                    f"{key}: found a tensor of {described(known.spec)} on rank {first} and of {described(tensor.spec)} "
                    f"on rank {rank}, expected the same. {DISTINCT_NAMES}"
                )
            boxes = {box.spec: box for box in known.boxes}
            for box in tensor.boxes:
                if box.spec in boxes:
                    boxes[box.spec].items += box.items
                else:
                    known.boxes.append(box)
    for key, tensor in merged.tensors.items():
        tensor.boxes.sort(key=lambda box: box.spec.offset)
        for box in tensor.boxes:
            box.items.sort()
        try:
            check_whole(key, tensor)
        except CheckpointError as error:
            ranks = sorted({item.file for item in tensor.items})
            raise CheckpointError(f"{error}. It was written by ranks {ranks}. {DISTINCT_NAMES}") from error
        if tensor.spec.block_numel > 1:
            merged.tensors[key] = _one_dimensional(tensor)
    return merged


DISTINCT_NAMES = (
    "Different tensors need different names: give each pipeline stage, and each expert, its names in the whole model, "
    "not its own ones such as '0.weight'."
)


def described(spec: TensorSpec) -> str:
    return f"shape {spec.shape} and dtype {str(spec.dtype).removeprefix('torch.')}"


def _one_dimensional(tensor: StoredTensor) -> StoredTensor:
    """Returns the tensor with its boxes one after the other."""
    boxes, end = [], 0
    for box in tensor.boxes:
        shape = (-(-box.spec.numel // tensor.spec.block_numel),)
        boxes.append(StoredBox(BoxSpec((end,), shape, (0,)), box.items))
        end += shape[0]
    return StoredTensor(TensorSpec(tensor.spec.dtype, (end,), (0,)), boxes)


def check_whole(key: str, tensor: StoredTensor) -> None:
    """Raises CheckpointError unless the items make up the boxes, and the boxes make up the tensor."""
    for box in tensor.boxes:
        end, numel = 0, -(-box.spec.numel // tensor.spec.block_numel)
        for item in box.items:
            if 0 <= item.start < end:
                raise CheckpointError(
                    f"{key}: found two items with element {item.start} of the box at {box.spec.offset}"
                )
            if item.start != end or item.numel < 1:
                raise CheckpointError(f"{key}: found an item at element {item.start}, expected one at {end}")
            end += item.numel
        if end != numel:
            raise CheckpointError(f"{key}: found items up to element {end}, expected {numel}")
    try:
        check_tiling(tensor.spec.shape, (part for box in tensor.boxes for part in box.spec.parts))
    except ValueError as error:
        raise CheckpointError(f"{key}: {error}") from error


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
        {"format": FORMAT, "version": VERSIONS[-1], "sha256": digest(content), "content": content},
        separators=(",", ":"),
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
        "tensors": {key: _tensor_to_json(tensor) for key, tensor in index.tensors.items()},
        "objects": index.objects,
    }


def _tensor_to_json(tensor: StoredTensor) -> dict[str, Any]:
    spec = tensor.spec
    found: dict[str, Any] = {
        "dtype": str(spec.dtype).removeprefix("torch."),
        "shape": spec.shape,
        "order": spec.order,
    }
    if spec.block_numel > 1:
        found["block_numel"] = spec.block_numel
    if tensor.is_plain:
        return found | {"items": tensor.boxes[0].items}
    boxes = [
        {"offset": box.spec.offset, "shape": box.spec.shape, "order": box.spec.order, "items": box.items}
        | ({"runs": box.spec.runs} if box.spec.runs else {})
        for box in tensor.boxes
    ]
    return found | {"boxes": boxes}


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
