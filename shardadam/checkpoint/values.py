# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors with moments decoded to floating point, read in chunks. For ``export`` and ``dcp``.

Keeps one item of a tensor in memory, whatever the size of the tensor; one of each box, of up to 64 boxes.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.boxes import BoxSpec, Region, Run, common, whole_box
from shardadam.checkpoint.files import StoredBox, StoredTensor, TensorSpec
from shardadam.checkpoint.reader import Reader
from shardadam.checkpoint.schema import MODEL_PREFIX, PARAM_GROUPS, STATE_PREFIX
from shardadam.layout import ALIGNMENT_NUMEL, cut
from shardadam.update import formats

CHUNK_NUMEL = 2**17
"""Elements in a chunk of ``Values.chunks``: a multiple of ``ALIGNMENT_NUMEL``."""

STATE = (*formats.MOMENTS, "master", formats.AVERAGE)
_MAX_OPEN = 64
ReadFn = Callable[[int, int], Tensor]


class Values:
    """The decoded tensors of a checkpoint.

    ``specs``: all tensors by key, without scales; moments are float32 (float64 if stored so). ``parameters``: names of
    the parameters that have state. ``steps``, ``n_averaged``: by name; the latter of those that have an average.

    Args:
        reader: must stay open while anything is read.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        optimizer = reader.manifest.optimizer
        self.groups: list[list[str]] = optimizer.groups if optimizer else []
        saved = optimizer.parameters if optimizer else {}
        self.parameters: list[str] = [name for group in self.groups for name in group if name in saved]
        self.steps: dict[str, float] = {name: saved[name].step for name in self.parameters}
        counts = {name: saved[name].n_averaged for name in self.parameters}
        self.n_averaged: dict[str, int] = {name: count for name, count in counts.items() if count is not None}
        self.aliases: dict[str, str] = reader.manifest.aliases
        self._scale_of: dict[str, str] = {}
        self.specs = {key: tensor.spec for key, tensor in reader.index.tensors.items()}
        for name in self.parameters:
            for kind, scale in zip(formats.MOMENTS, formats.SCALES, strict=True):
                key, scale_key = f"{STATE_PREFIX}{name}.{kind}", f"{STATE_PREFIX}{name}.{scale}"
                spec = self.specs[key]
                if not spec.dtype.is_floating_point:
                    self._scale_of[key] = scale_key
                self.specs.pop(scale_key, None)
                self.specs[key] = TensorSpec(torch.promote_types(spec.dtype, torch.float32), spec.shape, spec.order)

    def state_of(self, name: str) -> dict[str, str]:
        """Returns the keys of a parameter's state, by kind (of ``STATE``)."""
        keys = {kind: f"{STATE_PREFIX}{name}.{kind}" for kind in STATE}
        return {kind: key for kind, key in keys.items() if key in self.specs}

    def param_groups(self) -> list[dict[str, Any]]:
        """Returns each group's hyperparameters, without ``params``; torch.optim.AdamW's defaults for missing ones."""
        if PARAM_GROUPS not in self._reader.index.objects:
            return []
        defaults = inspect.signature(torch.optim.AdamW.__init__).parameters.values()
        expected = {p.name: p.default for p in defaults if p.default is not p.empty} | {"decoupled_weight_decay": True}
        return [expected | group for group in self._reader.read_object(PARAM_GROUPS)]

    def model_objects(self) -> dict[str, Any]:
        """Returns the entries of the model's state that are stored as objects, by key."""
        keys = [key for key in self._reader.index.objects if key.startswith(MODEL_PREFIX)]
        return {key: self._reader.read_object(key) for key in keys}

    def opened(self, key: str) -> ReadFn:
        """Returns a function that reads elements ``start : stop`` in memory order: 1-D, on the CPU, verified. It reads
        each item once if it is called with ascending ranges.
        """
        stored = self._reader.index.tensors[key]
        if stored.is_plain:
            return self.opened_box(key, 0)
        return _Assembled(self, key, stored).read

    def opened_box(self, key: str, number: int) -> ReadFn:
        """Returns the same function for one of the stored boxes."""
        tensors = self._reader.index.tensors
        box = tensors[key].boxes[number]
        stored = _Items(self._reader, key, box).read
        if key in self._scale_of:
            scale_key = self._scale_of[key]
            scales = _Items(self._reader, scale_key, tensors[scale_key].boxes[number]).read
            return _decoding(key, stored, scales)
        dtype = self.specs[key].dtype
        return lambda start, stop: stored(start, stop).to(dtype)

    def chunks(self, key: str) -> Iterator[Tensor]:
        """Yields the whole tensor in memory order, 1-D."""
        read = self.opened(key)
        for start, stop in cut(0, self.specs[key].numel, CHUNK_NUMEL):
            yield read(start, stop)


class _Items:
    """Reads a stored box; keeps the item that it read last."""

    def __init__(self, reader: Reader, key: str, box: StoredBox) -> None:
        self._reader = reader
        self._key = key
        self._box = box
        self._position = -1
        self._held = torch.empty(0, dtype=reader.index.tensors[key].spec.dtype, device="cpu")

    def read(self, start: int, stop: int) -> Tensor:
        parts = []
        position = bisect_right(self._box.starts, start) - 1
        while start < stop:
            item = self._box.items[position]
            if position != self._position:
                self._held = self._reader.read_item(self._key, item)
                self._position = position
            end = min(stop, item.start + item.numel)
            parts.append(self._held[start - item.start : end - item.start])
            start, position = end, position + 1
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else self._held[:0]


class _Assembled:
    """Reads a tensor that is stored as several boxes."""

    def __init__(self, values: Values, key: str, stored: StoredTensor) -> None:
        self._values = values
        self._key = key
        self._boxes = [box.spec for box in stored.boxes]
        self._spec = values.specs[key]
        self._opened: dict[int, ReadFn] = {}

    def read(self, start: int, stop: int) -> Tensor:
        flat = torch.empty(stop - start, dtype=self._spec.dtype, device="cpu")
        target = Run(whole_box(self._spec.shape, self._spec.order), start, flat)
        for number, box in enumerate(self._boxes):
            for region, part in product(target.regions, box.parts):
                shared = common(region, part)
                if shared is not None:
                    for low, high in _spans(box, shared):
                        target.copy_(Run(box, low, self._open(number)(low, high)))
        return flat

    def _open(self, number: int) -> ReadFn:
        read = self._opened.pop(number, None) or self._values.opened_box(self._key, number)
        self._opened[number] = read
        if len(self._opened) > _MAX_OPEN:
            del self._opened[next(iter(self._opened))]
        return read


def _spans(box: BoxSpec, region: Region) -> Iterator[tuple[int, int]]:
    """Yields short spans of the box, in memory order, that contain the region. One, of just the region, if the box has
    the memory order of the whole tensor.
    """
    last = tuple(at + size - 1 for at, size in zip(region.offset, region.shape, strict=True))
    low, high = box.position(region.offset), box.position(last) + 1
    if high - low <= CHUNK_NUMEL:
        yield low, high
        return
    dim = next(dim for dim in box.order if region.shape[dim] > 1)
    half = region.shape[dim] // 2
    for begin, size in ((0, half), (half, region.shape[dim] - half)):
        offset, shape = list(region.offset), list(region.shape)
        offset[dim], shape[dim] = offset[dim] + begin, size
        yield from _spans(box, Region(tuple(offset), tuple(shape)))


def _decoding(key: str, codes: ReadFn, scales: ReadFn) -> ReadFn:
    kind = key.rpartition(".")[2]

    def read(start: int, stop: int) -> Tensor:
        first = start // ALIGNMENT_NUMEL
        own_scales = scales(first, -(-stop // ALIGNMENT_NUMEL))
        return decoded(kind, codes(start, stop), own_scales, start - first * ALIGNMENT_NUMEL)

    return read


def decoded(kind: str, codes: Tensor, scales: Tensor, skipped: int) -> Tensor:
    """Returns the values of codes of a moment.

    Args:
        scales: of all blocks that have some of the codes.
        skipped: how many codes of the first block come before these.
    """
    numel = skipped + codes.numel()
    own, other = (torch.zeros(numel, dtype=dtype, device="cpu") for dtype in (codes.dtype, torch.uint8))
    own[skipped:] = codes
    state = dict.fromkeys(formats.MOMENTS, other) | dict.fromkeys(formats.SCALES, scales)  # the other moment is 0
    state[kind] = own
    return formats.read_moments(state)[formats.MOMENTS.index(kind)][skipped:]
