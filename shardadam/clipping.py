# SPDX-License-Identifier: Apache-2.0
"""``clip_grad_norm_`` over several optimizers, sharded ones and others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from shardadam.checks import arguments
from shardadam.engine import outside
from shardadam.optimizer import ShardedAdam
from shardadam.sums.stats import clip_coefficient


@torch.no_grad()
def clip_grad_norm_(optimizers: Iterable[torch.optim.Optimizer], max_norm: float | Tensor) -> Tensor:
    """Clip the norm of the gradients of several optimizers together, and make them skip the next step together.

    For interleaved pipeline stages, the networks of a GAN, or Muon beside ``ShardedAdamW``. Collective over the ranks
    of all of them: all ranks must pass optimizers in the same order. Call it after backward, and each ``step`` after
    it. If a gradient of any of them is infinite or NaN, all sharded optimizers skip their next step.

    Args:
        optimizers: ``ShardedAdam`` and ``ShardedAdamW``, without ``max_grad_norm``; others must have their averaged
            gradients in ``p.grad``, which are scaled in place (see ``ShardedAdam.average_gradients``).
        max_norm: the largest norm.

    Returns:
        The norm before clipping: 0-dim float64, on the device of the first optimizer that is sharded.

    Raises:
        ValueError: there are no optimizers, one is given twice, one has ``max_grad_norm`` and clips by itself, or one
            is in a Join context.
    """
    every = list(optimizers)
    sharded = [one for one in every if isinstance(one, ShardedAdam)]
    if not every or len({id(one) for one in every}) < len(every):
        raise ValueError(f"clip_grad_norm_: found {len(every)} optimizers, expected one or more, each once.")
    if any(one._engine.options.max_grad_norm is not None for one in sharded):
        raise ValueError(
            "clip_grad_norm_: found an optimizer with max_grad_norm, which clips its own gradients again in step(), "
            "expected None. Leave max_grad_norm out."
        )
    arguments.check_limit("max_norm", max_norm)
    if any(one._join_config.enable for one in sharded):
        raise ValueError(
            "clip_grad_norm_: found a Join context, expected none: ranks without batches repeat the methods of one "
            "optimizer only. Call optimizer.clip_grad_norm_ for each."
        )
    others = [p for one in every if one not in sharded for group in one.param_groups for p in group["params"]]
    gradients = [p.grad for p in others if p.grad is not None]
    measured = [one._measure(len(every)) for one in sharded]
    device = measured[0][0].device if measured else gradients[0].device if gradients else torch.device("cpu")
    squares = [square.to(device) for square, _ in measured]
    if len(sharded) < len(every):
        square = outside.square_of(gradients, device)
        squares.append(sharded[0]._engine.sum_parts(square, others) if sharded else square)
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64, device=device)
    coefficient = clip_coefficient(norm, max_norm)
    found_inf = norm.isfinite().logical_not().float()
    for _, found in measured:
        found_inf = torch.maximum(found_inf, found.to(device))
    for one in sharded:
        one._engine.scale_together(coefficient, found_inf)
    for gradient in gradients:
        gradient.mul_(coefficient.to(gradient.device, gradient.dtype))
    return norm
