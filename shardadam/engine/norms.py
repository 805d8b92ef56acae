# SPDX-License-Identifier: Apache-2.0
"""2-norms of single parameters, for logging: of gradients, of weights and of the last update.

Measures this rank's shards, sums over ranks, and returns numbers of the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.engine.parameters import ShardedParameters
from shardadam.engine.reduction import Reducer
from shardadam.engine.step import StepEngine
from shardadam.engine.storage import ShardedParam, gradient_shard
from shardadam.engine.updating import ParamGroups
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.ranks.agreement import exchange
from shardadam.sums.scattered import Scattered
from shardadam.transport import Job, Transport


@dataclass(frozen=True, slots=True)
class GradientNorms:
    """2-norms of the averaged gradients, before clipping and without the loss scale.

    Args:
        parameters: by name; of those that have a gradient on any rank.
        groups: of each param group.
        total: of all parameters.
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
    parameters = engine.parameters
    used = engine.sync_before("gradient_norms", param_groups, with_norm=True).used
    sums = summed_over_ranks(_squares_of_gradients(parameters, engine.reducer), parameters, engine.job, used.device)
    scale = 1.0 if engine.inverse_scale is None else float(engine.inverse_scale)
    groups = [0.0] * len(param_groups)
    for param in parameters.params:
        groups[param.arena.group_index] += sums[param.name][0]
    has_gradient = used.tolist()
    return GradientNorms(
        parameters={
            param.name: math.sqrt(sums[param.name][0]) * scale
            for param in parameters.params
            if has_gradient[param.index]
        },
        groups=[math.sqrt(square) * scale for square in groups],
        total=math.sqrt(math.fsum(groups)) * scale,
    )


def _squares_of_gradients(parameters: ShardedParameters, reducer: Reducer) -> dict[int, Tensor]:
    """Return the sums of squares of this rank's shards of the mean gradients, by param index; 1-D, of one element."""
    squares: dict[int, Tensor] = {}
    for bucket in parameters.buckets:
        gradients, scale = reducer.gradients(bucket), bucket.arena.gradient_scale
        for param, segment in bucket.shard_segments:
            flat: Tensor | None
            if isinstance(gradients, Scattered):
                flat = gradients.slice(param.arena_index, segment.start, segment.start + segment.numel)
            else:
                assert gradients is None, "the reducer has summed them up to measure their norm"
                flat = gradient_shard(bucket)[segment.offset : segment.offset + segment.numel]
            if flat is not None:
                _add(squares, param, [sum_of_squares(flat) * scale**2])
    return squares


def sum_of_squares(flat: Tensor) -> Tensor:
    """Return the sum of squares of a 1-D tensor, 0-dim float64: by rows, then in float64, as in ``sums/stats.py``."""
    exact = torch.promote_types(flat.dtype, torch.float32)
    whole = flat.numel() // ALIGNMENT_NUMEL * ALIGNMENT_NUMEL
    parts = [flat[:whole].view(-1, ALIGNMENT_NUMEL), flat[whole:].view(1, -1)]
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=exact) for part in parts if part.numel() > 0]
    return torch.cat(norms).double().square().sum() if norms else flat.new_zeros((), dtype=torch.float64)


def _add(sums: dict[int, Tensor], param: ShardedParam, values: Sequence[Tensor]) -> None:
    new = torch.stack(list(values))
    before = sums.get(param.index)
    sums[param.index] = new if before is None else before + new


def summed_over_ranks(
    values: Mapping[int, Tensor], parameters: ShardedParameters, job: Job, device: torch.device
) -> dict[str, list[float]]:
    """Return sums over all ranks that hold a part of a parameter, by its name. Collective; waits for the device.

    Args:
        values: by param index: of this rank's shard, 1-D float64, as many of each; absent ones are zeros.
    """
    width = next((len(value) for value in values.values()), 1)
    block = torch.zeros(len(parameters.params), width, dtype=torch.float64, device=device)
    for index, value in values.items():
        # Replicas, and model-parallel ranks with copies, add the same numbers.
        block[index] = value.to(device) * parameters.params[index].arena.norm_weight
    of_transport: dict[Transport, list[slice]] = {}
    for arena in parameters.arenas:
        # Ranks with other parts of a `fully_shard` parameter are those of the optimizer.
        transport = parameters.transport if arena.is_borrowed else arena.transport
        of_transport.setdefault(transport, []).append(arena.indices)
    for transport, slices in of_transport.items():
        part = torch.cat([block[indices] for indices in slices])
        transport.all_reduce(part).wait()
        for indices, summed in zip(slices, part.split([one.stop - one.start for one in slices]), strict=True):
            block[indices] = summed
    sums = dict(zip((param.name for param in parameters.params), block.tolist(), strict=True))
    if job.model_parallel is None:
        return sums
    assert job.model_parallel.control is not None
    others = [one for one in exchange(sums, job.model_parallel.control)]
    return {
        name: [math.fsum(parts) for parts in zip(*(one[name] for one in others if name in one), strict=True)]
        for name in sums
    }
