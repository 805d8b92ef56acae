# SPDX-License-Identifier: Apache-2.0
"""The gradients of an arena where autograd has left them, so that no copy of them is needed.

Works on any device; only kernels read ``Addresses``. The host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

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


class Piece(NamedTuple):
    """``start : stop`` of a gradient, in the parameter's memory order; ``stop - start`` zeros if ``parameter`` is None.

    ``parameter`` is the index in the arena.
    """

    parameter: int | None
    start: int
    stop: int


def pieces_of_shard(segments: Iterable[Segment], start: int, stop: int) -> Iterator[Piece]:
    """Yield what elements ``start : stop`` of a shard hold, in order: pieces of gradients, and zeros for padding.

    Args:
        segments: of one bucket and rank, by ascending offset; ``Segment.parameter`` is the index in the arena.
    """
    end = start  # where the piece after these begins
    for segment in segments:
        low, high = max(start, segment.offset), min(stop, segment.offset + segment.numel)
        if low < high:
            if low > end:
                yield Piece(None, 0, low - end)
            first = segment.start + low - segment.offset
            yield Piece(segment.parameter, first, first + high - low)
            end = high
    if end < stop:
        yield Piece(None, 0, stop - end)


class Parts:
    """Pieces that ``Scattered.flat`` joins: sorted by kind once, so that no step must cut a gradient that lies whole.

    Args:
        pieces: in order.
        numels: of the arena's parameters.
        device: of the zeros.
        dtype: of the zeros.

    Attributes:
        order: of each piece, the parameter that lies whole in it; ``~i`` for number ``i`` of ``[*zeros, *slices]``.
        numels: of each piece.
        padding: all lengths of padding, each once.
    """

    __slots__ = ("device", "dtype", "numels", "order", "padding", "slices")

    def __init__(
        self, pieces: Iterable[Piece], numels: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        pieces = list(pieces)
        self.numels = [piece.stop - piece.start for piece in pieces]
        self.padding = list(dict.fromkeys(piece.stop for piece in pieces if piece.parameter is None))
        self.device, self.dtype = device, dtype
        self.slices: list[tuple[int, int, int]] = []
        self.order: list[int] = []
        places = {numel: ~place for place, numel in enumerate(self.padding)}
        for piece in pieces:
            if piece.parameter is None:
                self.order.append(places[piece.stop])
            elif piece.stop - piece.start == numels[piece.parameter]:
                self.order.append(piece.parameter)
            else:
                self.order.append(~(len(self.padding) + len(self.slices)))
                self.slices.append((piece.parameter, piece.start, piece.stop))

    def zeros(self) -> Sequence[Tensor]:
        """Return zeros for each length of padding."""
        if not self.padding:
            return ()
        zeros = torch.zeros(max(self.padding), device=self.device, dtype=self.dtype)
        return [zeros[:numel] for numel in self.padding]


@dataclass(frozen=True, slots=True, eq=False)
class Scattered:
    """The gradients of one arena, each in a tensor of its own.

    Args:
        tensors: one for each parameter of the arena, of any shape: in logical order, its elements are in the
            parameter's memory order. None is a gradient of zeros. With ``addresses``, they are contiguous.
        dtype: what those that it cannot represent are rounded to: float32, bfloat16 or float16, or on a device without
            kernels float64. With ``addresses``, all have it.
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

    def slice(self, parameter: int, start: int, stop: int) -> Tensor | None:
        """Return ``start : stop`` of a gradient: 1-D, of ``dtype`` or a narrower one. May share its memory."""
        tensor = self.tensors[parameter]
        if tensor is None:
            return None
        part = tensor if tensor.dim() == 1 else tensor.reshape(-1)
        if stop - start < part.numel():
            part = part[start:stop]
        return self._rounded(part)

    def flat(self, parts: Parts) -> Tensor:
        """Return pieces one after the other: 1-D, of ``dtype`` or a narrower one. May share a single gradient's memory.

        Makes few calls of torch, as there may be many small parameters.
        """
        tensors = self.tensors
        others = [*parts.zeros(), *(self.slice(*one) for one in parts.slices)]
        found = [tensors[place] if place >= 0 else others[~place] for place in parts.order]
        if any(tensor is None for tensor in found):
            device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
            zero = torch.zeros(1, dtype=self.dtype, device=device)
            found = [
                zero.expand(numel) if tensor is None else tensor
                for tensor, numel in zip(found, parts.numels, strict=True)
            ]
        flat: Tensor = _flatten_dense_tensors(found)  # type: ignore[no-untyped-call]  # widens narrower dtypes
        if len(found) == 1:
            flat = flat.resolve_neg()  # it may be a view that negates what its memory holds
        return self._rounded(flat)

    def _rounded(self, flat: Tensor) -> Tensor:
        is_held = flat.dtype == self.dtype or torch.promote_types(flat.dtype, self.dtype) == self.dtype
        return flat if is_held else flat.to(self.dtype)

    def has(self, parts: Parts) -> bool:
        """Return whether there is a gradient for any of the pieces."""
        places = [*(place for place in parts.order if place >= 0), *(parameter for parameter, _, _ in parts.slices)]
        return any(self.tensors[place] is not None for place in places)

    def write_(self, target: Tensor, segments: Iterable[Segment], start: int, stop: int) -> None:
        """Write elements ``start : stop`` of a shard to ``target``; zeros where there is padding or no gradient.

        Args:
            target: 1-D, ``stop - start`` long, of any floating dtype.
            segments: as in ``pieces_of_shard``.
        """
        if start < stop:
            numels = [-1 if tensor is None else tensor.numel() for tensor in self.tensors]
            pieces = pieces_of_shard(segments, start, stop)
            target.copy_(self.flat(Parts(pieces, numels, target.device, self.dtype)))
