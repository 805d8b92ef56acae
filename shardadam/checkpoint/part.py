# SPDX-License-Identifier: Apache-2.0
"""What one rank writes of a checkpoint: objects, and its share of all tensors, read when they are written. Local."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardadam.checkpoint.contents import (
    Contents,
    OwnedParameter,
    contents_of,
    random_state,
    spec_of,
    state_specs,
)
from shardadam.checkpoint.files import CheckpointError, TensorSpec
from shardadam.checkpoint.objects import safely_pickled, with_plain_numbers
from shardadam.checkpoint.pieces import Piece, pieces_of
from shardadam.checkpoint.schema import PARAM_GROUPS, SCHEDULER, random_state_key
from shardadam.engine.strides import is_dense
from shardadam.layout import ALIGNMENT_NUMEL, ITEM_BYTES, cut
from shardadam.optimizer import ShardedAdam
from shardadam.state.local import local_state
from shardadam.update import formats, reference
from shardadam.version import __version__


@dataclass(frozen=True, slots=True)
class PendingWrite:
    """Elements of a stored tensor from ``start`` on; ``read`` returns them, 1-D, in memory order, on their device."""

    key: str
    spec: TensorSpec
    start: int
    read: Callable[[], Tensor]


@dataclass(slots=True)
class Part:
    """What one rank writes.

    Args:
        specs: all tensors that this rank writes a piece of, and empty ones.
        objects: pickles, by key.
        extra: this rank's ``extra``.
        description: what the manifest says of the whole checkpoint; on rank 0.
    """

    specs: dict[str, TensorSpec] = field(default_factory=dict)
    writes: list[PendingWrite] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    extra: Any = None
    description: dict[str, Any] = field(default_factory=dict)


def collect_part(
    model: nn.Module | None,
    optimizer: ShardedAdam | None,
    *,
    scheduler: Any,
    extra: Any,
    step: int,
    rank: int,
    world_size: int,
) -> Part:
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
    contents = contents_of(model, optimizer)
    # Replicas hold equal shards; the first one writes them.
    owned = contents.owned if optimizer is not None and optimizer._checkpoint_seam.is_writer else []
    if model is not None:
        for parameter in owned:
            _add_pieces(part, parameter, "parameter", parameter.value_key, spec_of(parameter.param.parameter))
    _add_replicated(part, contents.replicated, rank, world_size)
    for parameter in owned:
        for kind, spec in state_specs(parameter.param).items():
            _add_pieces(part, parameter, kind, parameter.state_key(kind), spec)
    objects: dict[str, Any] = {random_state_key(rank): random_state()}
    if rank == 0:
        part.description = _description(contents, step, world_size)
        objects |= contents.objects
        if scheduler is not None:
            objects[SCHEDULER] = with_plain_numbers(scheduler.state_dict())
        if optimizer is not None:
            objects[PARAM_GROUPS] = [
                {key: with_plain_numbers(value) for key, value in group.items() if key not in ("params", "param_names")}
                for group in optimizer.param_groups
            ]
    part.objects = {key: safely_pickled(key, value, groups=len(contents.groups)) for key, value in objects.items()}
    return part


def _description(contents: Contents, step: int, world_size: int) -> dict[str, Any]:
    description: dict[str, Any] = {
        "step": step,
        "world_size": world_size,
        "shardadam": __version__,
        "torch": torch.__version__,
        "aliases": contents.aliases,
    }
    if contents.optimizer is not None:
        description["optimizer"] = {
            "groups": contents.groups,
            "skipped_steps": int(contents.optimizer.skipped_steps),
            **contents.optimizer._checkpoint_seam.description(),
            "parameters": {parameter.name: _scalars(local_state(parameter.param)) for parameter in contents.owned},
        }
    return description


def _scalars(state: Mapping[str, Tensor]) -> dict[str, float | str]:
    """Returns step and bound; the bound as hexadecimal text, because it may be infinite and JSON has no infinity."""
    return {
        kind: float(state[kind]) if kind == "step" else float(state[kind]).hex()
        for kind in ("step", "bound")
        if kind in state
    }


def _add_pieces(part: Part, parameter: OwnedParameter, kind: str, key: str, spec: TensorSpec) -> None:
    """Adds this rank's pieces of a parameter (kind "parameter") or of a tensor of its state."""
    part.specs[key] = spec
    for piece in pieces_of(parameter.param):
        start = piece.start // ALIGNMENT_NUMEL if kind in formats.SCALES else piece.start
        part.writes.append(PendingWrite(key, spec, start, partial(_read, piece, kind)))


def _read(piece: Piece, kind: str) -> Tensor:
    if kind == "parameter":
        return piece.parameter()
    state = piece.state()
    if kind == "master" and "remainder" in state:
        return reference.join(piece.parameter(), state["remainder"])
    return state[kind]


def _add_replicated(part: Part, tensors: Mapping[str, Tensor], rank: int, world_size: int) -> None:
    """Adds this rank's share of tensors that are not sharded: 1/N of parameters; all buffers on rank 0, none on others.

    Parameters are equal on all ranks, buffers may differ.
    """
    turn = 0
    for key, tensor in tensors.items():
        is_parameter = isinstance(tensor, nn.Parameter)
        if rank != 0 and not is_parameter:
            continue
        repeats = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        if tensor.layout != torch.strided or tensor.device.type == "meta" or repeats:
            found = "an expanded tensor" if repeats else f"{tensor.layout} on {tensor.device}"
            raise CheckpointError(
                f"{key} cannot be saved: found {found}, expected an ordinary tensor. Give the module a tensor of its "
                "own (clone()), or register the buffer with persistent=False."
            )
        spec = part.specs[key] = spec_of(tensor)
        every = 4 * (ITEM_BYTES // spec.dtype.itemsize) if is_dense(tensor) else max(1, spec.numel)
        for start, stop in cut(0, spec.numel, every):
            if rank == (turn % world_size if is_parameter else 0):
                part.writes.append(PendingWrite(key, spec, start, partial(_read_replicated, tensor, spec, start, stop)))
            turn += int(is_parameter)


def _read_replicated(tensor: Tensor, spec: TensorSpec, start: int, stop: int) -> Tensor:
    return tensor.detach().permute(spec.order).reshape(-1)[start:stop].resolve_conj().resolve_neg()
