# SPDX-License-Identifier: Apache-2.0
"""Allocates the stored state, and converts it to exact values and back: for loading, saving and inspection.

A state is a dict of flat tensors: ``exp_avg`` and ``exp_avg_sq``, their scales if they are codes, ``master`` or
``remainder`` if there is one, and ``average`` with ``ema_decay``. A step never calls anything here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shardadam import pages
from shardadam.layout import ALIGNMENT_NUMEL
from shardadam.precision import Format
from shardadam.update import reference

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
MASTERS = ("master", "remainder")
AVERAGE = "average"
STATE = (*MOMENTS, *SCALES, *MASTERS, AVERAGE)
"""All names; each is a field of ``update.Shard``."""
_NEAREST = 0x80008000  # with these random bits, stochastic rounding rounds to the nearest value


def tensors(format: Format, numel: int) -> dict[str, tuple[int, torch.dtype]]:
    """Return length and dtype of each tensor in the state of ``numel`` elements, a multiple of ``ALIGNMENT_NUMEL``."""
    exact = format.exact_dtype
    moments = {
        "fp32": (exact, exact),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "int8": (torch.int8, torch.uint8),
    }[format.moments]
    state = {name: (numel, dtype) for name, dtype in zip(MOMENTS, moments, strict=True)}
    if format.moments == "int8":
        state |= {name: (numel // ALIGNMENT_NUMEL, torch.float32) for name in SCALES}
    if format.master == "fp32":
        state["master"] = (numel, exact)
    elif format.master == "split":
        state["remainder"] = (numel, torch.int16)
    if format.has_average:
        state[AVERAGE] = (numel, exact)
    return state


def allocate(format: Format, numel: int, device: torch.device) -> dict[str, Tensor]:
    """Return a zero state of ``numel`` elements, a multiple of ``ALIGNMENT_NUMEL``. Zero bits are 0 in every format.

    On the CPU it takes memory when it is first written (``pages.zeros``).
    """
    return {name: pages.zeros(length, dtype, device) for name, (length, dtype) in tensors(format, numel).items()}


def read_moments(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return exp_avg and exp_avg_sq in float32, or in float64 if they are stored so. May return the stored tensors."""
    m, v = (state[name] for name in MOMENTS)
    if SCALES[0] in state:
        numel = m.numel()
        m_scale, v_scale = (state[name] for name in SCALES)
        m, v = reference.decode_moments(_pad(m), _pad(v), m_scale, v_scale, bound_squared=torch.inf)
        return m[:numel], v[:numel]
    exact = torch.promote_types(m.dtype, torch.float32)
    return m.to(exact), v.to(exact)


def write_moments_(state: Mapping[str, Tensor], exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Store ``exp_avg`` and ``exp_avg_sq``, each value rounded to the nearest that the format can hold."""
    random = torch.full((), _NEAREST, dtype=torch.int64, device=exp_avg.device)
    if SCALES[0] in state:
        m, v = _pad(exp_avg.float()), _pad(exp_avg_sq.float())
        m_codes, v_codes, *scales = reference.encode_moments(m, v, random.expand_as(m).contiguous())
        values = [m_codes[: exp_avg.numel()], v_codes[: exp_avg.numel()], *scales]
        for name, value in zip((*MOMENTS, *SCALES), values, strict=True):
            state[name].copy_(value)
        return
    for name, value in zip(MOMENTS, (exp_avg, exp_avg_sq), strict=True):
        target = state[name]
        if target.dtype == torch.bfloat16 and value.dtype != torch.bfloat16:
            value = reference.round_stochastically(value.float(), target.dtype, random & 0xFFFF)
        target.copy_(value)


def read_master(state: Mapping[str, Tensor], parameter: Tensor) -> Tensor | None:
    """Return the exact values behind ``parameter``, on its device; None if the state has neither master nor remainder.

    Offloaded state may be on another device.
    """
    if "remainder" in state:
        return reference.join(parameter, state["remainder"].to(parameter.device))
    return state["master"].to(parameter.device) if "master" in state else None


def write_master_(state: Mapping[str, Tensor], parameter: Tensor, master: Tensor) -> None:
    """Store ``master`` as the exact values behind ``parameter``.

    Where ``master`` does not round to ``parameter``, the parameter is the exact value.
    """
    if "remainder" in state:
        rounded, remainder = reference.split(master.float(), parameter.dtype)
        state["remainder"].copy_(torch.where(rounded == parameter, remainder, 0))
    elif "master" in state:
        state["master"].copy_(master)


def is_written(parameter: Tensor, master: Tensor) -> Tensor:
    """Return where ``parameter`` was written since ``master`` was: where ``master`` does not round to it."""
    return reference.round_half_away(master, parameter.dtype) != parameter


def _pad(flat: Tensor) -> Tensor:
    """Return ``flat``, padded with zeros to whole blocks."""
    missing = -flat.numel() % ALIGNMENT_NUMEL
    return torch.cat([flat, flat.new_zeros(missing)]) if missing else flat
