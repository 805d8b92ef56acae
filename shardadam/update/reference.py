# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW on flat tensors in plain torch operations: the readable truth that the fast forms must equal.

Imports nothing of the project. ``python -m shardadam.update.reference`` prints the worked example of the README.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adam_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    master: Tensor | None = None,
) -> None:
    """One step of Adam (Kingma & Ba 2015, algorithm 1) or, with decoupled decay, AdamW (Loshchilov & Hutter 2019,
    algorithm 2), in place.

    Args:
        parameter: any floating dtype; with ``master`` it receives the rounded master.
        gradient: averaged over ranks and scaled; same shape.
        exp_avg, exp_avg_sq: the moments m and v, float32 or float64, same shape.
        step: t, 1 at the first step.
        master: the exact value behind a low-precision parameter. Where it does not round to ``parameter``, somebody has
            written the parameter since, and the parameter counts.
    """
    beta1, beta2 = betas
    if master is None:
        weight = parameter
    else:
        weight = master
        written = round_half_away(master, parameter.dtype) != parameter
        weight.copy_(torch.where(written, parameter.to(weight.dtype), weight))
    g = gradient.to(weight.dtype)
    if maximize:
        g = -g
    if weight_decay != 0:
        if decoupled_weight_decay:
            weight.mul_(1 - lr * weight_decay)
        else:
            g = g + weight_decay * weight
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * g)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * g * g)
    m_hat = exp_avg / (1 - beta1**step)
    v_hat = exp_avg_sq / (1 - beta2**step)
    weight.sub_(lr * m_hat / (v_hat.sqrt() + eps))
    if master is not None:
        parameter.copy_(round_half_away(master, parameter.dtype))


def round_half_away(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``value`` rounded to bfloat16 or float16, exact ties away from zero.

    torch's cast rounds exact ties to even and is the same otherwise.
    """
    nearest = value.to(dtype)
    # The next value away from zero is one more in the bits of either format.
    away = (nearest.view(torch.int16) + 1).view(dtype)
    magnitude = value.abs()
    below, above = magnitude - nearest.float().abs(), away.float().abs() - magnitude
    tie = (below > 0) & (below == above)
    return torch.where(tie, away, nearest)


def _worked_example() -> None:
    parameter, exp_avg, exp_avg_sq = torch.tensor([2.0]), torch.zeros(1), torch.zeros(1)
    print("lr 1e-3, betas (0.9, 0.999), eps 1e-8, no decay; p = 2, g = 3 twice")
    for step in (1, 2):
        adam_(parameter, torch.tensor([3.0]), exp_avg, exp_avg_sq, step=step, lr=1e-3)
        print(f"t = {step}:  m = {exp_avg.item():.6g}  v = {exp_avg_sq.item():.6g}  p = {parameter.item():.6g}")


if __name__ == "__main__":
    _worked_example()
