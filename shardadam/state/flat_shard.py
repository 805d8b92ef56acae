# SPDX-License-Identifier: Apache-2.0
"""``FlatShard``: a tensor of which this rank holds some spans, for torch.distributed.checkpoint (DCP) to reshard.

Knows no optimizer; moves nothing between ranks. The optimizer cuts tensors into spans in memory order, DCP into boxes
(offsets and sizes, one number for each dimension); ``boxes`` converts spans. Of a DTensor, spans are those of the local
tensor, which is a part of the whole: one box, or some ``runs`` of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from shardadam.layout import ITEM_BYTES, Span, cut

_aten = torch.ops.aten


def boxes(span: Span, shape: Sequence[int], order: Sequence[int]) -> Iterator[ChunkStorageMetadata]:
    """Cuts ``span`` of a dense tensor into at most ``2 * len(shape) - 1`` boxes that follow each other in memory order.

    Args:
        shape: of the whole tensor.
        order: its dimensions from the outermost to the innermost in memory, see ``dimension_order``.

    Returns:
        Offsets and sizes of each box, in the tensor's own order of dimensions.
    """
    logical = _logical(order)
    for offsets, sizes in _row_major_boxes([shape[dim] for dim in order], span.start, span.stop):
        yield ChunkStorageMetadata(torch.Size(offsets[i] for i in logical), torch.Size(sizes[i] for i in logical))


_Ints = tuple[int, ...]
Runs = tuple[tuple[tuple[int, int], ...], ...]
"""For each dimension, offset and length of the runs of a whole tensor that a part of it has, one after the other: one,
if the part is a box.
"""


def split_by_runs(
    offsets: Sequence[int], sizes: Sequence[int], runs: Runs
) -> Iterator[tuple[ChunkStorageMetadata, _Ints]]:
    """Cuts a box of a part into boxes of the whole; yields each, and where it begins in the box that is cut."""
    cuts: list[list[tuple[int, int, int]]] = []  # for each dimension: begin, size, offset in the whole
    for offset, size, of_dim in zip(offsets, sizes, runs, strict=True):
        start, found = 0, []
        for at, length in of_dim:
            low, high = max(offset, start), min(offset + size, start + length)
            if low < high or len(of_dim) == 1:
                found.append((low - offset, high - low, at + low - start))
            start += length
        cuts.append(found)
    for cut_out in product(*cuts):
        begins, lengths, places = zip(*cut_out, strict=True) if cut_out else ((), (), ())
        yield ChunkStorageMetadata(torch.Size(places), torch.Size(lengths)), begins


def runs_of_whole(shape: Sequence[int]) -> Runs:
    return tuple(((0, size),) for size in shape)


def narrowed(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Returns a view of a box of ``tensor``."""
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def _row_major_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[_Ints, _Ints]]:
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (start,) if shape else (), (stop - start,) if shape else ()
        return
    row_numel = math.prod(shape[1:])
    first, last = -(-start // row_numel), stop // row_numel  # the whole rows
    if first > last:  # the span lies inside one row
        yield from _boxes_in_row(shape, last, start, stop)
        return
    if start < first * row_numel:
        yield from _boxes_in_row(shape, first - 1, start, first * row_numel)
    if first < last:
        rest = tuple(shape[1:])
        yield (first, *(0,) * len(rest)), (last - first, *rest)
    if last * row_numel < stop:
        yield from _boxes_in_row(shape, last, last * row_numel, stop)


def _boxes_in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[tuple[_Ints, _Ints]]:
    begin = row * math.prod(shape[1:])
    for offsets, sizes in _row_major_boxes(shape[1:], start - begin, stop - begin):
        yield (row, *offsets), (1, *sizes)


def in_shape(flat: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Returns a view of ``flat``, a tensor's elements in memory order, in the tensor's ``shape``."""
    return flat.view([shape[dim] for dim in order]).permute(_logical(order))


def _logical(order: Sequence[int]) -> list[int]:
    """Returns the position in ``order`` of each dimension of the tensor."""
    return sorted(range(len(order)), key=lambda position: order[position])


def dimension_order(tensor: Tensor) -> tuple[int, ...]:
    """Returns the dimensions of a dense tensor from the outermost to the innermost in memory. Ignores the strides of
    dimensions of size 1, so that equal orders of elements give equal results.
    """
    strides = tensor.stride()
    long = sorted((dim for dim in range(tensor.ndim) if tensor.shape[dim] != 1), key=lambda dim: -strides[dim])
    if tensor.numel() == 0 or long == sorted(long):
        return tuple(range(tensor.ndim))
    return (*(dim for dim in range(tensor.ndim) if tensor.shape[dim] == 1), *long)


class FlatShard(Tensor):
    """A tensor of ``shape`` of which this rank holds ``spans`` of a part, one after the other in ``local``.

    It has shape, dtype, device and the methods that DCP calls, but no arithmetic. ``local`` is not copied, so DCP loads
    into it in place.

    Args:
        local: 1-D, with as many elements as ``spans``.
        spans: what ``local`` holds of the part, ascending.
        shape: of the whole tensor.
        order: the part's dimensions from the outermost to the innermost in memory; row-major: ``(0, 1, ...)``.
        runs: where the part lies in the whole tensor; None: it is the whole.
    """

    __slots__ = ["local", "order", "runs", "spans"]

    local: Tensor
    spans: tuple[Span, ...]
    order: tuple[int, ...]
    runs: Runs

    @staticmethod
    def __new__(
        cls: type[FlatShard],
        local: Tensor,
        spans: Sequence[Span],
        shape: Sequence[int],
        order: Sequence[int],
        runs: Runs | None = None,
    ) -> FlatShard:
        whole: FlatShard = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=local.dtype, device=local.device)
        whole.local, whole.spans, whole.order = local, tuple(spans), tuple(order)
        whole.runs = runs_of_whole(shape) if runs is None else runs
        return whole

    def _parts(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        """Yields this rank's boxes, each with its view of ``local``, in the tensor's own order of dimensions."""
        begin = 0
        shape = [sum(length for _, length in of_dim) for of_dim in self.runs]
        for span in self.spans:
            for start, stop in cut(span.start, span.stop, ITEM_BYTES // self.dtype.itemsize):
                for box in boxes(Span(start, stop - start), shape, self.order):
                    end = begin + box.sizes.numel()
                    held = in_shape(self.local[begin:end], box.sizes, self.order)
                    for place, begins in split_by_runs(box.offsets, box.sizes, self.runs):
                        yield place, narrowed(held, begins, place.sizes)
                    begin = end

    # The protocol of torch.distributed._checkpointable

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box for box, _ in self._parts()]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(fqn, box.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(box, properties, self.shape),
            )
            for box in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box, part in self._parts():
            if box.offsets == index.offset:
                return part
        raise ValueError(f"found {index}, expected a box of this rank")

    # Only what copies of a state dict call (deepcopy, DCP's stagers)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0]
        if function in (_aten.detach.default, _aten.clone.default, _aten._to_copy.default):
            return first._with(function(first.local, **kwargs))
        if function is _aten.new_empty.default:
            return first._with(first.local.new_empty(first.local.shape, **kwargs))
        raise NotImplementedError(
            f"{function}: a tensor of optimizer.state_dict() holds one rank's shard and has no arithmetic. Use "
            "optimizer.full_state(p) for whole tensors."
        )

    def _with(self, local: Tensor) -> FlatShard:
        return FlatShard(local, self.spans, self.shape, self.order, self.runs)

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatShard:
        memo[id(self)] = copied = self._with(self.local.clone())
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "optimizer.state_dict() holds one rank's shards; a pickle of them would look whole and lose the rest. Save "
            "with shardadam.save(directory, step=step, model=model, optimizer=optimizer, scheduler=scheduler), or with "
            "torch.distributed.checkpoint.save. For a file of torch.save, call whole = optimizer.full_state_dict() on "
            "all ranks, outside of `if rank == 0`; then save it on rank 0. "
            "With transformers.Trainer, use ShardedTrainer from shardadam.integrations.transformers, or pass "
            "callbacks=[ConsolidateCallback()] from there."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        held = ", ".join(f"{span.start}:{span.stop}" for span in self.spans)
        of_part = f", of {self.runs}" if self.runs != runs_of_whole(self.shape) else ""
        return f"FlatShard(shape={tuple(self.shape)}, dtype={self.dtype}, held=[{held}]{of_part})"
