# SPDX-License-Identifier: Apache-2.0
"""The format of a checkpoint: files of plain bytes, ``rank-00000.bin`` and so on, and the manifest ``checkpoint.json``.

Every tensor is cut into items of at most ``ITEM_BYTES``, by positions in memory order; each item has a checksum. Only
objects are unpickled, by torch.load with ``weights_only=True``, which imports nothing. Knows no optimizers, and ranks
only as numbers of files.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import json
import os
import pickle
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
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


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read, or does not fit what it is loaded into."""


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
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = on_disk(f"creating {self._path}", os.open, self._path, flags, 0o666)
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
        """Writes what ``safely_pickled`` returned."""
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
        on_disk(f"writing {self._path}", _write_all, self._file, content, owner)
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


def safely_pickled(key: str, value: Any) -> bytes:
    """Pickles what ``torch.load`` reads without importing anything: tensors, numbers, texts, and lists, tuples, sets
    and dicts of them.

    Raises:
        CheckpointError: ``value`` contains something else.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{key} contains something that could only be loaded by running code, so it is not saved: "
            f"{_unpicklers_reason(error)}. Expected only tensors, numbers, texts, lists, tuples and dicts."
        ) from error
    return buffer.getvalue()


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
        _check_whole(key, tensor)
    return merged


def _check_whole(key: str, tensor: StoredTensor) -> None:
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
        with through.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(through, path)

    on_disk(f"writing {path}", write)


def manifest_text(content: Mapping[str, Any]) -> str:
    content = json.loads(json.dumps(content))  # as a reader finds it: no tuples, all keys are texts
    return json.dumps(
        {"format": FORMAT, "version": VERSION, "sha256": _digest(content), "content": content}, separators=(",", ":")
    )


def _digest(content: Any) -> str:
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


def index_from_json(found: Any) -> Index:
    """Raises KeyError, TypeError or ValueError if ``found`` is not what ``index_to_json`` returns."""
    files = [(_name(name), _count(nbytes)) for name, nbytes in found["files"]]
    tensors = {}
    for key, entry in found["tensors"].items():
        dtype = getattr(torch, entry["dtype"])
        shape, order = tuple(map(_count, entry["shape"])), tuple(map(_count, entry["order"]))
        if not isinstance(dtype, torch.dtype) or sorted(order) != list(range(len(shape))):
            raise ValueError(f"{key}: dtype {entry['dtype']}, shape {shape}, order {order}")
        items = [Item(*map(_count, item)) for item in entry["items"]]
        tensors[key] = StoredTensor(TensorSpec(dtype, shape, order), items, [item.start for item in items])
    objects = {key: StoredObject(*map(_count, entry)) for key, entry in found["objects"].items()}
    return Index(files, tensors, objects)


def _check_content(content: Mapping[str, Any]) -> None:
    for name, kind in {"step": int, "world_size": int, "aliases": dict, "extras": list}.items():
        if not isinstance(content[name], kind):
            raise ValueError(f"{name}: found {content[name]!r}, expected {kind.__name__}")
    optimizer = content.get("optimizer")
    if optimizer is not None:
        for name, kind in {"groups": list, "skipped_steps": int, "parameters": dict}.items():
            if not isinstance(optimizer[name], kind):
                raise ValueError(f"{name}: found {optimizer[name]!r}, expected {kind.__name__}")


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"found {value!r}, expected a whole number of 0 or more")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"rank-\d{5,}\.bin", value):
        raise ValueError(f"found the file name {value!r}, expected rank-NNNNN.bin")
    return value


# Reading


class Reader:
    """Reads one checkpoint, and verifies what it reads.

    ``content`` is the manifest; ``bytes_read`` counts the bytes of data read so far.

    Args:
        path: the directory that holds ``checkpoint.json``.

    Raises:
        CheckpointError: it is no checkpoint, or is incomplete or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0
        self._descriptors: dict[int, int] = {}
        self._buffer = bytearray()
        self._landing = memoryview(bytearray(ITEM_BYTES))
        self.content = self._read_manifest()
        try:
            self.index = index_from_json(self.content["index"])
            _check_content(self.content)
            for key, tensor in self.index.tensors.items():
                _check_whole(key, tensor)
                for item in tensor.items:
                    self._check_extent(key, item.file, item.offset, item.numel * tensor.spec.dtype.itemsize)
            for key, stored in self.index.objects.items():
                self._check_extent(key, stored.file, stored.offset, stored.nbytes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path / MANIFEST} is damaged: {error}. {self._remedy()}") from error
        self._check_files()

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read_(self, key: str, start: int, target: Tensor) -> None:
        """Fills ``target`` (1-D, contiguous, on the CPU, of the stored dtype) with the elements from ``start`` on."""
        tensor = self.index.tensors[key]
        itemsize = tensor.spec.dtype.itemsize
        memory, stop = memory_of(target), start + target.numel()
        position = bisect_right(tensor.starts, start) - 1
        while start < stop:
            item = tensor.items[position]
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

    def read_object(self, key: str) -> Any:
        stored = self.index.objects[key]
        content = memoryview(bytearray(stored.nbytes))
        self._read_verified(key, stored.file, stored.offset, stored.crc32, content)
        try:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: {key} contains something that could only be loaded by running code: "
                f"{_unpicklers_reason(error)}. It is not loaded. Do not load it by other means unless you trust its "
                "author."
            ) from error

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
        self._read_verified(f"{key}, from element {item.start}", item.file, item.offset, item.crc32, into)

    def _read_verified(self, what: str, file: int, offset: int, crc32: int, into: memoryview) -> None:
        name = self.index.files[file][0]
        done = 0
        try:
            if file not in self._descriptors:
                if len(self._descriptors) >= 64:
                    self.close()
                flags = os.O_RDONLY | os.O_CLOEXEC
                self._descriptors[file] = on_disk(f"opening {self.path / name}", os.open, self.path / name, flags)
            while done < len(into):
                # Not into ``into``: a call that hangs may go on when others use that memory again.
                landing = self._landing[: len(into) - done]
                count = on_disk(
                    f"reading {self.path / name}", os.preadv, self._descriptors[file], [landing], offset + done
                )
                if count == 0:
                    raise CheckpointError(f"{self.path / name} is damaged: it ends within {what}. {self._remedy()}")
                into[done : done + count] = landing[:count]
                done += count
        except OSError as error:
            raise CheckpointError(f"{self.path / name} cannot be read: {error.strerror}.") from error
        self.bytes_read += len(into)
        if zlib.crc32(into) != crc32:
            raise CheckpointError(
                f"{self.path / name} is damaged: the {len(into)} bytes at {offset} ({what}) do not match their "
                f"checksum. {self._remedy()}"
            )

    def _scratch(self, nbytes: int) -> memoryview:
        if len(self._buffer) < nbytes:
            self._buffer = bytearray(nbytes)
        return memoryview(self._buffer)[:nbytes]

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        try:
            found = json.loads(path.read_bytes())
            if found["format"] != FORMAT or found["sha256"] != _digest(found["content"]):
                raise ValueError("its content does not match its checksum")
            if found["version"] != VERSION:
                raise CheckpointError(
                    f"{path} has format version {found['version']}, expected {VERSION}. Update shardadam."
                )
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.path} is not a whole checkpoint: {MANIFEST} is missing. {self._remedy()}"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}. {self._remedy()}") from error
        content: dict[str, Any] = found["content"]
        return content

    def _check_extent(self, key: str, file: int, offset: int, nbytes: int) -> None:
        if file >= len(self.index.files) or offset + nbytes > self.index.files[file][1]:
            raise ValueError(f"{key} ends beyond its file")

    def _check_files(self) -> None:
        for name, nbytes in self.index.files:
            try:
                found = os.stat(self.path / name).st_size
            except OSError as error:
                raise CheckpointError(
                    f"{self.path} is not whole: {name} cannot be read ({error.strerror}). {self._remedy()}"
                ) from error
            if found != nbytes:
                raise CheckpointError(
                    f"{self.path / name} is damaged: found {found} bytes, expected {nbytes}. {self._remedy()}"
                )

    def _remedy(self) -> str:
        return "Copy it again from an intact source, or load another checkpoint by its own directory."


def _unpicklers_reason(error: BaseException) -> str:
    """Returns why torch.load refused it, without its advice to unpickle without restrictions."""
    text = str(error)
    found = re.search(
        r"Unsupported (?:global|class|operand)[^.\n]*\S*|GLOBAL \S+|[A-Z_]+ \S+ was not an allowed[^.\n]*", text
    )
    return found.group(0) if found else next((line for line in text.splitlines() if line.strip()), repr(error))
