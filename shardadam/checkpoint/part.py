# SPDX-License-Identifier: Apache-2.0
"""What one rank writes of a checkpoint: objects, and its share of all tensors, read when they are written. Local."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardadam.checkpoint.boxes import BoxSpec
from shardadam.checkpoint.contents import Contents, OwnedParameter, random_state, spec_of, state_specs
from shardadam.checkpoint.files import CheckpointError, TensorSpec
from shardadam.checkpoint.objects import safely_pickled, with_plain_numbers
from shardadam.checkpoint.pieces import Piece, pieces_of
from shardadam.checkpoint.schema import PARAM_GROUPS, SCHEDULER, random_state_key
from shardadam.engine.storage import FlatArena
from shardadam.engine.strides import is_dense
from shardadam.layout import ALIGNMENT_NUMEL, ITEM_BYTES, cut
from shardadam.state.local import SCALARS, local_state
from shardadam.transport.placement import local_tensor
from shardadam.update import formats, reference
from shardadam.version import __version__

_NO_HYPERPARAMETERS = ("params", "param_names", "process_group", "gradient_divisor")
"""Entries of param groups that say what is trained, and where. A checkpoint is loaded into other ones."""


@dataclass(frozen=True, slots=True)
class PendingWrite:
    """Elements of a box from ``start`` on.

    Args:
        read: returns them, 1-D, in the box's memory order, on their device.
        held_in: the arena whose snapshot may copy them later; None: they must be copied at once.
    """

    key: str
    spec: TensorSpec
    box: BoxSpec
    start: int
    read: Callable[[], Tensor]
    held_in: FlatArena | None = None


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A tensor of the model that is not sharded over the data-parallel ranks. All ranks that have this box hold equal
    values of a parameter; those of a buffer may differ.
    """

    key: str
    spec: TensorSpec
    box: BoxSpec
    tensor: Tensor

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)

    def cuts(self) -> Iterator[tuple[int, int]]:
        """Yields the ranges of the box that are written at once, each by one rank."""
        every = 4 * (ITEM_BYTES // self.spec.dtype.itemsize)
        yield from cut(0, self.box.numel, every if is_dense(local_tensor(self.tensor)) else max(1, self.box.numel))


@dataclass(slots=True)
class Part:
    """What one rank writes.

    Args:
        boxes: of all tensors that this rank writes a piece of, and of empty ones.
        others: what ``shares`` adds to the writes, on ranks that it chooses.
        objects: pickles, by key.
        extra: this rank's ``extra``.
        description: what the manifest says of what this rank has; None if another rank says the same.
    """

    boxes: dict[str, tuple[TensorSpec, BoxSpec]] = field(default_factory=dict)
    writes: list[PendingWrite] = field(default_factory=list)
    others: list[OtherTensor] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    extra: Any = None
    description: dict[str, Any] | None = None

    def add_other(self, other: OtherTensor, start: int, stop: int) -> None:
        read = partial(_read_other, other.tensor, other.box, start, stop)
        self.writes.append(PendingWrite(other.key, other.spec, other.box, start, read))

    def describe(self, contents: Contents, **facts: Any) -> None:
        """Adds the description of ``contents``, and the model's objects.

        Raises:
            CheckpointError: an object cannot be saved.
        """
        self.description = {**facts, **_description(contents)}
        self.objects |= _pickled(contents, contents.objects)


def collect_part(contents: Contents, *, scheduler: Any, extra: Any, step: int, rank: int, world_size: int) -> Part:
    """Returns this rank's part, with objects and ``extra`` as they are now.

    Raises:
        CheckpointError, TypeError: something cannot be saved.
    """
    try:
        part = Part(extra=json.loads(json.dumps(extra)))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"extra: found a value that JSON cannot represent ({error}), expected what json.dumps takes."
        ) from error
    optimizer = contents.optimizer
    specs = {parameter.name: spec_of(parameter.name, parameter.param.parameter) for parameter in contents.owned}
    owned = [
        (parameter, *specs[parameter.name])
        for parameter in contents.owned
        if optimizer is not None and optimizer._checkpoint_seam.writes(parameter.param)
    ]
    if contents.model is not None:
        for parameter, spec, box in owned:
            _add_pieces(part, parameter, "parameter", parameter.value_key, spec, box)
    for key, tensor in contents.others.items():
        _check_ordinary(key, local_tensor(tensor))
        part.others.append(OtherTensor(key, *spec_of(key, tensor), tensor))
    for parameter, of_parameter, box in owned:
        for kind, spec in state_specs(parameter.param, of_parameter).items():
            _add_pieces(part, parameter, kind, parameter.state_key(kind), spec, box)
    objects: dict[str, Any] = {random_state_key(rank): random_state()}
    if rank == 0:
        if scheduler is not None:
            objects[SCHEDULER] = with_plain_numbers(scheduler.state_dict())
        if optimizer is not None:
            objects[PARAM_GROUPS] = hyperparameters(contents)
    part.objects = _pickled(contents, objects)
    if rank == 0:
        part.describe(contents, step=step, world_size=world_size, shardadam=__version__, torch=torch.__version__)
    return part


def _pickled(contents: Contents, objects: Mapping[str, Any]) -> dict[str, bytes]:
    return {key: safely_pickled(key, value, groups=len(contents.groups)) for key, value in objects.items()}


def hyperparameters(contents: Contents) -> list[dict[str, Any]]:
    """Returns the optimizer's param groups without their parameters."""
    groups: Collection[dict[str, Any]] = contents.optimizer.param_groups if contents.optimizer is not None else ()
    return [
        {key: with_plain_numbers(value) for key, value in group.items() if key not in _NO_HYPERPARAMETERS}
        for group in groups
    ]


def _description(contents: Contents) -> dict[str, Any]:
    description: dict[str, Any] = {"aliases": contents.aliases}
    if contents.optimizer is not None:
        description["optimizer"] = {
            "groups": contents.groups,
            "skipped_steps": int(contents.optimizer.skipped_steps),
            **contents.optimizer._checkpoint_seam.description(),
            "parameters": {parameter.name: _scalars(local_state(parameter.param)) for parameter in contents.owned},
        }
    return description


def _scalars(state: Mapping[str, Tensor]) -> dict[str, float | str]:
    """Returns all numbers; the bound as hexadecimal text, because it may be infinite and JSON has no infinity."""
    convert: dict[str, Callable[[Tensor], float | str]] = {
        "step": float,
        "bound": lambda bound: float(bound).hex(),
        "n_averaged": int,
    }
    return {kind: convert[kind](state[kind]) for kind in SCALARS if kind in state}


def _add_pieces(part: Part, parameter: OwnedParameter, kind: str, key: str, spec: TensorSpec, box: BoxSpec) -> None:
    """Adds this rank's pieces of a parameter (kind "parameter") or of a tensor of its state."""
    if box.numel == 0 < spec.numel:
        return
    part.boxes[key] = spec, box
    for piece in pieces_of(parameter.param):
        start = piece.start // ALIGNMENT_NUMEL if kind in formats.SCALES else piece.start
        part.writes.append(PendingWrite(key, spec, box, start, partial(_read, piece, kind), piece.held_in(kind)))


def _read(piece: Piece, kind: str) -> Tensor:
    if kind == "parameter":
        return piece.parameter()
    if kind == "master" and "remainder" in piece.param.arena.state:
        parameter = piece.parameter()
        return reference.join(parameter, piece.read_state("remainder").to(parameter.device))
    return piece.read_state(kind)


def _check_ordinary(key: str, tensor: Tensor) -> None:
    repeats = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    if tensor.layout != torch.strided or tensor.device.type == "meta" or repeats:
        found = "an expanded tensor" if repeats else f"{tensor.layout} on {tensor.device}"
        raise CheckpointError(
            f"{key} cannot be saved: found {found}, expected an ordinary tensor. Give the module a tensor of its own "
            "(clone()), or register the buffer with persistent=False."
        )


def _read_other(tensor: Tensor, box: BoxSpec, start: int, stop: int) -> Tensor:
    local = local_tensor(tensor).detach()
    return local.permute(box.order).reshape(-1)[start:stop].resolve_conj().resolve_neg()
