# SPDX-License-Identifier: Apache-2.0
"""Updated shards -> parameters: all-gathers in place in the buckets' flat parameter buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

import torch
from torch import Tensor

from shardadam.engine.profiling import record
from shardadam.engine.storage import FlatBucket
from shardadam.ranks.signals import interrupts_held
from shardadam.transport import Pending, Transport
from shardadam.transport.base import own_slice


class ParameterGatherer:
    """Dispatches a bucket's all-gather as soon as its shard is updated; the next bucket's update runs meanwhile."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._pending: dict[int, Pending] = {}  # by index of the bucket, in the order of dispatch
        self._unreleased: list[Pending] = []  # waited for here, but peers may still be reading

    def dispatch(self, bucket: FlatBucket) -> None:
        with record("all_gather"):
            self._pending[bucket.index] = self._transport.all_gather(bucket.parameters)

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def is_any_pending(self, indices: Iterable[int]) -> bool:
        return any(index in self._pending for index in indices)

    def wait_for(self, indices: Iterable[int]) -> None:
        """Afterwards the parameters of these buckets are what their ranks have made of them."""
        for index in indices:
            pending = self._pending.get(index)
            if pending is not None:
                with interrupts_held(), record("all_gather"):
                    pending.wait()
                    self._unreleased.append(self._pending.pop(index))

    def wait_all(self) -> None:
        """Afterwards all parameters are what their ranks have made of them."""
        self.wait_for(list(self._pending))

    def synchronize(self) -> None:
        """Afterwards nobody reads them any more, either, and they may be written. Collective."""
        self.wait_all()
        for pending in self._unreleased:
            pending.await_release()
        self._unreleased.clear()


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
        keep: indices of the parameters wanted on this rank, all of whose buckets are there.
        device: where they are wanted.

    Returns:
        By index, new tensors of the parameters' shapes and strides, in the dtype of the shards.
    """
    flat: dict[int, Tensor] = {}
    params = {param.index: param for bucket in buckets for param, _ in bucket.pieces if param.index in keep}
    for bucket in buckets:
        shard = shard_of(bucket)
        whole = torch.zeros(bucket.numel, dtype=shard.dtype, device=shard.device)
        own_slice(whole, transport.rank, transport.world_size).copy_(shard)
        transport.all_gather(whole).wait()
        for param, piece in bucket.pieces:
            if param.index in params:
                if param.index not in flat:
                    flat[param.index] = torch.empty(param.parameter.numel(), dtype=shard.dtype, device=device)
                target = flat[param.index][piece.start : piece.start + piece.numel]
                target.copy_(whole[piece.offset : piece.offset + piece.numel])
    return {index: tensor.as_strided(params[index].shape, params[index].stride) for index, tensor in flat.items()}
