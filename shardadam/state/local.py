# SPDX-License-Identifier: Apache-2.0
"""This rank's shards of the optimizer's state as views, and as torch's dict of tensors. Local."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shardadam.engine.storage import FlatArena, ShardedParam
from shardadam.engine.strides import memory_order
from shardadam.layout import ALIGNMENT_NUMEL, Span
from shardadam.state.flat_shard import FlatShard, Runs, dimension_order, in_shape, runs_of_whole
from shardadam.transport import placement
from shardadam.update import formats, reference

SCALARS = ("step", "bound", "n_averaged")
"""The names of numbers in ``local_state``: 0-dim."""
CODES = {"exp_avg": "exp_avg_code", "exp_avg_sq": "exp_avg_sq_code"}


def local_state(param: ShardedParam) -> dict[str, Tensor]:
    """Returns views of this rank's elements of the parameter's state, in memory order and in the format they are stored
    in. All are 1-D, except ``SCALARS``.
    """
    arena = param.arena
    state = {"step": arena.counters.steps[param.arena_index]}
    for name, flat in arena.state.items():
        state[name] = flat[param.block_slice if name in formats.SCALES else param.state_slice]
    if arena.format.moments == "int8":
        state["bound"] = arena.counters.bounds[param.arena_index]
    if arena.counters.n_averaged is not None:
        state["n_averaged"] = arena.counters.n_averaged[param.arena_index]
    return state


def saved_name(name: str, arena: FlatArena) -> str:
    """Returns the name under which torch sees a tensor of the state.

    Codes have other names than moments, because DCP and torch's optimizers convert dtypes and would read codes as
    moments. A remainder is saved as the master it encodes.
    """
    if name == "remainder":
        return "master"
    return CODES.get(name, name) if arena.format.moments == "int8" else name


def torch_state(param: ShardedParam) -> dict[str, Tensor]:
    """Returns what torch keeps in ``optimizer.state[p]``: the local state, with a remainder as it is stored.

    The keys are those of ``saved_state``: set_optimizer_state_dict drops other keys of a flattened dict.
    """
    return {saved_name(name, param.arena): tensor for name, tensor in local_state(param).items()}


def state_names(arena: FlatArena) -> list[str]:
    """Returns the keys of ``torch_state`` of the arena's parameters."""
    scalars = {"bound": arena.format.moments == "int8", "n_averaged": arena.counters.n_averaged is not None}
    names = ["step", *arena.flat_state, *(name for name, is_there in scalars.items() if is_there)]
    return [saved_name(name, arena) for name in names]


def saved_state(param: ShardedParam) -> dict[str, Tensor]:
    """Returns the parameter's entry of ``optimizer.state_dict()``: tensors of its shape, each with this rank's spans.

    They share memory with the optimizer, except a ``master`` that is computed from a remainder.
    """
    param.has_views = True
    saved: dict[str, Tensor] = {}
    for name, tensor in local_state(param).items():
        key = saved_name(name, param.arena)
        if name in SCALARS:
            saved[key] = tensor
            continue
        if name == "remainder":
            parameter = own_elements(param, param.local.detach())
            tensor = reference.join(parameter, tensor.to(parameter.device))
        saved[key] = _whole_or_shard(name, tensor, param)
    return saved


def _whole_or_shard(name: str, local: Tensor, param: ShardedParam) -> Tensor:
    """Returns a ``FlatShard``, or a tensor like the parameter where this rank holds all that it has of it: without
    other data-parallel ranks, or if it is empty.
    """
    shape, runs = place_in_state(name, param)
    order = (0,) if name in formats.SCALES else dimension_order(param.local)
    is_shared = param.arena.transport.world_size > 1 or (name in formats.SCALES and runs != runs_of_whole(shape))
    if is_shared and torch.Size(shape).numel() > 0:
        return FlatShard(local, state_spans(name, param), shape, order, runs)
    if name in formats.SCALES:
        return local
    return placement.like(param.parameter, in_shape(local, param.shape, order))


def place_in_state(name: str, param: ShardedParam) -> tuple[tuple[int, ...], Runs]:
    """Returns the shape of a tensor of the state, and where in it the part lies that this rank has of the parameter.

    Each scale belongs to a block of such a part. Scales have one dimension, in which those of all parts follow each
    other.
    """
    runs = placement.runs_of(param.parameter)
    if name not in formats.SCALES:
        return tuple(param.parameter.shape), runs
    if param.local is param.parameter:
        return (block_count(param),), (((0, block_count(param)),),)
    counts = {part: -(-_numel(part) // ALIGNMENT_NUMEL) for part in placement.runs_of_mesh(param.parameter)}
    before = sum(count for part, count in counts.items() if part < runs) if _numel(runs) > 0 else 0
    return (sum(counts.values()),), (((before, block_count(param)),),)


def _numel(runs: Runs) -> int:
    return math.prod(sum(length for _, length in of_dim) for of_dim in runs)


def state_spans(name: str, param: ShardedParam) -> list[Span]:
    """Returns the spans of the part that a tensor of ``local_state`` holds; none for numbers."""
    if name in SCALARS:
        return []
    return block_spans(param) if name in formats.SCALES else spans_of(param)


def spans_of(param: ShardedParam) -> list[Span]:
    """Returns the spans of the parameter that lie in this rank's shards, with adjacent ones joined."""
    joined: list[Span] = []
    for segment in param.shard_segments:
        if joined and joined[-1].stop == segment.start:
            joined[-1] = Span(joined[-1].start, joined[-1].numel + segment.numel)
        else:
            joined.append(Span(segment.start, segment.numel))
    return joined


def block_spans(param: ShardedParam) -> list[Span]:
    """Returns ``spans_of`` in blocks of ``ALIGNMENT_NUMEL`` elements; spans start at multiples of it."""
    return [Span(span.start // ALIGNMENT_NUMEL, -(-span.numel // ALIGNMENT_NUMEL)) for span in spans_of(param)]


def block_count(param: ShardedParam) -> int:
    return -(-param.shape.numel() // ALIGNMENT_NUMEL)


def own_elements(param: ShardedParam, whole: Tensor) -> Tensor:
    """Returns this rank's elements of a tensor of the parameter's shape, 1-D."""
    return take(memory_order(whole, param.local), spans_of(param))


def take(flat: Tensor, spans: Sequence[Span]) -> Tensor:
    parts = [flat[span.start : span.stop] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else flat[:0]
