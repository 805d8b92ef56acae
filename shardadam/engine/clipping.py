# SPDX-License-Identifier: Apache-2.0
"""Clipping that one coefficient for all gradients cannot express: by value, by other norms, or of some parameters only.

Works on this rank's gradient shards, after the reducer has summed them up. Does not wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardadam.chunks import chunks
from shardadam.engine.storage import FlatBucket, ShardedParam, gradient_shard
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.transport import Job, Transport


def buckets_of(params: Sequence[ShardedParam]) -> list[FlatBucket]:
    """Return all buckets that hold a part of any of the params, by index."""
    buckets = {bucket.index: bucket for param in params for bucket in param.buckets}
    return [buckets[index] for index in sorted(buckets)]


@torch.no_grad()
def total_norm(
    params: Sequence[ShardedParam], norm_type: float, transport: Transport, job: Job, device: torch.device
) -> Tensor:
    """Return the norm of the gradients of all params together, as torch.nn.utils.get_total_norm does.

    Collective over the job.

    Args:
        params: those of this rank.
        norm_type: p of the p-norm, positive; ``math.inf`` for the largest absolute value.

    Returns:
        0-dim float64 on ``device``.
    """
    is_max = norm_type == math.inf
    # The transports only sum. To get the largest value, each rank of the job has an element of its own.
    block = torch.zeros(job.world_size if is_max else 1, dtype=torch.float64, device=device)
    mine = block[job.rank] if is_max else block[0]
    for gradient, scale, weight in _gradients(params):
        # By rows, then in float64, as in sums/stats.py.
        exact = torch.promote_types(gradient.dtype, torch.float32)
        norms = torch.linalg.vector_norm(gradient.view(-1, ALIGNMENT_NUMEL), norm_type, dim=1, dtype=exact)
        norms = norms.double().to(device)
        norms = norms if scale == 1 else norms * scale
        if is_max:
            torch.maximum(mine, norms.max(), out=mine)
        else:
            mine += norms.pow(norm_type).sum() * weight
    transport.all_reduce(block).wait()
    job.sum_parts_(block)
    return block.max() if is_max else block[0].pow(1 / norm_type)


@torch.no_grad()
def scale_(params: Sequence[ShardedParam], coefficient: Tensor) -> None:
    """Multiply this rank's shards of the gradients of ``params`` by ``coefficient``, of one element; round once."""
    for gradient, _, _ in _gradients(params):
        exact = torch.promote_types(gradient.dtype, torch.float32)
        factor = coefficient.to(gradient.device, exact)
        if gradient.dtype == exact:
            gradient.mul_(factor)
            continue
        for chunk in chunks(0, gradient.numel(), gradient.device):
            gradient[chunk].copy_(gradient[chunk].to(exact) * factor)


@torch.no_grad()
def clamp_(params: Sequence[ShardedParam], limit: float | Tensor) -> None:
    """Clamp this rank's shards of the gradients of ``params`` to [-limit, limit]; NaN stays NaN.

    As with torch's clip_grad_value_, the limit is rounded to the dtype of the shard.
    """
    if isinstance(limit, Tensor) and limit.device.type == "cpu":
        limit = float(limit)  # a copy to the device would wait for it
    for gradient, scale, _ in _gradients(params):
        bound = (limit / scale).to(gradient) if isinstance(limit, Tensor) else float(limit) / scale
        gradient.clamp_(-bound, bound)  # type: ignore[arg-type]  # both are tensors, or both numbers


@torch.no_grad()
def unscale_(params: Sequence[ShardedParam], inverse_scale: Tensor) -> None:
    """Multiply what this rank holds of ``p.grad`` by ``inverse_scale``, 1 / loss scale, of one element.

    Raises:
        ValueError: a gradient is float16. Nothing has been written.
    """
    gradients = [(param, param.gradient) for param in params]
    for param, gradient in gradients:
        if gradient is not None and gradient.dtype == torch.float16:
            raise ValueError(
                f"unscale_: the gradient of {param.name!r} is float16 and would underflow in p.grad. Build "
                'the optimizer with gradient_sync="backward", or leave unscaling to GradScaler.step.'
            )
    for _, gradient in gradients:
        if gradient is not None:
            gradient.mul_(inverse_scale.to(gradient.device))


def _gradients(params: Sequence[ShardedParam]) -> Iterator[tuple[Tensor, float, float]]:
    """Yield the parts of the gradients in this rank's shards, each with the zeros that pad it to whole blocks; what
    they must be multiplied by to be means; and their weight in sums over all ranks.
    """
    wanted = {param.index for param in params}
    for bucket in buckets_of(params):
        for param, segment in bucket.shard_segments:
            if param.index in wanted:
                numel = -(-segment.numel // ALIGNMENT_NUMEL) * ALIGNMENT_NUMEL
                gradient, arena = gradient_shard(bucket)[segment.offset : segment.offset + numel], bucket.arena
                yield gradient, arena.gradient_scale, arena.norm_weight
