# SPDX-License-Identifier: Apache-2.0
"""Number formats of the optimizer state and of gradients, on the wire and in shards. Data only: converts nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

Moments = Literal["fp32", "bf16", "int8"]
Master = Literal["auto", "split", "fp32", "none"]
Accumulate = Literal["wire", "fp32"]
Gradients = Literal["auto", "fp32", "bf16"]

_PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHOICES = {
    "moments": get_args(Moments),
    "master": get_args(Master),
    "accumulate": get_args(Accumulate),
    "gradients": get_args(Gradients),
}
_EXACT = {"moments": ("fp32",), "gradients": ("auto", "fp32")}
"""By field: the formats that lose nothing of a float64 parameter."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats of an optimizer's state, and of its gradients on the wire and in shards.

    Args:
        moments: format of exp_avg and exp_avg_sq. ``"fp32"``: 4 bytes each, exact (8 bytes for float64 parameters,
            which have no other format). ``"bf16"``: 2 bytes each, rounded stochastically. ``"int8"``: 1 byte each and
            a float32 scale for every 128 elements, rounded stochastically in their roots; no quantisation can make a
            step larger than exact Adam's bound.
        master: format of the exact value of a bfloat16 or float16 parameter. Other parameters are their own master.
            ``"fp32"``: a float32 copy, 4 bytes. ``"split"``: 16 bits that, with the parameter's own, form the float32
            master, 2 bytes. Equal to "fp32" bit for bit for bfloat16, and for float16 values of at least 2^-17.
            ``"none"``: no master, the parameter is rounded stochastically. ``"auto"``: "split", but "fp32" for float16
            on the CPU, where that is faster.
        reduce: dtype of gradients on the wire; None: the gradient's own.
        accumulate: dtype in which gradients are summed over ranks. ``"wire"``: whatever is fastest; NCCL sums in the
            dtype on the wire. ``"fp32"``: float32 (float64 for float64 parameters), in rank order, by all-to-all and a
            local sum, with any backend. With Gloo, "wire" does the same.
        gradients: dtype of the gradient shard, this rank's part of the averaged gradients. ``"auto"``: float32 (float64
            for float64 parameters); but where the backend sums in the dtype on the wire (NCCL), it has that dtype until
            a step has several backwards or clips by value, as it loses nothing by it. ``"fp32"``: float32 (float64)
            from the start. ``"bf16"``: bfloat16, 2 bytes, for parameters below float64. Sums are made as ``accumulate``
            says, then rounded once, to the nearest, ties to even. Each further backward in a step is added in float32,
            and the sum rounded again. Where the update reads gradients without a shard (on one rank, with
            ``gradient_sync="external"``, with "step" over shared memory), they are not rounded; if something needs a
            shard there, it has this dtype.
        seed: seed of stochastic rounding, from 0 to 2^32 - 1. Random numbers depend only on it, the parameter's
            position in the optimizer, its step, and the element's position: not on the number of ranks.
    """

    moments: Moments = "fp32"
    master: Master = "auto"
    reduce: torch.dtype | None = None
    accumulate: Accumulate = "wire"
    gradients: Gradients = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            allowed, found = _CHOICES.get(field.name), getattr(self, field.name)
            if allowed is not None and found not in allowed:
                raise ValueError(f"Precision.{field.name}: found {found!r}, expected one of {allowed}")
        if self.reduce is not None and self.reduce not in _PARAMETER_DTYPES:
            raise ValueError(f"Precision.reduce: found {self.reduce!r}, expected None or one of {_PARAMETER_DTYPES}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"Precision.seed: found {self.seed!r}, expected an integer from 0 to 2^32 - 1")

    def wire_dtype(self, parameter_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype on the wire of gradients of parameters of ``parameter_dtype``."""
        return self.reduce or parameter_dtype

    def check_parameter(self, dtype: torch.dtype, name: str) -> None:
        """Raise TypeError if a parameter of ``dtype`` cannot be trained with these formats."""
        if dtype not in _PARAMETER_DTYPES:
            raise TypeError(
                f"Parameter {name!r}: found dtype {dtype}, expected one of {_PARAMETER_DTYPES}. "
                "Freeze it (requires_grad=False) or do not pass it to the optimizer."
            )
        if dtype != torch.float64:
            return
        narrow = [field for field, wide in _EXACT.items() if getattr(self, field) not in wide]
        if narrow:
            argument = f"{narrow[0]}={getattr(self, narrow[0])!r}"
            raise TypeError(
                f"Parameter {name!r} is float64, expected float32, bfloat16 or float16 with Precision({argument}). "
                "Convert it, or give it an optimizer of its own with the default precision."
            )

    def format(self, dtype: torch.dtype, device: torch.device, *, has_average: bool = False) -> Format:
        """Return the formats for parameters of ``dtype`` on ``device``, with "auto" resolved."""
        master: Literal["own", "split", "fp32", "none"]
        if dtype in (torch.float32, torch.float64):
            master = "own"
        elif self.master == "auto":
            master = "fp32" if dtype == torch.float16 and device.type == "cpu" else "split"
        else:
            master = self.master
        return Format(dtype, self.moments, master, self.gradients, has_average)


@dataclass(frozen=True, slots=True)
class Format:
    """The formats of one parameter dtype.

    Args:
        master: "own": the parameter is its own master.
        has_average: whether there is a moving average of the exact weights, in ``exact_dtype``.
    """

    dtype: torch.dtype
    moments: Moments
    master: Literal["own", "split", "fp32", "none"]
    gradients: Gradients = "auto"
    has_average: bool = False

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype of arithmetic and of uncompressed moments."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype of gradient shards; with gradients "auto", of those that several rounds or a write change."""
        return torch.bfloat16 if self.gradients == "bf16" else self.exact_dtype

    @property
    def is_random(self) -> bool:
        """Whether anything is rounded stochastically."""
        return self.moments != "fp32" or self.master == "none"
