# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors with moments decoded to floating point, read in chunks. For ``export`` and ``dcp``.

Keeps one item of a tensor in memory, whatever the size of the tensor.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shardadam.checkpoint.files import TensorSpec
from shardadam.checkpoint.reader import Reader
from shardadam.checkpoint.schema import MODEL_PREFIX, PARAM_GROUPS, STATE_PREFIX
from shardadam.layout import ALIGNMENT_NUMEL, cut
from shardadam.update import formats

CHUNK_NUMEL = 2**17
"""Elements in a chunk of ``Values.chunks``: a multiple of ``ALIGNMENT_NUMEL``."""

STATE = (*formats.MOMENTS, "master")
ReadFn = Callable[[int, int], Tensor]


class Values:
    """The decoded tensors of a checkpoint.

    ``specs``: all tensors by key, without scales; moments are float32 (float64 if stored so). ``parameters``: names of
    the parameters that have state.

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
        stored = _Items(self._reader, key).read
        if key in self._scale_of:
            return _decoding(key, self.specs[key].numel, stored, _Items(self._reader, self._scale_of[key]).read)
        dtype = self.specs[key].dtype
        return lambda start, stop: stored(start, stop).to(dtype)

    def chunks(self, key: str) -> Iterator[Tensor]:
        """Yields the whole tensor in memory order, 1-D."""
        read = self.opened(key)
        for start, stop in cut(0, self.specs[key].numel, CHUNK_NUMEL):
            yield read(start, stop)


class _Items:
    """Reads a stored tensor; keeps the item that it read last."""

    def __init__(self, reader: Reader, key: str) -> None:
        self._reader = reader
        self._key = key
        self._stored = reader.index.tensors[key]
        self._position = -1
        self._held = torch.empty(0, device="cpu")

    def read(self, start: int, stop: int) -> Tensor:
        parts = []
        position = bisect_right(self._stored.starts, start) - 1
        while start < stop:
            item = self._stored.items[position]
            if position != self._position:
                self._held = torch.empty(item.numel, dtype=self._stored.spec.dtype, device="cpu")
                self._reader.read_(self._key, item.start, self._held)
                self._position = position
            end = min(stop, item.start + item.numel)
            parts.append(self._held[start - item.start : end - item.start])
            start, position = end, position + 1
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else self._held[:0]


def _decoding(key: str, numel: int, codes: ReadFn, scales: ReadFn) -> ReadFn:
    kind = key.rpartition(".")[2]
    scale = formats.SCALES[formats.MOMENTS.index(kind)]

    def read(start: int, stop: int) -> Tensor:
        low = start // ALIGNMENT_NUMEL * ALIGNMENT_NUMEL
        high = min(-(-stop // ALIGNMENT_NUMEL) * ALIGNMENT_NUMEL, numel)
        zeros = torch.zeros(high - low, dtype=torch.int8, device="cpu")
        own_scales = scales(low // ALIGNMENT_NUMEL, -(-high // ALIGNMENT_NUMEL))
        state = dict.fromkeys(formats.MOMENTS, zeros) | dict.fromkeys(
            formats.SCALES, own_scales
        )  # the other moment is 0
        state |= {kind: codes(low, high), scale: own_scales}
        values = formats.read_moments(state)[formats.MOMENTS.index(kind)]
        return values[start - low : stop - low]

    return read
