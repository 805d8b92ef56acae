# SPDX-License-Identifier: Apache-2.0
"""Nameless files of a fixed size: read and written in whole blocks by threads, and mapped for everything else.

Note: two ways to one file
    A step reads and writes with ``O_DIRECT``, past the page cache. The mapping goes through the page cache. Linux keeps
    both equal as long as they take turns: a direct read first writes back changed pages, a direct write drops pages. So
    no one may use the mapping while reads and writes are under way (``DiskStore.settle``).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardadam.offload.regions import BLOCK_BYTES

_sync_file_range: Any = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
_SYNC_FILE_RANGE_WAIT = 7  # WAIT_BEFORE | WRITE | WAIT_AFTER


class StateFile:
    """A file of ``nbytes`` zeros without a name in ``directory``, which the system frees when this process ends.

    Attributes:
        bytes: the mapped file, 1-D uint8.
        is_direct: whether reads and writes bypass the page cache.

    Args:
        nbytes: a multiple of ``BLOCK_BYTES``, more than 0. All of it is allocated at once.

    Raises:
        OSError: there is no room, or the directory cannot be written.
    """

    def __init__(self, directory: Path, nbytes: int) -> None:
        self.directory = directory
        self.nbytes = nbytes
        self._descriptor = _open_nameless(directory)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            os.posix_fallocate(self._descriptor, 0, nbytes)
        except OSError as error:
            free = shutil.disk_usage(directory).free
            raise OSError(
                error.errno,
                f"offload: found {free} bytes free in {directory}, needed {nbytes} for the state of this rank "
                f"({os.strerror(error.errno or 0)}). Make room, use another disk, or more ranks",
            ) from error
        self.is_direct = self._can_read_directly()
        self._map = mmap.mmap(self._descriptor, nbytes)
        self.bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def _can_read_directly(self) -> bool:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        if not flags & os.O_DIRECT:
            return False
        probe = mmap.mmap(-1, BLOCK_BYTES)
        try:
            os.preadv(self._descriptor, [probe], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            return False
        return True

    def read(self, into: memoryview, offset: int) -> None:
        """Read ``len(into)`` bytes at ``offset``; all three, with the address, are multiples of ``BLOCK_BYTES``."""
        done = 0
        while done < len(into):
            count = os.preadv(self._descriptor, [into[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the file has been cut")
            done += count

    def write(self, content: memoryview, offset: int) -> None:
        """Write at ``offset``; as ``read``."""
        done = 0
        while done < len(content):
            done += os.pwritev(self._descriptor, [content[done:]], offset + done)

    def flush(self, offset: int, nbytes: int) -> None:
        """Write changed pages of the page cache to the disk, and drop them."""
        if _sync_file_range is None:
            os.fdatasync(self._descriptor)
        else:
            start, size = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
            if _sync_file_range(self._descriptor, start, size, _SYNC_FILE_RANGE_WAIT) != 0:
                number = ctypes.get_errno()
                if number in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                    raise OSError(number, os.strerror(number))
                os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def give_back(self) -> None:
        """Write all pages that were used through the mapping to the disk, and drop them from memory."""
        self._map.madvise(mmap.MADV_DONTNEED)
        self.flush(0, self.nbytes)


def _open_nameless(directory: Path) -> int:
    """Return the descriptor of a new file without a name; with ``O_DIRECT`` if the file system knows it."""
    for flags in (os.O_TMPFILE | os.O_DIRECT, os.O_TMPFILE):
        try:
            return os.open(directory, flags | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EISDIR):
                raise
    descriptor, name = tempfile.mkstemp(prefix="shardadam-", dir=directory)  # such as on NFS
    os.unlink(name)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return descriptor


def memory_of(flat: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy. The tensor must outlive them."""
    nbytes = flat.numel() * flat.element_size()
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(flat.data_ptr())).cast("B")


def aligned(nbytes: int, *, pinned: bool) -> Tensor:
    """Return uninitialised memory of the host, 1-D uint8, that begins at a multiple of ``BLOCK_BYTES``."""
    memory = torch.empty(nbytes + BLOCK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    lead = -memory.data_ptr() % BLOCK_BYTES
    return memory[lead : lead + nbytes]
