# SPDX-License-Identifier: Apache-2.0
"""Checksums of what a checkpoint stores, and the memory of tensors as bytes. Knows no files.

Note: sums of rows and columns
    zlib's CRC-32 reads about 4 GB/s, no faster than a disk; torch adds integers several times as fast
    (``benchmarks/checkpoint.py``). So the bytes of an item are taken as little-endian words of 8 bytes, 512 in a row,
    with zeros after the last one. The checksum is the CRC-32 of the sums of all columns, and then of all rows, each
    modulo 2^64. A change within one row changes the sum of its column, whatever else that row has; rows that are
    swapped, doubled or shifted change the order of sums of rows.
"""

from __future__ import annotations

import ctypes
import zlib
from typing import Protocol

import torch
from torch import Tensor

ROW_WORDS = 512
ROW_BYTES = 8 * ROW_WORDS
CHUNK_BYTES = 63 * ROW_BYTES
"""Small enough to stay in a core's cache, and the most that torch adds in one thread."""


class Chunk:
    """Memory for ``CHUNK_BYTES`` bytes: as ``bytes``, and as words of 8 bytes, a row of 512 after the other."""

    def __init__(self) -> None:
        self.words = torch.empty(CHUNK_BYTES // ROW_BYTES, ROW_WORDS, dtype=torch.int64, device="cpu")
        self.bytes = memory_of(self.words)


class Checksum(Protocol):
    """The checksum of bytes that are added chunk after chunk. All but the last have ``CHUNK_BYTES`` bytes."""

    def add(self, chunk: Chunk, nbytes: int) -> None:
        """Adds the first ``nbytes`` bytes of the chunk. May overwrite the others."""

    def value(self) -> int: ...


class Crc32:
    """The CRC-32 of all bytes: of objects, and of everything in checkpoints up to version 3 of the format."""

    def __init__(self) -> None:
        self._value = 0

    def add(self, chunk: Chunk, nbytes: int) -> None:
        self._value = zlib.crc32(chunk.bytes[:nbytes], self._value)

    def value(self) -> int:
        return self._value


class SumsChecksum:
    """See "Note: sums of rows and columns"."""

    def __init__(self) -> None:
        self._columns = torch.zeros(ROW_WORDS, dtype=torch.int64, device="cpu")
        self._rows: list[Tensor] = []

    def add(self, chunk: Chunk, nbytes: int) -> None:
        rows = -(-nbytes // ROW_BYTES)
        chunk.bytes[nbytes : rows * ROW_BYTES] = bytes(rows * ROW_BYTES - nbytes)
        words = chunk.words[:rows]
        self._columns += words.sum(dim=0)
        self._rows.append(words.sum(dim=1))

    def value(self) -> int:
        sums = torch.cat([self._columns, *self._rows])
        return zlib.crc32(memory_of(sums))


def sums_checksum(content: memoryview) -> int:
    """Returns the ``SumsChecksum`` of ``content``."""
    checksum, chunk = SumsChecksum(), Chunk()
    for start in range(0, len(content), CHUNK_BYTES):
        part = content[start : start + CHUNK_BYTES]
        chunk.bytes[: len(part)] = part
        checksum.add(chunk, len(part))
    return checksum.value()


def memory_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor on the CPU, without a copy. The tensor must outlive them."""
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")
