# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW, and every format of the stored state, in plain torch operations: defines what the fast forms compute.

Read ``step_`` first: it decodes what is stored to float32, ``adam_`` does the arithmetic, and the result is encoded
again. Imports nothing of the project. ``python -m shardadam.update.reference`` prints a worked example.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BLOCK_NUMEL = 128
"""Number of elements that share one scale when moments are stored in 8 bits."""
GOLDEN_WORD = 0x9E3779B9
"""2^32 over the golden ratio: an odd constant without a pattern, added to seeds and to words that must differ."""


def step_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    master: Tensor | None = None,
    remainder: Tensor | None = None,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
    bound_squared: float = math.inf,
    random: Tensor | None = None,
    average: Tensor | None = None,
    n_averaged: int = 0,
    ema_decay: float = 0.0,
    **hyperparameters: Any,
) -> None:
    """Take one step on a flat tensor in any format, in place.

    Args:
        parameter: 1-D, any floating dtype. Below float32 it has a ``master`` or a ``remainder``, or is rounded
            stochastically.
        gradient: averaged over ranks, and scaled; same shape.
        exp_avg, exp_avg_sq: the moments m and v: float32 or float64; bfloat16; or codes, int8 and uint8, with
            ``exp_avg_scale`` and ``exp_avg_sq_scale``.
        step: t; 1 at the first step.
        master: float32. Where it does not round to ``parameter``, the user has written the parameter since, and the
            parameter replaces it.
        remainder: int16; with the parameter's bits it makes a float32 master (``join``).
        exp_avg_scale, exp_avg_sq_scale: float32, one for each ``BLOCK_NUMEL`` elements.
        bound_squared: C^2 after the step before (``bound_squared_after``); used for 8-bit moments only.
        random: int64, 32 random bits for each element (``random_bits``); needed for stochastic rounding.
        average: of the exact weights, float32 or float64; None: there is none.
        n_averaged, ema_decay: as in ``average_``. A parameter that takes no step is averaged by ``average_`` alone.
        hyperparameters: those of ``adam_``.
    """
    weight = exact_weight(parameter, master, remainder)
    if exp_avg_scale is not None and exp_avg_sq_scale is not None:
        m, v = decode_moments(exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale, bound_squared)
    else:
        m, v = exp_avg.to(weight.dtype), exp_avg_sq.to(weight.dtype)

    adam_(weight, gradient.to(weight.dtype), m, v, step=step, **hyperparameters)

    if master is not None:
        master.copy_(weight)
        parameter.copy_(round_half_away(weight, parameter.dtype))
    elif remainder is not None:
        for target, value in zip((parameter, remainder), split(weight, parameter.dtype), strict=True):
            target.copy_(value)
    elif parameter.dtype == weight.dtype:
        parameter.copy_(weight)
    else:
        assert random is not None
        parameter.copy_(round_stochastically(weight, parameter.dtype, second_word(random) & 0xFFFF))
        weight = parameter.to(weight.dtype)  # nothing more exact is kept
    if average is not None:
        average_(average, weight, n_averaged=n_averaged, ema_decay=ema_decay)
    if exp_avg_scale is not None and exp_avg_sq_scale is not None:
        assert random is not None
        encoded = encode_moments(m, v, random)
        for target, value in zip((exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale), encoded, strict=True):
            target.copy_(value)
    elif exp_avg.dtype == weight.dtype:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
    else:
        assert random is not None
        exp_avg.copy_(round_stochastically(m, exp_avg.dtype, random & 0xFFFF))
        exp_avg_sq.copy_(round_stochastically(v, exp_avg_sq.dtype, random >> 16))


# Arithmetic


def adam_(
    weight: Tensor,
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
) -> None:
    """Take one step in place: Adam (Kingma & Ba 2015, algorithm 1), or AdamW (Loshchilov & Hutter 2019, algorithm 2)
    with ``decoupled_weight_decay``.

    Args:
        weight, gradient, exp_avg, exp_avg_sq: of one shape and dtype, float32 or float64.
        step: t; 1 at the first step.
    """
    beta1, beta2 = betas
    g = -gradient if maximize else gradient
    if decoupled_weight_decay:
        weight.mul_(1 - lr * weight_decay)
    elif weight_decay != 0:
        g = g + weight_decay * weight
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * g)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * g * g)
    step_size = lr / (1 - beta1**step)
    correction = 1 / math.sqrt(1 - beta2**step)
    weight.sub_(step_size * exp_avg / (square_root(exp_avg_sq) * correction + eps))


def last_update(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step_size: Tensor | float,
    correction: Tensor | float,
    decay: Tensor | float,
    eps: float,
) -> Tensor:
    """Return what ``adam_`` has just added to ``weight``, from the values that it has left; up to rounding.

    Args:
        weight, exp_avg, exp_avg_sq: after the step.
        step_size, correction: of that step, as ``adam_`` computes them.
        decay: lr times the coefficient of decoupled weight decay; 0 without it.
    """
    moved = step_size * exp_avg / (exp_avg_sq.sqrt() * correction + eps)
    before = (weight + moved) / (1 - decay)
    return -(moved + decay * before)


def average_(average: Tensor, weight: Tensor, *, n_averaged: int, ema_decay: float) -> None:
    """Move the exponential moving average of exact weights towards ``weight``, in place.

    As torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn: the first average is a copy.

    Args:
        average, weight: of one shape and dtype, float32 or float64.
        n_averaged: how many averages were made before.
        ema_decay: d in ``d average + (1 - d) weight``; at least 0 and less than 1.
    """
    if n_averaged == 0 or ema_decay == 0:
        average.copy_(weight)
    else:
        average.add_((weight - average) * (1 - ema_decay))


def square_root(value: Tensor) -> Tensor:
    """Return the correctly rounded square root; torch.sqrt of float32 on the CPU is not correctly rounded."""
    return value.double().sqrt().to(value.dtype)


# Master weights


def exact_weight(parameter: Tensor, master: Tensor | None, remainder: Tensor | None) -> Tensor:
    """Return the exact values behind a parameter. Where it was written since its master was, it is the exact value."""
    if master is not None:
        written = round_half_away(master, parameter.dtype) != parameter
        return torch.where(written, parameter.to(master.dtype), master)
    if remainder is not None:
        return join(parameter, remainder)
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def round_half_away(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 ``value`` to bfloat16 or float16, exact ties away from zero.

    torch's cast rounds exact ties to even and is the same otherwise.
    """
    nearest = value.to(dtype)
    # In both formats, the bits plus one are the next value away from zero.
    away = (nearest.view(torch.int16) + 1).view(dtype)
    magnitude = value.abs()
    below, above = magnitude - nearest.float().abs(), away.float().abs() - magnitude
    tie = (below > 0) & (below == above)
    return torch.where(tie, away, nearest)


def split(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split float32 ``master`` into a parameter of ``dtype``, rounded half away from zero, and an int16 remainder.

    bfloat16: the remainder is the low 16 bits of the master. ``join`` restores every master bit for bit, except a NaN
    whose high bits alone would be an infinity (a signalling one, which no arithmetic makes): it becomes a quiet NaN.
    float16: the remainder counts units of 2^-16 of the parameter's last place, away from zero; exact where
    ``abs(master) >= 2**-17``.
    """
    if dtype == torch.bfloat16:
        bits = master.view(torch.int32)
        high = (bits + 0x8000) >> 16
        high = torch.where(master.isnan(), bits >> 16, high)
        high = torch.where(master.isnan() & (high & 0x7F == 0), high | 0x40, high)
        return high.to(torch.int16).view(dtype), bits.to(torch.int16)
    parameter = round_half_away(master, dtype)
    units = (master.abs() - parameter.float().abs()) / (float16_ulp(parameter.float()) * 2.0**-16)
    units = torch.where(units.isfinite(), (units + 0.5).floor().clamp(max=32767.0), 0.0)
    return parameter, units.to(torch.int16)


def join(parameter: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 master of a parameter and its remainder; the inverse of ``split``.

    The remainder is used only where the result splits into this parameter again. Elsewhere the user has written the
    parameter since (zeros, say), and the parameter is the master.
    """
    if parameter.dtype == torch.bfloat16:
        high = parameter.view(torch.int16).to(torch.int32) << 16
        master = (high + remainder.to(torch.int32)).view(torch.float32)
        of_nan = (high | (remainder.to(torch.int32) & 0xFFFF)).view(torch.float32)
        return torch.where(master.isnan(), torch.where(parameter.isnan(), of_nan, parameter.float()), master)
    value = parameter.float()
    magnitude = value.abs() + remainder.float() * (float16_ulp(value) * 2.0**-16)
    master = torch.where(value.signbit(), -magnitude, magnitude)
    same = round_half_away(master, parameter.dtype).view(torch.int16) == parameter.view(torch.int16)
    return torch.where(same, master, value)


def float16_ulp(value: Tensor) -> Tensor:
    """Return the unit in the last place of float16 at float32 ``value``, as float32; also for subnormal float16."""
    exponent = (value.view(torch.int32) >> 23 & 0xFF).clamp(min=127 - 14)
    return (exponent - 10 << 23).view(torch.float32)


# Stochastic rounding


def mix(word: Tensor | int) -> Tensor | int:
    """Hash a 32-bit word with "lowbias32" by C. Wellons, a bijection whose output shows no pattern of its input."""
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D & 0xFFFFFFFF
    word = word ^ (word >> 15)
    word = word * 0x846CA68B & 0xFFFFFFFF
    return word ^ (word >> 16)


def random_bits(positions: Tensor, *, seed: int, step: int, param_id: int) -> Tensor:
    """Return 32 random bits, int64, for each of ``positions`` (int64): the offsets of elements in their parameter.

    Args:
        seed: any int; of ``Precision``.
        step: t of the parameter.
        param_id: the parameter's position in ``param_groups``, counted over all groups.
    """
    key = mix((seed + GOLDEN_WORD) & 0xFFFFFFFF)
    key = mix((key + step) & 0xFFFFFFFF)
    key = mix((key + param_id) & 0xFFFFFFFF)
    return mix(positions & 0xFFFFFFFF ^ key)  # type: ignore[return-value]


def second_word(random: Tensor) -> Tensor:
    """Return 32 more random bits for each element, from the first ones."""
    return mix(random + GOLDEN_WORD & 0xFFFFFFFF)  # type: ignore[return-value]


def round_stochastically(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round float32 ``value`` down or up to bfloat16 or float16, so that the mean over all 16-bit ``random`` is
    ``value``.

    Finite values past the largest bfloat16 become the largest; infinities and NaNs stay as they are.
    """
    if dtype == torch.bfloat16:
        bits = value.view(torch.int32)
        rounds = bits & 0x7FFFFFFF < 0x7F7F0000
        bits = torch.where(rounds, bits + random.to(torch.int32), bits)
        return (bits >> 16).to(torch.int16).view(dtype)
    ulp = float16_ulp(value)
    units = value.abs() / ulp
    whole = units.floor()
    up = random.float() * 2.0**-16 < units - whole
    return torch.where(value.isfinite(), ((whole + up.float()) * ulp).copysign(value), value).to(dtype)


# 8-bit moments

LARGEST_M, LARGEST_V = 127, 255
LARGEST_ROOT = 2.0**63
"""The largest square root of v that is stored; a larger v saturates at its square."""


def encode_moments(exp_avg: Tensor, exp_avg_sq: Tensor, random: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encode float32 moments as int8 and uint8 codes and a float32 scale of each block, for m and for v.

    The code of m is its signed square root, the code of v its fourth root, in units of the scale. A v of zero has the
    code 0, any other v at least 1.
    """
    m, root = exp_avg.view(-1, BLOCK_NUMEL), square_root(exp_avg_sq).clamp(max=LARGEST_ROOT).view(-1, BLOCK_NUMEL)
    random = random.view(-1, BLOCK_NUMEL)
    m_codes, m_scale = encode_root(m.abs(), LARGEST_M, random & 0xFFFF)
    v_codes, v_scale = encode_root(root, LARGEST_V, random >> 16)
    m_codes = torch.where(m < 0, -m_codes, m_codes)
    v_codes = torch.where(root > 0, v_codes.clamp(min=1), v_codes)
    return m_codes.to(torch.int8).flatten(), v_codes.to(torch.uint8).flatten(), m_scale, v_scale


def encode_root(value: Tensor, largest: int, random: Tensor) -> tuple[Tensor, Tensor]:
    """Encode ``value >= 0``, whose rows share a scale each, as codes c (whole numbers in float32) with ``value`` about
    ``c^2 scale``: the mean of ``c^2 scale`` over all 16-bit ``random`` is ``value``.
    """
    scale = value.amax(dim=1) * (1 / largest**2)
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 0.0)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    units = value * inverse[:, None]
    code = square_root(units).floor().clamp(max=largest)
    up = random.float() * 2.0**-16 * (2 * code + 1) < units - code * code
    return (code + up.float()).clamp(max=largest), scale


def decode_moments(
    m_codes: Tensor, v_codes: Tensor, m_scale: Tensor, v_scale: Tensor, bound_squared: float
) -> tuple[Tensor, Tensor]:
    """Decode m and v to float32, and clamp m to ``abs(m) <= C sqrt(v)``, which holds for exact moments."""
    m, c = m_codes.float().view(-1, BLOCK_NUMEL), v_codes.float().view(-1, BLOCK_NUMEL)
    m = m * m.abs() * m_scale[:, None]
    root = c * c * v_scale[:, None]
    if math.sqrt(bound_squared) <= torch.finfo(torch.float32).max:  # an infinite bound times 0 would be NaN
        limit = math.sqrt(bound_squared) * root
        m = m.clamp(-limit, limit)
    return m.flatten(), (root * root).flatten()


def bound_squared_after(bound_squared: float, betas: tuple[float, float]) -> float:
    """Return C_t^2 from C_{t-1}^2, such that ``abs(m_t) <= C_t sqrt(v_t)`` for all gradients; C_0 = 0.

    By Cauchy-Schwarz: ``b1 |m| + (1 - b1) |g| <= (b1 C / sqrt(b2)) sqrt(b2 v) + ((1 - b1) / sqrt(1 - b2)) sqrt(1 - b2)
    |g|``, and the two second factors are the sides of a right triangle with hypotenuse ``sqrt(v_t)``. Holds for any
    sequence of betas. With b2 = 0 there is no bound (infinity), unless b1 = 0.
    """
    beta1, beta2 = betas
    if beta1 * bound_squared == 0 or beta1 == 0:
        kept = 0.0
    else:
        kept = beta1**2 / beta2 * bound_squared if beta2 > 0 else math.inf
    return kept + (1 - beta1) ** 2 / (1 - beta2)


def bound_squared_at(step: float, betas: tuple[float, float]) -> float:
    """Return C^2 after ``step`` steps with the same betas in all of them: the sum of a geometric series."""
    beta1, beta2 = betas
    if step == 0:
        return 0.0
    first = (1 - beta1) ** 2 / (1 - beta2)
    if beta1 == 0 or step == 1:
        return first
    if beta2 == 0:
        return math.inf
    ratio = beta1**2 / beta2
    exponent = step * math.log(ratio)
    if ratio == 1:
        return first * step
    return first * math.expm1(exponent) / (ratio - 1) if exponent < 700 else math.inf


def _worked_example() -> None:
    parameter, gradient = torch.tensor([2.0], device="cpu"), torch.tensor([3.0], device="cpu")
    exp_avg, exp_avg_sq = torch.zeros_like(parameter), torch.zeros_like(parameter)
    print("lr 1e-3, betas (0.9, 0.999), eps 1e-8, no decay; p = 2, g = 3 twice")
    for step in (1, 2):
        adam_(parameter, gradient, exp_avg, exp_avg_sq, step=step, lr=1e-3)
        print(f"t = {step}:  m = {exp_avg.item():.6g}  v = {exp_avg_sq.item():.6g}  p = {parameter.item():.6g}")


if __name__ == "__main__":
    _worked_example()
