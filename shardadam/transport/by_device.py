# SPDX-License-Identifier: Apache-2.0
"""NCCL for CUDA, and another backend for the CPU: picks the transport by a tensor's device.

The backend for the CPU is the process group's own, or if it has none, Gloo's of the control group: buffers and frozen
parameters on the CPU need one, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardadam.transport.base import Pending, ReduceScatter, Staging, Transport


class ByDeviceTransport(Transport):
    """
    Args:
        host: for tensors on the CPU.
        stream: for tensors on CUDA devices; has the same ranks as ``host``.
        trains_on_host: trainable parameters may be on the CPU. If not, only small tensors should be.
    """

    def __init__(self, host: Transport, stream: Transport, *, trains_on_host: bool) -> None:
        self.rank = host.rank
        self.world_size = host.world_size
        self.control = host.control
        self.store_barrier = host.store_barrier
        self.devices = frozenset({"cpu", "cuda"})
        self.trainable_devices = None if trains_on_host else stream.devices
        self._host = host
        self._stream = stream

    def _for(self, device: torch.device) -> Transport:
        return self._stream if device.type == "cuda" else self._host

    def allocate_staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        return self._for(device).allocate_staging(numel, dtype, device)

    def sum_dtype(self, wire_dtype: torch.dtype, exact_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return self._for(device).sum_dtype(wire_dtype, exact_dtype, device)

    def scales_sums(self, device: torch.device) -> bool:
        return self._for(device).scales_sums(device)

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        return self._for(request.shard.device).reduce_scatter(request)

    def all_gather(self, flat: Tensor) -> Pending:
        return self._for(flat.device).all_gather(flat)

    def all_reduce(self, block: Tensor) -> Pending:
        return self._for(block.device).all_reduce(block)

    def broadcast(self, tensor: Tensor) -> Pending:
        return self._for(tensor.device).broadcast(tensor)

    def expect_progress(self, device: torch.device) -> None:
        self._for(device).expect_progress(device)

    def poll(self, seconds: float) -> bool:
        return self._host.poll(seconds)

    def close(self, *, clean: bool) -> None:
        self._stream.close(clean=clean)
        self._host.close(clean=clean)
