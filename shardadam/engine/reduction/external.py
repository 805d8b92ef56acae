# SPDX-License-Identifier: Apache-2.0
"""Gradients that somebody else has averaged (DDP, Trainer): each rank takes its segments out of ``p.grad``. Nothing
travels, and nothing runs while backward does.
"""

from __future__ import annotations

import torch

from shardadam.engine.reduction.base import Reducer, Snapshot, check_gradient, is_current, snapshot
from shardadam.engine.storage import memory_order


class ExternalGradients(Reducer):
    def __init__(self) -> None:
        super().__init__()
        self._taken: list[Snapshot] = []

    @torch.no_grad()
    def close(self) -> None:
        if is_current(self._taken, self._params):
            return
        self.rounds += 1
        self._taken = snapshot(self._params)
        for bucket in self._buckets:
            for param, _ in bucket.pieces:
                check_gradient(param)
                self.used[param.index] = param.parameter.grad is not None
            bucket.shard.gradient.zero_()
            targets, gradients = [], []
            for param, segment in bucket.segments:
                gradient = param.parameter.grad
                if gradient is not None:
                    ordered = memory_order(gradient, param.parameter)
                    targets.append(bucket.shard.gradient[segment.offset : segment.offset + segment.numel])
                    gradients.append(ordered[segment.start : segment.start + segment.numel])
            if targets:
                torch._foreach_copy_(targets, gradients)

    def reset(self) -> None:
        self._taken = []
        self.used = [False] * len(self.used)
