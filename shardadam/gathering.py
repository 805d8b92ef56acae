# SPDX-License-Identifier: Apache-2.0
"""Updated shards -> parameters: all-gathers in place in the buckets' flat parameter buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardadam.buckets import FlatBucket, Member
from shardadam.transport import Pending, Transport
from shardadam.transport.base import own_slice


class ParameterGatherer:
    """Dispatches a bucket's all-gather as soon as its shard is updated; the next bucket's update runs meanwhile."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._pending: list[Pending] = []

    def dispatch(self, bucket: FlatBucket) -> None:
        self._pending.append(self._transport.all_gather(bucket.parameters))

    def wait(self, updated: Sequence[Member]) -> None:
        """Afterwards all parameters hold what their ranks have made of them; ``updated`` are those that took part."""
        while self._pending:
            self._pending.pop(0).wait()
        # The writes went past autograd, by way of the flat buffers: without this, a graph built before the step would
        # be differentiated with the new values and nobody would notice.
        torch.autograd.graph.increment_version([member.parameter for member in updated])


@torch.no_grad()
def gather_shards(member: Member, shard_of: Callable[[FlatBucket], Tensor], transport: Transport) -> Tensor:
    """One parameter's whole tensor out of the shards that ``shard_of`` takes from each of its buckets. Collective.

    Returns:
        A new tensor of the parameter's shape and strides, in the dtype of the shards.
    """
    parameter = member.parameter
    dtype = shard_of(member.buckets[0]).dtype
    flat = torch.empty(parameter.numel(), dtype=dtype, device=parameter.device)
    for bucket in member.buckets:
        whole = torch.zeros(bucket.numel, dtype=dtype, device=parameter.device)
        own_slice(whole, transport.rank, transport.world_size).copy_(shard_of(bucket))
        transport.all_gather(whole).wait()
        for owner, piece in bucket.pieces:
            if owner is member:
                flat[piece.start : piece.start + piece.numel] = whole[piece.offset : piece.offset + piece.numel]
    return flat.as_strided(parameter.shape, parameter.stride())
