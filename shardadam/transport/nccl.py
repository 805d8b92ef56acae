# SPDX-License-Identifier: Apache-2.0
"""NCCL: collectives on a communication stream. The host never waits for a peer.

Note: streams
    Collectives are called with ``async_op=False``: on NCCL this only enqueues them, and keeps no references to tensors.
    An event is recorded after each, and ``wait`` makes the caller's stream wait for it. Buffers need no
    ``record_stream``, as they live as long as the optimizer.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.ranks import desync
from shardadam.ranks.transfer_log import log_of
from shardadam.transport.base import Pending, ReduceScatter, Staging, Transport, in_memory_order, own_slice
from shardadam.transport.groups import CommGroups, timeout_s
from shardadam.transport.streams import CommunicationStreams, OnStream, is_capturing
from shardadam.transport.watchdog import Watchdog

STREAM_BACKENDS = ("nccl",)
"""Backends that run their collectives on CUDA streams."""

_POLL_S = 0.0002
# torch 2.13 renamed these two, and warns about the old names; torch 2.11 has only the old names.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class NcclTransport(Transport):
    """Moves CUDA tensors only.

    Args:
        exact_sums: exchange gradients by all-to-all and sum them here, in rank order and in the shard's dtype. NCCL
            itself sums in the dtype that is sent.
    """

    def __init__(self, groups: CommGroups, *, exact_sums: bool = False) -> None:
        self.control = groups.control
        self.store_barrier = groups.cache.store_barrier
        self.devices = frozenset({"cuda"})
        self.rank = dist.get_rank(groups.training)
        self.world_size = dist.get_world_size(groups.training)
        self._comm_groups = groups
        self._group = groups.training
        self._log = log_of(groups.training)
        self._exact_sums = exact_sums
        self._streams = CommunicationStreams()
        self._watchdog: Watchdog | None = None

    def allocate_staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        send = torch.empty(numel, dtype=dtype, device=device)
        return Staging(send, torch.empty_like(send) if self._exact_sums else None)

    def sum_dtype(self, wire_dtype: torch.dtype, exact_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return exact_dtype if self._exact_sums else wire_dtype

    def scales_sums(self, device: torch.device) -> bool:
        return False

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        send = request.send
        self._log.add("reduce-scatter", send.nbytes)
        is_final = request.shard.dtype == send.dtype and request.scale == 1 and not request.accumulate
        with self._streams.on(send.device) as stream:
            if request.staging.receive is None and is_final:
                _reduce_scatter(request.shard, send, group=self._group)
                if request.stats is not None:
                    request.stats.measure(request.shard)
            elif request.staging.receive is None:
                own = own_slice(send, self.rank, self.world_size)
                _reduce_scatter(own, send, group=self._group)
                request.sum_([own])
            else:
                receive = request.staging.receive[: send.numel()]
                dist.all_to_all_single(receive, send, group=self._group)
                request.sum_(list(receive.chunk(self.world_size)))
        return OnStream(stream)

    def all_gather(self, flat: Tensor) -> Pending:
        self._log.add("all-gather", flat.nbytes)
        with self._streams.on(flat.device) as stream:
            _all_gather(flat, own_slice(flat, self.rank, self.world_size), group=self._group)
        return OnStream(stream)

    def all_reduce(self, block: Tensor) -> Pending:
        self._log.add("all-reduce", block.nbytes)
        with self._streams.on(block.device) as stream:
            dist.all_reduce(block, group=self._group)
        return OnStream(stream)

    def broadcast(self, tensor: Tensor) -> Pending:
        self._log.add("broadcast", tensor.nbytes)
        with self._streams.on(tensor.device) as stream:
            dist.broadcast(in_memory_order(tensor), group=self._group, group_src=0)
        return OnStream(stream)

    def expect_progress(self, device: torch.device) -> None:
        is_captured = is_capturing(device)
        if is_captured and self._watchdog is None:
            return  # memory that is allocated during a capture is the graph's
        with self._streams.on(device) as stream:
            if self._watchdog is None:
                ranks = dist.get_process_group_ranks(self._group)
                self._watchdog = Watchdog(
                    device, timeout_s(self._group), partial(desync.report, ranks), partial(desync.log_difference, ranks)
                )
            self._watchdog.expect_progress()
        if is_captured:
            OnStream(stream).wait()  # when a capture ends, its stream must have waited for all others

    def poll(self, seconds: float) -> bool:
        time.sleep(min(seconds, _POLL_S))  # NCCL and the device make progress meanwhile
        return True

    def close(self, *, clean: bool) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        self._streams.release()
        self._comm_groups.release(clean=clean)
