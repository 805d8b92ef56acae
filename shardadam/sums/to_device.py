# SPDX-License-Identifier: Apache-2.0
"""Sends small values of the host to a device, while the host runs on.

From ordinary memory, as in ``torch.tensor(values).to(device)``, the host would wait for all work before the copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values`` as a 1-D tensor on ``device``. The host does not wait. May be captured in a CUDA graph."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    if torch.cuda.is_current_stream_capturing():
        return send_as_arguments(values, dtype, device)
    on_host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True)
    # torch keeps the memory of on_host until the copy has read it.
    return torch.empty_like(on_host, device=device).copy_(on_host, non_blocking=True)


def send_as_arguments(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Do ``send`` by arguments of kernels: a graph holds these, but would read host memory again at each replay."""
    sent = torch.zeros(len(values), dtype=dtype, device=device)
    if len(values) > 0:
        torch._foreach_add_(list(sent.unbind()), [float(v) if dtype.is_floating_point else v for v in values])
    return sent
