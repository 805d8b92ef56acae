# SPDX-License-Identifier: Apache-2.0
"""A storage reader with which torch.distributed.checkpoint (DCP) loads checkpoints of ``shardadam.save``, for example
into FSDP2 or into plain modules with torch.optim.AdamW.

DCP plans and copies, ``Values`` reads and verifies. Only ``Reader`` unpickles what a checkpoint contains.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
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

from shardadam.checkpoint.boxes import Region, Run
from shardadam.checkpoint.directory import has_checkpoint, newest
from shardadam.checkpoint.files import CheckpointError, CheckpointRemovedError, TensorSpec
from shardadam.checkpoint.reader import Reader, open_newest
from shardadam.checkpoint.schema import PARAM_GROUPS
from shardadam.checkpoint.values import Values


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor in DCP's terms. ``chunks``: by offsets."""

    key: str
    spec: TensorSpec
    chunks: dict[tuple[int, ...], _Chunk]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A region of a tensor that lies in one item.

    Args:
        box: number of the stored box.
        start, stop: positions in the box, in memory order, between which it lies.
    """

    box: int
    start: int
    stop: int
    region: Region


class DcpReader(StorageReader):
    """``torch.distributed.checkpoint.load(state_dict, storage_reader=DcpReader(directory))``.

    ``state_dict`` is ``{"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}`` or a
    part of it, also with ``flatten_optimizer_state_dict=True``. It may be loaded on any number of ranks. Keys:
    ``model.NAME``, ``optimizer.state.NAME.exp_avg``, ``exp_avg_sq``, ``step``, and what was saved of ``master``,
    ``average`` and ``n_averaged``.
    Tensors have the parameters' shapes. Moments are float32 (float64 if stored so) in every format; steps are
    0-dimensional float32.

    Reading is local; ``torch.distributed.checkpoint.load`` is collective. A rank reads and verifies the items that it
    needs a part of. If the checkpoint is removed before it is opened (``save(keep=...)`` of another job), the newest
    one is read. If ranks have then found different ones, all of them raise.

    Args:
        directory: as given to ``shardadam.save``, or one checkpoint in it.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged (in ``load``, wrapped in DCP's CheckpointException).
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._set_directory(directory)

    def _set_directory(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory).absolute()
        self.checkpoint_id = newest(self._directory)
        self._reader: Reader | None = None
        self._checksum = ""
        self._tensors: dict[str, _Tensor] = {}
        self._numbers: dict[str, Any] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Prepares for another load, from another directory if one is given."""
        if checkpoint_id is not None:
            self._set_directory(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """Returns what the checkpoint contains. Reads no tensors, only objects."""
        reader = self._reader = self._opened()
        self.checkpoint_id, self._checksum = reader.path, reader.checksum
        values = Values(reader)
        self._tensors = _tensors_of(reader, values)
        self._numbers = _numbers_of(values) | values.model_objects()
        described: dict[str, Any] = {}
        for key, tensor in self._tensors.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk.region.offset), torch.Size(chunk.region.shape))
                for chunk in tensor.chunks.values()
            ]
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
        """Does nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the plan with the checkpoint that this rank has found."""
        return replace(plan, storage_data=(str(self.checkpoint_id), self._checksum))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the plans unchanged.

        Raises:
            CheckpointError: ranks have found different checkpoints.
        """
        found = sorted({plan.storage_data for plan in plans if plan.storage_data is not None})
        if len(found) > 1:
            paths = " and ".join(sorted({path for path, _ in found}))
            raise CheckpointError(
                f"Ranks have found different checkpoints: {paths}. Another job has saved in the meantime. Make a new "
                "DcpReader, or pass the directory of one checkpoint."
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads the plan's items, sorted by tensor and position."""
        with self._reader or Reader(self.checkpoint_id) as reader:
            self._reader = None
            if reader.checksum != self._checksum:
                raise CheckpointError(f"{reader.path} has been replaced while it was read. Load it again.")
            values = Values(reader)
            wanted: list[tuple[str, int, int, ReadItem]] = []
            for item in plan.items:
                key = item.storage_index.fqn
                if key in self._tensors:
                    tensor = self._tensors[key]
                    chunk = tensor.chunks[_offsets(item)]
                    wanted.append((tensor.key, chunk.box, chunk.start, item))
                elif item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, _pickled(self._numbers[key]))
                else:
                    _load_into(planner, item, self._numbers[key])
            wanted.sort(key=lambda one: one[:3])
            for (key, box), items in groupby(wanted, key=lambda one: one[:2]):
                read = values.opened_box(key, box)
                for *_, start, item in items:
                    chunk = self._tensors[item.storage_index.fqn].chunks[_offsets(item)]
                    run = Run(reader.index.tensors[key].boxes[box].spec, start, read(start, chunk.stop))
                    _load_into(planner, item, run.parts[run.regions.index(chunk.region)])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _opened(self) -> Reader:
        try:
            return Reader(self.checkpoint_id)
        except CheckpointRemovedError:
            return open_newest(self._directory)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns whether there is a checkpoint."""
        return has_checkpoint(checkpoint_id)


def _tensors_of(reader: Reader, values: Values) -> dict[str, _Tensor]:
    """Returns all tensors, tied ones by each of their names."""
    tensors = {}
    for key, spec in values.specs.items():
        tensor = tensors[key] = _Tensor(key, spec, {})
        for number, box in enumerate(reader.index.tensors[key].boxes):
            for item in box.items:
                for chunk in box.spec.chunks(item.start, item.start + item.numel):
                    stop = chunk.start + math.prod(chunk.shape)
                    for region, _ in chunk.regions:
                        tensor.chunks[region.offset] = _Chunk(number, chunk.start, stop, region)
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
    """Returns steps and hyperparameters. Hyperparameters appear twice: by number of the group, as DCP flattens lists,
    and by name of the parameter, as ``flatten_optimizer_state_dict`` has them.
    """
    found: dict[str, Any] = {}
    other_names: dict[str, list[str]] = {}
    for alias, name in _names(values):
        other_names.setdefault(name, []).append(alias)
    for name, step in values.steps.items():
        for each in (name, *other_names.get(name, ())):
            found[f"optimizer.state.{each}.step"] = torch.tensor(step, dtype=torch.float32, device="cpu")
            if name in values.n_averaged:
                found[f"optimizer.state.{each}.n_averaged"] = torch.tensor(values.n_averaged[name], device="cpu")
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
    """Pickles what ``Reader`` read with restrictions, because DCP unpickles without any."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def _load_into(planner: LoadPlanner, item: ReadItem, stored: Tensor) -> None:
    target = planner.resolve_tensor(item).detach()
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        stored = stored.narrow(dim, offset, length)
    if stored.dtype.is_floating_point and not target.dtype.is_floating_point:
        raise CheckpointError(
            f"{item.dest_index.fqn}: found a {target.dtype} tensor to load into, expected floating point. Load into a "
            "ShardedAdamW with shardadam.load."
        )
    target.copy_(stored)
    planner.commit_tensor(item, target)
