# SPDX-License-Identifier: Apache-2.0
"""torch's own fused Adam(W) on the runs of one shard, for any device it supports.

Everything that decides anything (learning rate as a tensor, gradient scale, found_inf, steps) is read by the kernel
where it lies: the host waits for nothing. Master weights are worked on in chunks that stay in cache on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardadam.layout import Run

_CPU_CHUNK_NUMEL = 1 << 16


def adam_runs_(
    *,
    runs: Sequence[Run],
    steps: Sequence[Tensor],
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor,
    hyperparameters: dict[str, Any],
) -> None:
    """One step on the runs of a shard, in place; where ``found_inf`` is 1 no step is taken.

    Args:
        runs: which slices of the shard take part.
        steps: t of each run, already counted up to this step, 0-dim float32 on the shard's device.
        parameter: the parameters' slice, 1-D.
        gradient: sums, 1-D, in the dtype of the moments; divided in place by ``grad_scale`` where that is given.
        master: exact values behind ``parameter``, or None where it is its own master.
        grad_scale: what gradients must be divided by, 0-dim float32.
        found_inf: 1 if any gradient on any rank is not finite, 0-dim float32.
        hyperparameters: a param group: lr, betas, eps, weight_decay, maximize, decoupled_weight_decay.
    """
    if not runs:
        return
    beta1, beta2 = hyperparameters["betas"]
    kernel = torch._fused_adamw_ if hyperparameters["decoupled_weight_decay"] else torch._fused_adam_
    options: dict[str, Any] = dict(
        lr=hyperparameters["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=hyperparameters["weight_decay"],
        eps=hyperparameters["eps"],
        amsgrad=False,
        maximize=hyperparameters["maximize"],
        grad_scale=grad_scale,
        found_inf=found_inf,
    )

    def step_(weight: Tensor, slices: Sequence[slice], run_steps: Sequence[Tensor]) -> None:
        weights, gradients, exp_avgs, exp_avg_sqs = (
            [flat[s] for s in slices] for flat in (weight, gradient, exp_avg, exp_avg_sq)
        )
        kernel(weights, gradients, exp_avgs, exp_avg_sqs, [], list(run_steps), **options)

    if master is None:
        step_(parameter, [slice(run.start, run.stop) for run in runs], steps)
        return
    for run, step in zip(runs, steps, strict=True):
        chunk_numel = _CPU_CHUNK_NUMEL if parameter.device.type == "cpu" else run.stop - run.start
        for start in range(run.start, run.stop, chunk_numel):
            chunk = slice(start, min(start + chunk_numel, run.stop))
            adopt_written_(master[chunk], parameter[chunk])
            step_(master, [chunk], [step])
            round_half_away_(parameter[chunk], master[chunk])


def adopt_written_(master: Tensor, parameter: Tensor) -> None:
    """Where ``master`` does not round to ``parameter``, somebody has written the parameter: the parameter counts."""
    rounded = torch.empty_like(parameter)
    round_half_away_(rounded, master)
    torch.where(rounded != parameter, parameter.to(master.dtype), master, out=master)


def round_half_away_(parameter: Tensor, master: Tensor) -> None:
    """``parameter``, bfloat16 or float16, becomes float32 ``master`` rounded to it, exact ties away from zero."""
    if parameter.dtype == torch.bfloat16:
        # In sign-magnitude bits, adding half a unit in the last place kept and cutting off rounds ties away from zero.
        bits = master.view(torch.int32)
        rounded = (bits + 0x8000) >> 16
        rounded.masked_fill_(master.isnan(), 0x7FC0)
        parameter.view(torch.int16).copy_(rounded)
        return
    parameter.copy_(master)
    exact = parameter.to(master.dtype)
    away = (parameter.view(torch.int16) + 1).view(parameter.dtype).to(master.dtype)
    tie = (exact.abs() < master.abs()) & (away - master == master - exact)
    parameter.copy_(torch.where(tie, away, exact))
