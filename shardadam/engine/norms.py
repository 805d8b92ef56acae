# SPDX-License-Identifier: Apache-2.0
"""Norms of single parameters, for logging: of their gradients, and of their last update relative to their weights.

Measures this rank's shards in a few passes over whole buckets, sums over ranks, and returns numbers of the host.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from shardadam.chunks import chunks
from shardadam.engine.borrowing import lent
from shardadam.engine.parameters import ShardedParameters, agreed, named_parameters
from shardadam.engine.reduction import Reducer
from shardadam.engine.step import StepEngine
from shardadam.engine.storage import FlatArena, FlatBucket, blocks_of, gradient_shard
from shardadam.engine.updating import LastStep, ParamGroups
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.ranks.agreement import exchange
from shardadam.sums.scattered import Parts, Scattered, pieces_of_shard
from shardadam.transport import Job, placement
from shardadam.update import formats, reference


class Blocks(NamedTuple):
    """Blocks of this rank's shard of a bucket: of each the param index that it belongs to, and how many of its elements
    do; int64. Padding follows.
    """

    owners: Tensor
    numels: Tensor


Rows = Callable[[FlatBucket, slice, Blocks], Sequence[Tensor]]
"""Returns tensors of some elements, given as a slice and as blocks: each (blocks, ``ALIGNMENT_NUMEL``), zero where
there is padding.
"""


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """2-norms of averaged gradients.

    Args:
        parameters: by name, in the order of the param groups, of those that have a gradient on any rank. Of parameters
            that model-parallel ranks hold parts of, the norm of the whole; of experts, those that this rank holds.
        groups: of each param group, over all ranks; over parts of the model, groups add up by their position.
        total: of all parameters of the optimizer, over all ranks and parts of the model: what ``clip_grad_norm_``
            returns. Each copy of an element counts once, however many replicas and model-parallel ranks hold it.
    """

    parameters: dict[str, float]
    groups: list[float]
    total: float


@torch.no_grad()
def gradient_norms(engine: StepEngine, param_groups: ParamGroups) -> GradientNorms:
    """Return the norms of the gradients that the next step would use. Collective over the job; waits for the device."""
    engine.refuse_in_backward("gradient_norms")
    if not engine.must_sync:
        return GradientNorms({}, [0.0] * len(param_groups), 0.0)
    parameters, reducer = engine.parameters, engine.reducer
    used = engine.sync_before("gradient_norms", param_groups, with_norm=True).used

    def rows(bucket: FlatBucket, elements: slice, blocks: Blocks) -> Sequence[Tensor]:
        return [_gradients(bucket, elements, reducer)]

    squares = _squares(parameters.buckets, len(parameters.params), rows, 1)
    names = _names(parameters, param_groups)
    of_params, of_groups = _sums_over_ranks(squares.to(used.device), names, len(param_groups), parameters, engine.job)
    scale = 1.0 if engine.inverse_scale is None else float(engine.inverse_scale)
    total = math.sqrt(math.fsum(square for (square,) in of_groups)) * scale
    has_gradient = used.tolist()
    # A pipeline's stage without trained parameters has none of its own.
    engine.warnings.check_norms(any(has_gradient) or total != 0)
    return GradientNorms(
        parameters={
            names[index]: math.sqrt(of_params[index][0]) * scale
            for index in _as_registered(parameters)
            if has_gradient[index]
        },
        groups=[math.sqrt(square) * scale for (square,) in of_groups],
        total=total,
    )


@torch.no_grad()
def update_ratios(engine: StepEngine, param_groups: ParamGroups) -> dict[str, float]:
    """Return the norm of each parameter's last update over that of its weights. Collective; waits for the device."""
    engine.averages.refuse("update_ratios()")
    engine.check_between_steps()
    if not engine.must_sync:
        return {}
    parameters, updater = engine.parameters, engine.updater
    scalars = {arena: _Scalars.of(arena, updater.last[arena]) for arena in parameters.arenas if arena in updater.last}

    def rows(bucket: FlatBucket, elements: slice, blocks: Blocks) -> Sequence[Tensor]:
        weight, update = _weight_and_update(bucket, elements, blocks.owners, scalars.get(bucket.arena))
        left_out = updater.left_out.get(bucket.index)
        if left_out is not None:
            update = update.where(left_out == 0, 0.0)
        # With eps=0, Adam makes NaN of the zeros that pad.
        is_padding = torch.arange(ALIGNMENT_NUMEL, device=weight.device) >= blocks.numels[:, None]
        return weight.masked_fill(is_padding, 0.0), update.masked_fill(is_padding, 0.0)

    may_fail = parameters.store is not None or engine.job.is_parallel  # another part's state may be offloaded
    with agreed(engine.job.control) if may_fail else nullcontext(), lent(parameters.arenas, written=False):
        squares = _squares(parameters.buckets, len(parameters.params), rows, 2)
        updater.refuse_lost_state()
    names = _names(parameters, param_groups)
    of_params, _ = _sums_over_ranks(squares.to(engine.skipped_steps.device), names, 0, parameters, engine.job)
    return {
        names[index]: _ratio(math.sqrt(update), math.sqrt(weight))
        for index in _as_registered(parameters)
        for weight, update in (of_params[index],)
    }


def _names(parameters: ShardedParameters, param_groups: ParamGroups) -> list[str]:
    """Return the names by param index that the param groups have now: a Trainer may have named them after the build.

    If several groups have the same name, as those of two models may, it follows that of its group.
    """
    named = {one.param_id: one for one in named_parameters(param_groups)}
    counts = Counter(one.name for one in named.values())
    own = [named[param.param_id] for param in parameters.params]
    return [one.name if counts[one.name] == 1 else f"param_groups[{one.group_index}].{one.name}" for one in own]


def _as_registered(parameters: ShardedParameters) -> list[int]:
    """Return param indices in the order of the param groups."""
    return sorted(range(len(parameters.params)), key=lambda index: parameters.params[index].param_id)


def _ratio(update: float, weight: float) -> float:
    if weight == 0:
        return math.inf if update > 0 else 0.0
    return update / weight


# This rank's shards


def _squares(buckets: Sequence[FlatBucket], count: int, rows_of: Rows, width: int) -> Tensor:
    """Return the sums of squares of what ``rows_of`` returns, by param index: float64 (count, width).

    By rows, then in float64, as in ``sums/stats.py``. Makes a few calls of torch for each chunk of a bucket, however
    many parameters there are: a row belongs to one.
    """
    sums: Tensor | None = None
    for bucket in buckets:
        if not bucket.shard_segments:
            continue
        of_shard = _blocks(bucket)
        for elements in chunks(0, bucket.plan.shard_numel, bucket.parameters.device):
            blocks = Blocks(*(one[blocks_of(elements)] for one in of_shard))
            norms = [
                torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
                for rows in rows_of(bucket, elements, blocks)
            ]
            squares = torch.stack(norms, dim=1).double().square_()
            if sums is None:
                sums = torch.zeros(count, width, dtype=torch.float64, device=squares.device)
            weight = bucket.arena.norm_weight
            sums.index_add_(0, blocks.owners.to(sums.device), squares.to(sums.device), alpha=weight)
    return torch.zeros(count, width, dtype=torch.float64, device="cpu") if sums is None else sums


def _blocks(bucket: FlatBucket) -> Blocks:
    """Return all blocks of this rank's shard."""
    count = bucket.plan.shard_numel // ALIGNMENT_NUMEL
    firsts = [segment.offset // ALIGNMENT_NUMEL for _, segment in bucket.shard_segments]
    lengths = [stop - first for first, stop in pairwise([0, *firsts[1:], count])]
    stops = [segment.offset + segment.numel for _, segment in bucket.shard_segments]
    rows = [[param.index for param, _ in bucket.shard_segments], lengths, stops]
    device = bucket.parameters.device
    of_segments = torch.tensor(rows, device="cpu").to(device)
    owners, ends = of_segments[[0, 2]].repeat_interleave(of_segments[1], dim=1, output_size=count)
    numels = ends - torch.arange(0, count * ALIGNMENT_NUMEL, ALIGNMENT_NUMEL, device=device)
    return Blocks(owners, numels)


def _gradients(bucket: FlatBucket, elements: slice, reducer: Reducer) -> Tensor:
    """Return ``elements`` of this rank's shard of the mean gradients, as rows."""
    gradients, scale = reducer.gradients(bucket), bucket.arena.gradient_scale
    if isinstance(gradients, Scattered):
        numels = [-1 if tensor is None else tensor.numel() for tensor in gradients.tensors]
        segments = [segment for _, segment in bucket.shard_segments]
        pieces = pieces_of_shard(segments, elements.start, elements.stop)
        flat = gradients.flat(Parts(pieces, numels, bucket.parameters.device, gradients.dtype))
    else:
        assert gradients is None, "the reducer has summed them up to measure their norm"
        flat = gradient_shard(bucket)[elements]
    rows = flat.view(-1, ALIGNMENT_NUMEL)
    return rows if scale == 1 else rows.to(torch.promote_types(rows.dtype, torch.float32)) * scale


@dataclass(frozen=True, slots=True, eq=False)
class _Scalars:
    """What the last step multiplied the parameters of an arena by: (params, 1) each, in the dtype of the arithmetic.

    Args:
        step_size: 0 for parameters that took no part.
        decay: lr times decoupled weight decay; 0 likewise.
        bounds: C after the step, of moments in 8 bits.
    """

    step_size: Tensor
    correction: Tensor
    decay: Tensor
    bounds: Tensor
    eps: float

    @classmethod
    def of(cls, arena: FlatArena, last: LastStep) -> _Scalars:
        beta1, beta2 = last.betas
        takes_part = last.used & (last.found_inf == 0)
        # Those that never took a step would divide zero by zero.
        steps = arena.counters.steps.double().clamp(min=1)
        values = [
            torch.where(takes_part, last.lr / (1 - beta1**steps), 0.0),
            (1 - beta2**steps).rsqrt(),
            torch.where(takes_part, last.lr * last.weight_decay if last.is_decoupled else 0.0, 0.0),
            arena.counters.bounds.sqrt(),
        ]
        step_size, correction, decay, bounds = (value.to(arena.format.exact_dtype)[:, None] for value in values)
        return cls(step_size, correction, decay, bounds, last.eps)


def _weight_and_update(
    bucket: FlatBucket, elements: slice, owners: Tensor, scalars: _Scalars | None
) -> tuple[Tensor, Tensor]:
    """Return ``elements`` of this rank's shard of the exact weights, and of their last update; both as rows."""
    arena = bucket.arena
    if arena.reserved is not None:
        arena.reserved.store.settle()
    shard = bucket.shard.narrow(elements)
    device = shard.parameter.device
    # Read only, so that copies for a save can wait.
    state = {name: getattr(shard, name).to(device) for name in arena.flat_state if name != formats.AVERAGE}
    weight = reference.exact_weight(shard.parameter, state.get("master"), state.get("remainder"))
    weight = weight.view(-1, ALIGNMENT_NUMEL)
    if scalars is None:
        return weight, torch.zeros_like(weight)
    owners = owners - arena.params[0].index
    m, v = (moment.view(-1, ALIGNMENT_NUMEL) for moment in formats.read_moments(state))
    if formats.SCALES[0] in state:  # as the next step will read them
        limit = scalars.bounds[owners] * v.sqrt()
        m = m.clamp(-limit, limit)
    step_size = scalars.step_size[owners]
    update = reference.last_update(
        weight,
        m,
        v,
        step_size=step_size,
        correction=scalars.correction[owners],
        decay=scalars.decay[owners],
        eps=scalars.eps,
    )
    return weight, update.where(step_size != 0, 0.0)  # with eps=0, no step at all is 0 / 0


# Sums over ranks


def _sums_over_ranks(
    squares: Tensor, names: Sequence[str], group_count: int, parameters: ShardedParameters, job: Job
) -> tuple[list[list[float]], list[list[float]]]:
    """Return sums over all ranks: by param index, over those that hold parts of it; by param group, over all ranks.

    One small all-reduce; one more for each param group with ranks of its own, and an exchange between model-parallel
    ranks. Collective over the job; waits for the device.

    Args:
        squares: of this rank's shards, each with its arena's ``norm_weight``; float64 (params, width).
        names: by param index.
    """
    count, width = squares.shape
    groups = [param.arena.group_index for param in parameters.params]
    block = squares.new_zeros(count + group_count, width)
    block[:count] = squares
    if group_count > 0 and groups:
        block[count:].index_add_(0, torch.tensor(groups, device="cpu").to(squares.device), squares)
    own = [(transport, indices, block[indices].clone()) for transport, indices in parameters.own_groups()]
    if block.numel() > 0:  # else a stage without trained parameters
        parameters.transport.all_reduce(block.view(-1)).wait()
    for transport, indices, of_own in own:
        transport.all_reduce(of_own.view(-1)).wait()
        block[indices] = of_own
    rows = block.tolist()
    of_params, of_groups = rows[:count], rows[count:]
    if job.model_parallel is None:
        return of_params, of_groups
    # By name and mesh, as stages of a pipeline may have the same names. What is no DTensor is whole on this rank.
    control, parts = job.model_parallel.control, parameters.parts
    assert control is not None
    meshes = [placement.mesh_ranks(param.parameter) for param in parameters.params]
    keys = [(name, tuple(sorted(mesh))) for name, mesh in zip(names, meshes, strict=True)]
    others = exchange((dict(zip(keys, of_params, strict=True)), of_groups), control)
    whole = []
    for key, mesh, own in zip(keys, meshes, of_params, strict=True):
        found = [of_rank[key] for of_rank, _ in others if key in of_rank] if mesh else [own]
        # The weights count copies on all of ``parts``, also outside of the mesh.
        outside = max(1, len(parts)) / max(1, len(parts & mesh))
        whole.append([math.fsum(values) * outside for values in zip(*found, strict=True)])
    absent = [0.0] * width
    by_group = zip_longest(*(groups_of_rank for _, groups_of_rank in others), fillvalue=absent)
    of_groups = [[math.fsum(values) for values in zip(*of_ranks, strict=True)] for of_ranks in by_group]
    return whole, of_groups[:group_count]
