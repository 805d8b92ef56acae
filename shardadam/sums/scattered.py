# SPDX-License-Identifier: Apache-2.0
"""The gradients of an arena where autograd has left them, so that no copy of them is needed.

Works on any device; only kernels read ``Addresses``. The host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.layout import Segment
from shardadam.sums.to_device import send

ALIGNMENT_BYTES = 16
"""Of an address from which a GPU can load its widest words."""


@dataclass(frozen=True, slots=True, eq=False)
class Addresses:
    """Where kernels find the gradients of an arena. Does not keep them alive.

    Args:
        table: int64, on the device, one for each parameter of the arena; 0 for one without a gradient.
        dtype: of the gradients.
        is_aligned: whether all are multiples of ``ALIGNMENT_BYTES``.
    """

    table: Tensor
    dtype: torch.dtype
    is_aligned: bool


@dataclass(frozen=True, slots=True, eq=False)
class Scattered:
    """The gradients of one arena, each in a tensor of its own.

    Args:
        tensors: one for each parameter of the arena: 1-D and contiguous, in the parameter's memory order. None is
            a gradient of zeros.
        dtype: of all of them: float32, bfloat16 or float16, or on a device without kernels float64.
        addresses: of the tensors; None on a device without kernels.
    """

    tensors: Sequence[Tensor | None]
    dtype: torch.dtype
    addresses: Addresses | None = None

    @classmethod
    def with_addresses(cls, tensors: Sequence[Tensor | None], dtype: torch.dtype, device: torch.device) -> Scattered:
        """Return them with their addresses in a table on ``device``. May be captured in a CUDA graph."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        is_aligned = all(address % ALIGNMENT_BYTES == 0 for address in addresses)
        return cls(tensors, dtype, Addresses(send(addresses, torch.int64, device), dtype, is_aligned))

    def write_(self, target: Tensor, segments: Iterable[Segment], start: int, stop: int) -> None:
        """Write elements ``start : stop`` of a shard to ``target``; zeros where there is padding or no gradient.

        Args:
            target: 1-D, ``stop - start`` long, of any floating dtype.
            segments: of one bucket and this rank, by ascending offset; ``Segment.parameter`` is the index in the arena.
        """
        numels: list[int] = []  # of the parts of target, in order
        sources: list[Tensor | None] = []  # None for zeros
        end = start  # where the part after these begins
        for segment in segments:
            if segment.offset >= stop:
                break
            low, high = max(start, segment.offset), min(stop, segment.offset + segment.numel)
            tensor = self.tensors[segment.parameter]
            if tensor is None or low >= high:
                continue
            if low > end:
                numels.append(low - end)
                sources.append(None)
            first = segment.start + low - segment.offset
            numels.append(high - low)
            sources.append(tensor if tensor.numel() == high - low else tensor[first : first + high - low])
            end = high
        if end < stop:
            numels.append(stop - end)
            sources.append(None)
        # Few calls, as there may be many small parameters.
        parts = list(zip(torch.split(target, numels), sources, strict=True))
        copied = [(part, source) for part, source in parts if source is not None]
        zeros = [part for part, source in parts if source is None]
        if copied:
            torch._foreach_copy_([part for part, _ in copied], [source for _, source in copied])
        if zeros:
            torch._foreach_zero_(zeros)
