# SPDX-License-Identifier: Apache-2.0
"""``gradient_sync="step"``: gradients accumulate and stay in ``p.grad``, and are reduced inside ``step``.

If the transport has memory that peers can read, ``p.grad`` are views of it (``BucketViews``): nothing is sent, and the
update sums the gradients of all ranks itself. All other gradients are copied into staging and reduce-scattered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardadam.engine.profiling import record
from shardadam.engine.reduction.base import NOTHING_SEEN, Reducer, allocate_gradient_shards
from shardadam.engine.reduction.bucket_view import BucketViews
from shardadam.engine.reduction.copy_in import copy_in
from shardadam.engine.reduction.hooks import GradientHooks
from shardadam.engine.reduction.staging import StagingPool
from shardadam.engine.storage import FlatBucket, ShardedParam, gradient_shard
from shardadam.sums.sources import sum_sources_
from shardadam.sums.stats import GradStats
from shardadam.transport import Transport
from shardadam.update import Sources


class StepReducer(Reducer):
    """Reduces gradients in ``close``, unless no gradient was written or replaced since the last reduction.

    Args:
        transport: of the optimizer.
        with_squares: sum up the squares for the norm during the reduction, while gradients are in the cache.
    """

    def __init__(self, transport: Transport, *, with_squares: bool) -> None:
        super().__init__()
        self.averages = transport.world_size * transport.replicas > 1
        self._with_squares = with_squares
        self._pool = StagingPool()
        self._bucket_views = BucketViews()
        self._hooks = GradientHooks(self)
        self._seen = NOTHING_SEEN  # the gradients that have been reduced since reset

    def add(self, params: list[ShardedParam], buckets: list[FlatBucket]) -> None:
        super().add(params, buckets)
        viewed = self._bucket_views.add(params, buckets)
        copied = [bucket for bucket in buckets if not self._bucket_views.holds(bucket)]
        allocate_gradient_shards(copied)
        self._pool.reserve(copied)
        self._hooks.register(viewed)

    def remove_hooks(self) -> None:
        super().remove_hooks()
        self._hooks.remove()

    def on_gradient(self, index: int) -> None:
        """Move a gradient into its bucket view."""
        self._bucket_views.take(self._params[index])

    def why_not_in_grad(self, parameter: Tensor) -> str | None:
        if self.averages and parameter.grad is not None:
            return "gradients are averaged over ranks in step() only, so that it finds this rank's own."
        return None

    def close(self) -> None:
        if not self._seen_gradients().is_same(self._seen):
            self.reset()
            self.rounds += 1
            self.local_error = self._bucket_views.write(self.used)
            self._seen = self._seen_gradients()
        for bucket in self._buckets:
            if bucket.index not in self._grad_stats and not self._bucket_views.holds(bucket):
                self._launch(bucket)

    @torch.no_grad()
    def _launch(self, bucket: FlatBucket) -> None:
        staging = self._pool.acquire(bucket, may_wait=True)
        error = copy_in(bucket, staging.send, self.used)
        self.local_error = self.local_error or error
        stats = self._new_stats(bucket, with_squares=self._with_squares)
        self._pool.reduce_scatter(bucket, staging, gradient_shard(bucket), accumulate=False, stats=stats)

    @property
    def is_idle(self) -> bool:
        return self._pool.is_idle

    def wait_all(self) -> None:
        self._pool.wait_all()

    def _wait_for_device(self, device: torch.device) -> None:
        self._pool.wait_for_device(device)

    @torch.no_grad()
    def sum_up(self) -> None:
        self.wait_all()
        left = [bucket for bucket in self._buckets if self.gradients(bucket) is not None]
        if not left:
            return
        transports = list(dict.fromkeys(bucket.arena.transport for bucket in left))
        for transport in transports:
            transport.fence()  # every rank has written its gradients
        for bucket in left:
            sources = self._bucket_views.sources(bucket)
            bucket.arena.allocate_gradient_shard(bucket.arena.format.gradient_dtype)
            stats = self._new_stats(bucket, with_squares=self._with_squares)
            with record("reduce_scatter"):
                sum_sources_(gradient_shard(bucket), sources.slices, scale=sources.scale, accumulate=False, stats=stats)
        for transport in transports:
            transport.fence()  # no rank reads them any more

    def gradients(self, bucket: FlatBucket) -> Sources | None:
        if not self._bucket_views.holds(bucket) or bucket.index in self._grad_stats:
            return None
        return self._bucket_views.sources(bucket)

    def await_readers(self) -> None:
        for transport in self._bucket_views.transports():
            transport.fence()

    def grad_stats(self, *, with_squares: bool) -> list[GradStats]:
        """Return statistics as ``Reducer.grad_stats``; without squares, do not sum up gradients in bucket views.

        Those are checked as each rank has written them.
        """
        if with_squares:
            return super().grad_stats(with_squares=True)
        self.wait_all()
        grad_stats = [*self._grad_stats.values(), self._overwritten]
        if len(self._grad_stats) < len(self._buckets) and not self._bucket_views.are_finite():
            grad_stats.append(GradStats(with_squares=False))
            grad_stats[-1].mark_nonfinite()
        return grad_stats

    def reset(self) -> None:
        self.wait_all()
        self._pool.trim()
        super().reset()
        self._seen = NOTHING_SEEN
        self.local_error = None

    def gradient_bytes(self) -> int:
        return self._bucket_views.nbytes()

    def staging_bytes(self) -> int:
        return self._pool.nbytes()
