# SPDX-License-Identifier: Apache-2.0
"""``gradient_sync="external"``: DDP or a trainer averages ``p.grad``, and each rank copies the segments of its shards.

Sends nothing, and does nothing during backward.
"""

from __future__ import annotations

import torch

from shardadam.engine.reduction.base import Reducer, Snapshot, check_gradient, is_current, snapshot
from shardadam.engine.storage import memory_order


class ExternalReducer(Reducer):
    """Copies gradients in ``close``, unless no gradient was written or replaced since the last copy."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: list[Snapshot] = []  # the gradients in the shards

    @torch.no_grad()
    def close(self) -> None:
        if is_current(self._taken, self._params):
            return
        self.reset()
        self.rounds += 1
        for bucket in self._buckets:
            for param, _ in bucket.segments:
                check_gradient(param)
                self.used[param.index] = param.parameter.grad is not None
            bucket.shard.gradient.zero_()
            targets, gradients = [], []
            for param, segment in bucket.shard_segments:
                gradient = param.parameter.grad
                if gradient is not None:
                    ordered = memory_order(gradient, param.parameter)
                    targets.append(bucket.shard.gradient[segment.offset : segment.offset + segment.numel])
                    gradients.append(ordered[segment.start : segment.start + segment.numel])
            if targets:
                torch._foreach_copy_(targets, gradients)
        self._taken = snapshot(self._params)

    def reset(self) -> None:
        super().reset()
        self._taken = []
