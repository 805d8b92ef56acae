# SPDX-License-Identifier: Apache-2.0
"""One rank: nothing travels."""

from __future__ import annotations

from torch import Tensor

from shardadam.chunks import OnChunk, sum_sources_
from shardadam.transport.base import Finished, Pending, Staging, Transport


class SingleProcessTransport(Transport):
    rank = 0
    world_size = 1

    def reduce_scatter(
        self,
        staging: Staging,
        numel: int,
        shard: Tensor,
        *,
        scale: float,
        accumulate: bool,
        on_chunk: OnChunk | None = None,
    ) -> Pending:
        sum_sources_(shard, [staging.send[:numel]], scale=scale, accumulate=accumulate, on_chunk=on_chunk)
        return Finished()

    def all_gather(self, flat: Tensor) -> Pending:
        return Finished()

    def all_reduce(self, block: Tensor) -> Pending:
        return Finished()

    def broadcast(self, tensor: Tensor) -> Pending:
        return Finished()
