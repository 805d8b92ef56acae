# SPDX-License-Identifier: Apache-2.0
"""What is stored, and what travels, in which number format."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

Moments = Literal["fp32", "bf16", "int8"]
Master = Literal["auto", "split", "fp32", "none"]
Accumulate = Literal["wire", "fp32"]

_PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHOICES = {"moments": get_args(Moments), "master": get_args(Master), "accumulate": get_args(Accumulate)}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats of an optimizer's state and of its gradients on the wire.

    Args:
        moments: format of exp_avg and exp_avg_sq. ``"fp32"``: 4 bytes each, exact (8 bytes for float64 parameters,
            which have no other format). ``"bf16"``: 2 bytes each, rounded stochastically. ``"int8"``: 1 byte each and
            a float32 scale for every 128 elements, rounded stochastically in their roots; no quantisation can make a
            step larger than exact Adam's bound.
        master: how the exact value behind a bfloat16 or float16 parameter is kept; others are their own master.
            ``"fp32"``: a float32 copy, 4 bytes. ``"split"``: 16 bits that together with the parameter's own are the
            float32 master, 2 bytes: for bfloat16 the same numbers as "fp32", bit for bit; for float16 too, where they
            are not below 2^-17. ``"none"``: no master, the parameter is rounded stochastically. ``"auto"``: "split",
            but "fp32" for float16 on the CPU, where that is faster.
        reduce: dtype of gradients on the wire; None: the gradient's own. The gradient shard is float32 (float64 for
            float64 parameters) whatever travels.
        accumulate: where gradients are summed over ranks. ``"wire"``: as the transport does it best; NCCL sums in
            the dtype that travels. ``"fp32"``: by all-to-all and a sum of our own, in rank order and in the gradient
            shard's dtype, whatever travels and whatever the backend. On Gloo both are that.
        seed: of everything that is rounded stochastically. The random numbers depend on it, on the parameter's place in
            the optimizer, on its step and on the position in it, and on nothing else: not on the number of ranks.
    """

    moments: Moments = "fp32"
    master: Master = "auto"
    reduce: torch.dtype | None = None
    accumulate: Accumulate = "wire"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            allowed, found = _CHOICES.get(field.name), getattr(self, field.name)
            if allowed is not None and found not in allowed:
                raise ValueError(f"Precision.{field.name}: found {found!r}, expected one of {allowed}")
        if self.reduce is not None and self.reduce not in _PARAMETER_DTYPES:
            raise ValueError(f"Precision.reduce: found {self.reduce!r}, expected None or one of {_PARAMETER_DTYPES}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"Precision.seed: found {self.seed!r}, expected a whole number of 0 or more, below 2^32")

    def wire_dtype(self, parameter_dtype: torch.dtype) -> torch.dtype:
        return self.reduce or parameter_dtype

    def check_parameter(self, dtype: torch.dtype, name: str) -> None:
        """Raises unless a parameter of ``dtype`` can be trained with these formats."""
        if dtype not in _PARAMETER_DTYPES:
            raise TypeError(
                f"Parameter {name!r}: found dtype {dtype}, expected one of {_PARAMETER_DTYPES}. "
                "Freeze it (requires_grad=False) or leave it out."
            )
        if dtype == torch.float64 and self.moments != "fp32":
            raise TypeError(
                f"Parameter {name!r} is float64, expected float32, bfloat16 or float16 with Precision(moments="
                f"{self.moments!r}). Convert it, or keep it in an optimizer of its own with the default precision."
            )

    def format(self, dtype: torch.dtype, device: torch.device) -> Format:
        """How parameters of ``dtype`` on ``device`` are stored."""
        if dtype in (torch.float32, torch.float64):
            return Format(dtype, self.moments, "own")
        if self.master == "auto":
            is_slow = dtype == torch.float16 and device.type == "cpu"
            return Format(dtype, self.moments, "fp32" if is_slow else "split")
        return Format(dtype, self.moments, self.master)


@dataclass(frozen=True, slots=True)
class Format:
    """The storage of one parameter dtype, with nothing left open; "own": the parameter is its own master."""

    dtype: torch.dtype
    moments: Moments
    master: Literal["own", "split", "fp32", "none"]

    @property
    def exact_dtype(self) -> torch.dtype:
        """The dtype of arithmetic, of gradient shards and of moments that are not compressed."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def is_random(self) -> bool:
        """Whether anything is rounded stochastically."""
        return self.moments != "fp32" or self.master == "none"
