# SPDX-License-Identifier: Apache-2.0
"""Gradients -> gradient shards: backward hooks, rounds, and the order in which buckets are launched.

Note: rounds
    A round reduces every bucket once, in one order that is the same on all ranks, so that no bucket ever meets another
    rank's other bucket. It opens at the first gradient. A bucket is launched from the hook that completes it, if all
    before it in the order have been; where gradients are absent (unused parameters) it has to wait until the round
    closes, when everything left is launched in order, with zeros for what is absent. A round closes at the end of the
    outermost backward, and at the latest before anything else needs it closed; a parameter's second gradient closes it
    too. Whether it closes never depends on timing, only on this rank's graph; ranks run equal numbers of backwards.

Note: nothing waits in a hook
    While backward runs, a peer may be anywhere: its own backward may have raised, and it may sit in a collective of the
    user's until we join it. Hooks and the end-of-backward callback therefore launch and never wait until a
    peer comes; at most they look out for one for a moment (``StagingPool``).
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shardadam.chunks import sum_sources_
from shardadam.engine.grad_stats import GradStats
from shardadam.engine.profiling import record
from shardadam.engine.reduction.base import Reducer, Snapshot, check_gradient, is_current, snapshot
from shardadam.engine.reduction.bucket_view import BucketViews
from shardadam.engine.reduction.staging import StagingPool
from shardadam.engine.storage import FlatBucket, ShardedParam, memory_order
from shardadam.ranks.signals import interrupts_held
from shardadam.transport import Transport
from shardadam.update import Sources


class GradientReducer(Reducer):
    """
    Args:
        hooked: reduce while backward runs and free ``p.grad`` (``gradient_sync="backward"``). Otherwise everything
            happens in ``close`` and ``p.grad`` stays; where the transport has memory that peers read, it lies in
            that, and the update sums gradients straight out of it.
        with_squares: the norm will be wanted: measure it while sums are in the cache.
    """

    def __init__(self, transport: Transport, *, hooked: bool, with_squares: bool) -> None:
        super().__init__()
        self._pool = StagingPool(transport)
        self._bucket_views = BucketViews(transport)
        self._with_squares = with_squares
        self._transport = transport
        self._process = os.getpid()
        self._divisor = transport.world_size * transport.replicas
        self._hooked = hooked
        self._handles: list[Any] = []
        self._lock = threading.RLock()  # hooks of parameters on two devices run in two threads
        # What this rank has seen of the order in which buckets are completed.
        self._order_is_learned = False
        self._completed: list[int] = []
        self._synchronizing = True
        self._has_local = False  # gradients have gathered in p.grad under no_sync, and no round has taken them
        # Of the round that is open.
        self._open = False
        self._ready: list[bool] = []
        self._missing: list[int] = []  # of each bucket, how many gradients it still waits for
        self._next = 0  # how many buckets of the order have been launched
        self._held: dict[int, Tensor | None] = {}  # gradients of which some pieces have been launched, by index
        # Since reset.
        self._launches: list[int] = []  # of each bucket
        self._grad_stats: dict[int, GradStats] = {}  # of each bucket, on what its shard holds
        self._taken: list[Snapshot] = []  # not hooked: the gradients that the shards hold
        self._graph_task: int | None = None
        self._streams: dict[int, set[torch.cuda.Stream]] = {}

    def add(self, params: list[ShardedParam], buckets: list[FlatBucket]) -> None:
        super().add(params, buckets)
        self._launches += [0] * len(buckets)
        self._order_is_learned = False
        self._completed.clear()
        bucket_views = [] if self._hooked else self._bucket_views.add(params, buckets)
        for bucket in buckets:
            if self._bucket_views.holds(bucket):
                _free(bucket.shard.gradient)
            else:
                self._pool.reserve(bucket)
        for param in params if self._hooked else bucket_views:
            hook = _hook(weakref.ref(self), param.index)
            register = param.parameter.register_post_accumulate_grad_hook
            self._handles.append(register(hook))  # type: ignore[no-untyped-call]

    @property
    def is_idle(self) -> bool:
        return not self._open and self._pool.is_idle

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def why_not_to_clip(self, parameter: Tensor) -> str | None:
        if self._hooked:
            if parameter.grad is None and any(self._launches):
                return "the gradients have been reduced and freed during backward, so that it clips nothing."
        elif self._divisor > 1:
            return "gradients are averaged over ranks in step() only, so that every rank clips by a norm of its own."
        return None

    # While backward runs

    def _on_gradient(self, param: ShardedParam) -> None:
        if self.is_superseded:
            return
        if os.getpid() != self._process:
            raise RuntimeError(
                "backward in a forked child of the process that built the optimizer: it would write into the parent's "
                "memory. Build the model and the optimizer in the child."
            )
        if not self._hooked:
            self._bucket_views.take(param)
            return
        check_gradient(param)
        with self._lock:
            if not self._synchronizing:
                return
            if self._open and self._ready[param.index]:
                self._close_round()
            if not self._open:
                self._open_round()
            self._close_after_backward()
            self._ready[param.index] = True
            for bucket in param.buckets:
                index = bucket.index
                if param.parameter.is_cuda:
                    self._streams.setdefault(index, set()).add(torch.cuda.current_stream(param.parameter.device))
                self._missing[index] -= 1
                if self._missing[index] == 0:
                    self._completed.append(index)
            while self._next < len(self.order) and self._missing[self.order[self._next]] <= 0:
                self._launch_next(may_wait=False)

    def _open_round(self) -> None:
        self._open = True
        self.rounds += 1
        self._has_local = False
        self._next = 0
        self._ready = [False] * len(self._params)
        self._missing = [sum(param.parameter.requires_grad for param, _ in b.pieces) for b in self._buckets]
        if not self._order_is_learned:
            self._completed.clear()

    def _close_after_backward(self) -> None:
        """Closes the round when the backward that runs now ends, if it is the outermost."""
        task = torch._C._current_graph_task_id()
        if task in (-1, self._graph_task):
            return
        self._graph_task = task
        this = weakref.ref(self)

        def close() -> None:
            reducer = this()
            if reducer is not None and not _inside_custom_backward():
                with reducer._lock:
                    reducer._close_round()

        torch.autograd.Variable._execution_engine.queue_callback(close)

    # Between backwards

    def close(self) -> None:
        with self._lock:
            if self._has_local and not self._open:
                self._open_round()
            self._close_round(may_wait=True)
            self.local_error = self._foreign_gradients() if self._hooked else None
            self._has_local = self._hooked and not self._synchronizing
            if not self._hooked and not is_current(self._taken, self._params):
                self.reset()
                self.rounds += 1
                self._taken = snapshot(self._params)
                self._bucket_views.bring_in(self.used)
            for index in self.order:
                if self._launches[index] == 0 and not self._bucket_views.holds(self._buckets[index]):
                    self._launch(index, may_wait=True)

    def close_open_round(self) -> None:
        with self._lock:
            self._close_round(may_wait=True)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.close_open_round()
        before, self._synchronizing = self._synchronizing, False
        try:
            yield
        finally:
            self._synchronizing = before
            self._has_local = self._hooked

    def catch_up(self, count: int) -> None:
        with self._lock:
            self._close_round(may_wait=True)
            while self.rounds_since_reset < count:
                self._open_round()
                self._close_round(may_wait=True)

    @property
    def rounds_since_reset(self) -> int:
        if not self.order:
            return 0
        # The last bucket is launched once in each.
        return self._launches[self.order[-1]] + int(self._open and self._next < len(self.order))

    def wait_all(self) -> None:
        self._pool.wait_all()

    @torch.no_grad()
    def sum_up(self) -> None:
        self.wait_all()
        left = [
            bucket
            for bucket in self._buckets
            if self._bucket_views.holds(bucket) and bucket.index not in self._grad_stats
        ]
        if not left:
            return
        self._transport.fence()  # all have brought theirs in
        for bucket in left:
            sources = self._bucket_views.sources(bucket)
            _restore(bucket.arena.gradient_shard)
            stats = self._grad_stats[bucket.index] = GradStats(with_squares=self._with_squares)
            with record("reduce_scatter"):
                sum_sources_(
                    bucket.shard.gradient, sources.slices, scale=sources.scale, accumulate=False, on_chunk=stats.update
                )
        self._transport.fence()  # nobody reads them any more

    def sources(self, bucket: FlatBucket) -> Sources | None:
        if not self._bucket_views.holds(bucket) or bucket.index in self._grad_stats:
            return None
        return self._bucket_views.sources(bucket)

    def await_readers(self) -> None:
        if self._bucket_views.nbytes() > 0:
            self._transport.fence()

    def grad_stats(self, *, with_squares: bool) -> list[GradStats]:
        if with_squares:
            self.sum_up()
        self.wait_all()
        for bucket in self._buckets:
            stats = self._grad_stats.get(bucket.index)
            if stats is not None and with_squares and not stats.with_squares:
                stats = self._grad_stats[bucket.index] = GradStats(with_squares=True)
                stats.update(bucket.shard.gradient)
        grad_stats = list(self._grad_stats.values())
        if len(grad_stats) < len(self._buckets):
            grad_stats.append(GradStats(with_squares=False))
            grad_stats[-1].judge(self._bucket_views.is_finite())
        return grad_stats

    def reset(self) -> None:
        self.close_open_round()
        self.wait_all()
        self._pool.trim()
        self._launches = [0] * len(self._buckets)
        self._grad_stats.clear()
        self.used = [False] * len(self._params)
        self._has_local = False
        self._taken = []

    def gradient_bytes(self) -> int:
        return self._bucket_views.nbytes()

    def staging_bytes(self) -> int:
        return sum(staging.nbytes for staging in self._pool.buffers())

    def learn_order(self) -> None:
        # Buckets that did not complete (unused parameters) go last. Until rank 0 has seen a gradient the order of the
        # layout serves.
        if self._order_is_learned or not self._hooked:
            return
        completed = set(self._completed)
        order = self._completed + [index for index in self.order if index not in completed]
        agreed = torch.tensor([len(completed), *order], dtype=torch.int64).to(self._buckets[0].parameters.device)
        self._transport.broadcast(agreed).wait()
        completed_count, *self.order = agreed.tolist()
        self._order_is_learned = completed_count > 0

    # Launching

    def _close_round(self, *, may_wait: bool = False) -> None:
        if not self._open:
            return
        while self._next < len(self.order):
            self._launch_next(may_wait=may_wait)
        self._open = False

    def _launch_next(self, *, may_wait: bool) -> None:
        with interrupts_held():
            index = self.order[self._next]
            self._next += 1
            self._launch(index, may_wait=may_wait)

    @torch.no_grad()
    def _launch(self, index: int, *, may_wait: bool) -> None:
        bucket = self._buckets[index]
        self._pool.progress()
        staging = self._pool.acquire(bucket, may_wait=may_wait)
        send = staging.send[: bucket.numel]
        with self._joined_streams(index, bucket), record("copy_in"):
            self._fill(send, bucket)
        scale = 1 / self._divisor
        if send.dtype == torch.float16:  # the sum of halves would overflow long before the mean does
            send.mul_(scale)
            scale = 1.0
        stats = self._grad_stats[index] = GradStats(with_squares=self._with_squares)
        with record("reduce_scatter"):
            pending = self._transport.reduce_scatter(
                staging,
                bucket.numel,
                bucket.shard.gradient,
                scale=scale,
                accumulate=self._launches[index] > 0,
                on_chunk=stats.update,
            )
        self._launches[index] += 1
        self._pool.launched(staging, pending)
        if self._hooked:
            self._free_gradients(bucket)

    def _fill(self, send: Tensor, bucket: FlatBucket) -> None:
        """Copies the bucket's gradients into ``send``, zeros for what is absent and for padding."""
        targets: list[Tensor] = []
        gradients: list[Tensor] = []
        zeros = [send[start:stop] for start, stop in bucket.plan.gaps]
        for param, piece in bucket.pieces:
            target = send[piece.offset : piece.offset + piece.numel]
            check_gradient(param)
            gradient = self._held.get(param.index, param.parameter.grad)
            if gradient is None:
                zeros.append(target)
                continue
            self.used[param.index] = True
            targets.append(target)
            gradients.append(memory_order(gradient, param.parameter)[piece.start : piece.start + piece.numel])
        if targets:
            torch._foreach_copy_(targets, gradients)
        if zeros:
            torch._foreach_zero_(zeros)

    def _foreign_gradients(self) -> str | None:
        """Says if somebody else has put a gradient where a reduced one has been freed: it would be left out."""
        for param in self._params:
            if param.parameter.grad is not None and all(self._launches[bucket.index] for bucket in param.buckets):
                return (
                    f"Parameter {param.name!r} has a gradient in p.grad although this optimizer has reduced and freed "
                    "it during backward. Is the model wrapped in DistributedDataParallel (accelerate's prepare, "
                    "transformers.Trainer and Lightning's DDP strategy do that)? Then leave the wrapper out "
                    "(shardadam.integrations.accelerate.ShardedAccelerator, shardadam.integrations.transformers."
                    'ShardedTrainer), or build the optimizer with gradient_sync="external". If your own code writes '
                    'p.grad after backward, use gradient_sync="step".'
                )
        return None

    def _free_gradients(self, bucket: FlatBucket) -> None:
        for param, _ in bucket.pieces:
            parameter, index = param.parameter, param.index
            if index not in self._held:
                self._held[index], parameter.grad = parameter.grad, None
            # A parameter in several buckets is through once they have been launched equally often. Until then what it
            # held when its first piece was launched stays what this round reduces, whatever arrives in p.grad.
            if len(param.buckets) == 1 or len({self._launches[b.index] for b in param.buckets}) == 1:
                del self._held[index]

    @contextmanager
    def _joined_streams(self, index: int, bucket: FlatBucket) -> Iterator[None]:
        """Gradients may have been computed on several streams. The copy waits for them all, and they wait for the copy:
        what is freed after it goes back to the streams that it was allocated on, which may write it again at once.
        """
        if index not in self._streams:
            yield
            return
        current = torch.cuda.current_stream(bucket.parameters.device)
        others = self._streams.pop(index) - {current}
        for stream in others:
            current.wait_stream(stream)
        yield
        for stream in others:
            stream.wait_stream(current)


def _hook(reducer: weakref.ref[GradientReducer], index: int) -> Callable[[Tensor], None]:
    """A hook that does not keep the reducer alive."""

    def on_gradient(parameter: Tensor) -> None:
        live = reducer()
        if live is not None:
            live._on_gradient(live._params[index])

    return on_gradient


def _free(flat: Tensor) -> None:
    """Gives the memory behind ``flat`` and all that shares it back; the tensors stay."""
    flat.untyped_storage().resize_(0)


def _restore(flat: Tensor) -> None:
    storage = flat.untyped_storage()
    if storage.nbytes() == 0:
        storage.resize_(flat.nbytes)


def _inside_custom_backward() -> bool:
    """Whether this thread is inside the backward of an autograd Function written in Python.

    A callback of the engine that finds itself there belongs to a nested backward: reentrant activation checkpointing.
    """
    return any(frame.f_code is _CUSTOM_BACKWARD for frame in _stack())


def _stack() -> Iterator[Any]:
    frame = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


_CUSTOM_BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__
