# SPDX-License-Identifier: Apache-2.0
"""Lets torch.distributed.checkpoint (DCP) load what ``shardadam.save`` has written: into FSDP2, or plain modules with
torch.optim.AdamW.

DCP plans and copies, ``Values`` reads and verifies. Nothing that a checkpoint holds is unpickled but by ``Reader``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardadam.checkpoint.contents import PARAM_GROUPS
from shardadam.checkpoint.directory import newest
from shardadam.checkpoint.files import CheckpointError, Reader, TensorSpec
from shardadam.checkpoint.values import Values
from shardadam.layout import Span
from shardadam.state.flat_shard import boxes, in_shape


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor in DCP's terms: boxes by their offsets, each with the position of its first element in memory order."""

    key: str
    spec: TensorSpec
    boxes: dict[tuple[int, ...], tuple[int, ChunkStorageMetadata]]


class DcpReader(StorageReader):
    """``torch.distributed.checkpoint.load(state_dict, storage_reader=DcpReader(directory))``.

    ``state_dict`` is ``{"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}`` or a
    part of it, on as many ranks as there are, however many it was saved on; ``flatten_optimizer_state_dict=True`` is
    known, too. Keys: ``model.NAME``, ``optimizer.state.NAME.exp_avg``, ``exp_avg_sq``, ``step``, and ``master`` where
    there are masters. Tensors have the parameters' shapes; moments are float32 (float64 where they are), whatever they
    are stored in; steps are 0-dimensional float32.

    Reading is local; ``load`` is collective. A rank reads and verifies the items that hold what it needs.

    Args:
        directory: what was given to ``shardadam.save``, or one of the checkpoints in it.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged (in ``load``, wrapped in DCP's CheckpointException).
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._set_directory(directory)

    def _set_directory(self, directory: str | os.PathLike[str]) -> None:
        self.checkpoint_id = newest(Path(directory).absolute())
        self._tensors: dict[str, _Tensor] = {}
        self._numbers: dict[str, Any] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins anew, with another directory if one is given."""
        if checkpoint_id is not None:
            self._set_directory(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """What there is: no data is read but hyperparameters."""
        with Reader(self.checkpoint_id) as reader:
            values = Values(reader)
            self._tensors = _tensors_of(reader, values)
            self._numbers = _numbers_of(values) | values.model_objects()
        described: dict[str, Any] = {}
        for key, tensor in self._tensors.items():
            chunks = [box for _, box in tensor.boxes.values()]
            properties = TensorProperties(tensor.spec.dtype)
            described[key] = TensorStorageMetadata(properties, torch.Size(tensor.spec.shape), chunks)
        for key, value in self._numbers.items():
            if isinstance(value, Tensor):
                chunk = ChunkStorageMetadata(torch.Size([0] * value.ndim), value.shape)
                described[key] = TensorStorageMetadata(TensorProperties(value.dtype), value.shape, [chunk])
            else:
                described[key] = BytesStorageMetadata()
        return Metadata(described)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Nothing is left to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads in the order in which it lies in the files."""
        with Reader(self.checkpoint_id) as reader:
            values = Values(reader)
            wanted: list[tuple[str, int, ReadItem]] = []
            for item in plan.items:
                key = item.storage_index.fqn
                if key in self._tensors:
                    tensor = self._tensors[key]
                    wanted.append((tensor.key, tensor.boxes[_offsets(item)][0], item))
                elif item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, _pickled(self._numbers[key]))
                else:
                    _give(planner, item, self._numbers[key])
            wanted.sort(key=lambda one: one[:2])
            for key, items in groupby(wanted, key=lambda one: one[0]):
                read = values.opened(key)
                for _, _, item in items:
                    tensor = self._tensors[item.storage_index.fqn]
                    start, box = tensor.boxes[_offsets(item)]
                    flat = read(start, start + box.sizes.numel())
                    _give(planner, item, in_shape(flat, box.sizes, tensor.spec.order))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether there is a checkpoint."""
        try:
            newest(Path(checkpoint_id))
        except CheckpointError:
            return False
        return True


def _tensors_of(reader: Reader, values: Values) -> dict[str, _Tensor]:
    """By all names that they have."""
    tensors = {}
    for key, spec in values.specs.items():
        tensor = tensors[key] = _Tensor(key, spec, {})
        start = 0
        for item in reader.index.tensors[key].items:
            for box in boxes(Span(item.start, item.numel), spec.shape, spec.order):
                tensor.boxes[box.offsets] = start, box
                start += box.sizes.numel()
    for alias, name in _names(values):
        if f"model.{name}" in tensors:
            tensors[f"model.{alias}"] = tensors[f"model.{name}"]
        for kind, key in values.state_of(name).items():
            tensors[f"optimizer.state.{alias}.{kind}"] = tensors[key]
    return tensors


def _names(values: Values) -> Iterator[tuple[str, str]]:
    for alias, key in values.aliases.items():
        yield alias.removeprefix("model."), key.removeprefix("model.")


def _numbers_of(values: Values) -> dict[str, Any]:
    """Steps and hyperparameters, these both as DCP flattens a list of groups (by number), and as
    ``flatten_optimizer_state_dict`` does (by name of parameter).
    """
    found: dict[str, Any] = {}
    other_names: dict[str, list[str]] = {}
    for alias, name in _names(values):
        other_names.setdefault(name, []).append(alias)
    for name, step in values.steps.items():
        for each in (name, *other_names.get(name, ())):
            found[f"optimizer.state.{each}.step"] = torch.tensor(step, dtype=torch.float32)
    for number, (names, group) in enumerate(zip(values.groups, values.param_groups(), strict=True)):
        found[f"{PARAM_GROUPS}.{number}.params"] = names
        for option, value in (*group.items(), ("param_names", names)):
            found[f"{PARAM_GROUPS}.{number}.{option}"] = value
            for name in names:
                for each in (name, *other_names.get(name, ())):
                    found[f"{PARAM_GROUPS}.{each}.{option}"] = value
    return found


def _offsets(item: ReadItem) -> tuple[int, ...]:
    return tuple(item.storage_index.offset or ())


def _pickled(value: Any) -> io.BytesIO:
    """DCP unpickles it without restrictions: so it is pickled here, from what ``Reader`` has read with them."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def _give(planner: LoadPlanner, item: ReadItem, stored: Tensor) -> None:
    target = planner.resolve_tensor(item).detach()
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        stored = stored.narrow(dim, offset, length)
    if stored.dtype.is_floating_point and not target.dtype.is_floating_point:
        raise CheckpointError(
            f"{item.dest_index.fqn}: found {target.dtype} to load into, expected a floating-point type. Load a "
            "ShardedAdamW with shardadam.load."
        )
    target.copy_(stored)
    planner.commit_tensor(item, target)
