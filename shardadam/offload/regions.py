# SPDX-License-Identifier: Apache-2.0
"""Where the state of a bucket lies in a file, and in the buffer that it passes through. Pure functions of the layout.

In the file of an arena each tensor of the state begins at a multiple of ``BLOCK_BYTES``; the state of a bucket is a run
of each of them. A buffer holds all these runs, one after the other, each with the whole blocks that it begins and ends
in, as files are read and written in whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.precision import Format
from shardadam.update import formats

BLOCK_BYTES = 4096
"""A multiple of what disks and file systems require of addresses, offsets and lengths in direct I/O."""


@dataclass(frozen=True, slots=True)
class Region:
    """The state of one bucket in one tensor, in bytes.

    Args:
        name: of the tensor, as in ``update/formats.py``.
        start, stop: in the file.
        offset: of the first whole block in the buffer.
    """

    name: str
    dtype: torch.dtype
    start: int
    stop: int
    offset: int

    @property
    def first_block(self) -> int:
        """The start of the first block in the file, in bytes."""
        return self.start // BLOCK_BYTES * BLOCK_BYTES

    @property
    def blocks_stop(self) -> int:
        """The stop of the last block in the file, in bytes."""
        return whole_blocks(self.stop)

    @property
    def buffer_slice(self) -> slice:
        """The whole blocks in the buffer."""
        return slice(self.offset, self.offset + self.blocks_stop - self.first_block)

    @property
    def view_slice(self) -> slice:
        """The bytes of this bucket in the buffer."""
        lead = self.offset + self.start - self.first_block
        return slice(lead, lead + self.stop - self.start)


def whole_blocks(nbytes: int) -> int:
    """Round up to a multiple of ``BLOCK_BYTES``."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def tensor_starts(format: Format, numel: int) -> tuple[dict[str, int], int]:
    """Return where each tensor of the state of an arena begins in its file, in bytes, and the length of the file.

    Args:
        numel: of this rank's shards, all buckets together.
    """
    starts, stop = {}, 0
    for name, (length, dtype) in formats.tensors(format, numel).items():
        starts[name] = stop
        stop = whole_blocks(stop + length * dtype.itemsize)
    return starts, stop


def regions_of(format: Format, numel: int, elements: slice) -> list[Region]:
    """Return the regions of a bucket, whose shard is ``elements`` of the ``numel`` of its arena."""
    starts, _ = tensor_starts(format, numel)
    regions: list[Region] = []
    offset = 0
    for name, (_, dtype) in formats.tensors(format, numel).items():
        every = ALIGNMENT_NUMEL if name in formats.SCALES else 1
        start, stop = (starts[name] + at // every * dtype.itemsize for at in (elements.start, elements.stop))
        region = Region(name, dtype, start, stop, offset)
        offset = region.buffer_slice.stop
        regions.append(region)
    return regions


def buffer_bytes(regions: Iterable[Region]) -> int:
    """Return the size of a buffer for ``regions``, of one bucket."""
    return max((region.buffer_slice.stop for region in regions), default=0)


def views_of(regions: Iterable[Region], buffer: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a bucket's state in ``buffer``, which is 1-D, uint8 and begins at a multiple of 16."""
    return {region.name: buffer[region.view_slice].view(region.dtype) for region in regions}
