# SPDX-License-Identifier: Apache-2.0
"""Updated shards -> parameters: all-gathers, in place in the buckets' flat parameter buffers.

Must not decide when to wait for them: ``step`` and ``OverlappedForward`` do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set

import torch
from torch import Tensor

from shardadam.engine.profiling import record
from shardadam.engine.storage import FlatBucket, ShardedParam
from shardadam.ranks.signals import defer_signals
from shardadam.transport import Pending
from shardadam.transport.base import own_slice


class ParameterGatherer:
    """The all-gathers of one optimizer. Each is started as soon as its bucket's shard is updated, and runs during the
    update of the next bucket.
    """

    def __init__(self) -> None:
        self._pending: dict[int, Pending] = {}  # by bucket index, in the order of dispatch
        self._on_some_streams: dict[int, Pending] = {}  # by bucket index: other streams may have to wait, too
        self._unreleased: list[Pending] = []  # waited for, but peers may still be reading this rank's shards

    def dispatch(self, bucket: FlatBucket) -> None:
        """Start the all-gather of the bucket's parameters. Collective: all ranks must use the same order of buckets."""
        if not bucket.arena.transport.sends:
            return
        with record("all_gather"):
            self._pending[bucket.index] = bucket.arena.transport.all_gather(bucket.parameters)
        self._on_some_streams.pop(bucket.index, None)

    @property
    def has_pending(self) -> bool:
        """Whether ``wait_for`` may have to wait, on this or another CUDA stream."""
        return bool(self._pending or self._on_some_streams)

    @property
    def is_idle(self) -> bool:
        """Whether no all-gather is in flight, on any rank: no peer reads this rank's shards. Does not wait."""
        self._unreleased = [pending for pending in self._unreleased if not pending.is_released()]
        return not self._pending and not self._unreleased

    def is_any_pending(self, indices: Iterable[int]) -> bool:
        """Return whether the all-gather of any of these buckets has not been waited for, on any stream."""
        return any(index in self._pending for index in indices)

    def wait_for(self, indices: Iterable[int]) -> None:
        """Wait for the all-gathers of these buckets. The current stream may read their parameters afterwards."""
        for index in indices:
            pending = self._pending.get(index)
            if pending is not None:
                with defer_signals(), record("all_gather"):
                    pending.wait()
                    self._unreleased.append(self._pending.pop(index))
                if not pending.on_host:
                    self._on_some_streams[index] = pending
            elif index in self._on_some_streams:
                self._on_some_streams[index].wait_on_this_stream()

    def wait_all(self) -> None:
        """Wait for all all-gathers. The current stream may read all parameters afterwards."""
        self.wait_for([*self._pending, *self._on_some_streams])

    def synchronize(self) -> None:
        """Wait until all ranks have completed their all-gathers. Parameters may be written afterwards, as no peer reads
        them. Streams that wait for the current one need not wait for all-gathers any more. Collective: all ranks must
        call it.
        """
        self.wait_all()
        self._on_some_streams.clear()
        for pending in self._unreleased:
            pending.await_release()
        self._unreleased.clear()


def mark_written(params: Iterable[ShardedParam]) -> None:
    """Tell autograd that parameters have changed. Graphs hold DTensors, or their local tensors."""
    params = list(params)
    changed = [param.parameter for param in params]
    changed += [param.local for param in params if param.local is not param.parameter]
    torch.autograd.graph.increment_version(changed)


@torch.no_grad()
def gather_shards(
    buckets: Sequence[FlatBucket],
    shard_of: Callable[[FlatBucket], Tensor],
    *,
    keep: Set[int],
    device: torch.device | str,
) -> dict[int, Tensor]:
    """Gather whole tensors (moments, masters, gradients) of parameters from the shards of all ranks.

    Collective: all ranks must call it with the same buckets.

    Args:
        buckets: all buckets that hold a part of the wanted parameters.
        shard_of: this rank's shard of a bucket, 1-D, as long as ``bucket.shard.parameter``.
        keep: indices of the params wanted on this rank.
        device: where the results are wanted.

    Returns:
        New tensors by param index, with the shapes and strides of the parameters and the dtype of the shards.
    """
    flat: dict[int, Tensor] = {}
    params = {param.index: param for bucket in buckets for param, _ in bucket.segments if param.index in keep}
    for bucket in buckets:
        shard = shard_of(bucket)
        whole = torch.zeros(bucket.numel, dtype=shard.dtype, device=shard.device)
        transport = bucket.arena.transport
        own_slice(whole, transport.rank, transport.world_size).copy_(shard)
        transport.all_gather(whole).wait()
        for param, segment in bucket.segments:
            if param.index in params:
                if param.index not in flat:
                    flat[param.index] = torch.empty(param.shape.numel(), dtype=shard.dtype, device=device)
                target = flat[param.index][segment.start : segment.start + segment.numel]
                target.copy_(whole[segment.offset : segment.offset + segment.numel])
    return {index: tensor.as_strided(params[index].shape, params[index].stride) for index, tensor in flat.items()}
