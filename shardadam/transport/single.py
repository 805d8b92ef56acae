# SPDX-License-Identifier: Apache-2.0
"""The transport of one rank, which sends nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from shardadam.transport.base import Finished, Pending, ReduceScatter, Transport
from shardadam.transport.streams import OnStream


class SingleProcessTransport(Transport):
    rank = 0
    world_size = 1
    sends = False

    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        request.sum_([request.send])
        # Another stream may use the buffers next, and must wait for this sum.
        return OnStream(torch.cuda.current_stream(request.shard.device)) if request.shard.is_cuda else Finished()

    def all_gather(self, flat: Tensor) -> Pending:
        return Finished()

    def all_reduce(self, block: Tensor) -> Pending:
        return Finished()

    def broadcast(self, tensor: Tensor) -> Pending:
        return Finished()
