# SPDX-License-Identifier: Apache-2.0
"""Updated shards -> parameters: all-gathers in place in the buckets' flat parameter buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

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
def gather_shards(
    buckets: Sequence[FlatBucket],
    shard_of: Callable[[FlatBucket], Tensor],
    transport: Transport,
    *,
    keep: Set[int],
    device: torch.device | str,
) -> dict[int, Tensor]:
    """Whole tensors of parameters out of the shards that ``shard_of`` takes from each of ``buckets``. Collective.

    Args:
        keep: ordinals of the parameters wanted on this rank, all of whose buckets are there.
        device: where they are wanted.

    Returns:
        By ordinal, new tensors of the parameters' shapes and strides, in the dtype of the shards.
    """
    flat: dict[int, Tensor] = {}
    members = {member.ordinal: member for bucket in buckets for member, _ in bucket.pieces if member.ordinal in keep}
    for bucket in buckets:
        shard = shard_of(bucket)
        whole = torch.zeros(bucket.numel, dtype=shard.dtype, device=shard.device)
        own_slice(whole, transport.rank, transport.world_size).copy_(shard)
        transport.all_gather(whole).wait()
        for member, piece in bucket.pieces:
            if member.ordinal in members:
                if member.ordinal not in flat:
                    flat[member.ordinal] = torch.empty(member.parameter.numel(), dtype=shard.dtype, device=device)
                target = flat[member.ordinal][piece.start : piece.start + piece.numel]
                target.copy_(whole[piece.offset : piece.offset + piece.numel])
    return {
        ordinal: tensor.as_strided(members[ordinal].shape, members[ordinal].stride) for ordinal, tensor in flat.items()
    }
