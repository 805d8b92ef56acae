# SPDX-License-Identifier: Apache-2.0
"""What is stored, and what travels, in which number format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

_PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats of an optimizer's state and of its gradients on the wire.

    Args:
        moments: format of exp_avg and exp_avg_sq. ``"fp32"``: 4 bytes each (8 for float64 parameters).
        master: how the exact value behind a bfloat16 or float16 parameter is kept. ``"fp32"``: as a float32 copy, 4
            bytes. ``"auto"``: the best for the device, at present ``"fp32"`` everywhere. Other parameters are their
            own master.
        reduce: dtype of gradients on the wire; None: the gradient's own. The gradient shard that the sums are kept in
            is float32 (float64 for float64 parameters) whatever travels, where the transport does the sum itself;
            NCCL sums in the dtype that travels.
    """

    moments: Literal["fp32"] = "fp32"
    master: Literal["auto", "fp32"] = "auto"
    reduce: torch.dtype | None = None

    def __post_init__(self) -> None:
        for field, allowed in (("moments", ("fp32",)), ("master", ("auto", "fp32"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"Precision.{field}: found {getattr(self, field)!r}, expected one of {allowed}")
        if self.reduce is not None and self.reduce not in _PARAMETER_DTYPES:
            raise ValueError(f"Precision.reduce: found {self.reduce!r}, expected None or one of {_PARAMETER_DTYPES}")

    def wire_dtype(self, parameter_dtype: torch.dtype) -> torch.dtype:
        return self.reduce or parameter_dtype


def check_parameter_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in _PARAMETER_DTYPES:
        raise TypeError(
            f"Parameter {name!r}: found dtype {dtype}, expected one of {_PARAMETER_DTYPES}. "
            "Freeze it (requires_grad=False) or leave it out."
        )


def state_dtype(parameter_dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments, master weights and gradient shards behind a parameter."""
    return torch.float64 if parameter_dtype == torch.float64 else torch.float32


def needs_master(parameter_dtype: torch.dtype) -> bool:
    return parameter_dtype in (torch.bfloat16, torch.float16)
