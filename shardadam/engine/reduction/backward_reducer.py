# SPDX-License-Identifier: Apache-2.0
"""``gradient_sync="backward"``: buckets are reduced while backward runs, and gradients freed once they are in staging.

Note: rounds
    A round reduces every bucket once, in an order that is the same on all ranks, so that no two ranks reduce different
    buckets with each other. It opens at the first gradient. When a gradient completes a bucket, its hook launches the
    complete buckets in that order, up to the first incomplete one. If gradients are absent (unused parameters), the
    remaining buckets are launched when the round closes, with zeros for absent gradients. A round closes at the end of
    the outermost backward, when a parameter gets a second gradient, or when a call needs it closed. This depends only
    on this rank's graph, never on timing. All ranks must run equal numbers of backward passes.

Note: hooks do not wait
    During backward, a peer may be in any call: its backward may have raised, or it may wait for this rank in a
    collective of the user's. So the hooks and the callback at the end of backward never wait for a peer. At most they
    poll peers for a short time (``StagingPool``).
"""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shardadam.engine.reduction.base import (
    Take,
    allocate_gradient_shards,
    check_gradient,
    foreign_gradient,
    second_round,
    set_gradient_scale,
)
from shardadam.engine.reduction.copy_in import copy_in, joined_streams
from shardadam.engine.reduction.during_backward import DuringBackward
from shardadam.engine.reduction.scratch import ShardScratch
from shardadam.engine.reduction.staging import StagingPool
from shardadam.engine.storage import FlatBucket, ShardedParam, gradient_shard
from shardadam.ranks.signals import defer_signals
from shardadam.sums.stats import GradStats
from shardadam.transport import Transport, placement


@dataclass(slots=True)
class Round:
    """The progress of an open round.

    Args:
        order: indices of the buckets to launch, in this order.
        ready: by param index: whether it has had its gradient in this round.
        missing: by bucket index: the number of gradients that it still needs.
        next: the number of buckets in ``order`` that have been launched.
        partly_launched: by param index, for parameters in several buckets: the gradient, from the launch of the first
            bucket to that of the last. Gradients that arrive in ``p.grad`` meanwhile belong to the next round.
        streams: by bucket index: the CUDA streams that have computed its gradients.
    """

    order: list[int]
    ready: list[bool]
    missing: list[int]
    next: int = 0
    partly_launched: dict[int, Tensor | None] = field(default_factory=dict)
    streams: dict[int, set[torch.cuda.Stream]] = field(default_factory=dict)

    @property
    def is_launched(self) -> bool:
        return self.next == len(self.order)

    @property
    def can_launch(self) -> bool:
        """Whether there is a next bucket, and it is complete."""
        return self.next < len(self.order) and self.missing[self.order[self.next]] <= 0


class BackwardReducer(DuringBackward):
    """Reduces every bucket once in each backward, and adds up the means of several backwards in the gradient shards.

    Args:
        transport: of the optimizer.
        with_squares: sum up the squares for the norm during the reduction, while gradients are in the cache.
        take: takes each bucket's gradients when they are reduced, of one round between two calls of ``reset``. None:
            the gradient shards keep them, of any number of rounds.
    """

    def __init__(self, transport: Transport, *, with_squares: bool, take: Take | None = None) -> None:
        super().__init__()
        self._take = take
        self.updates_in_backward = take is not None
        self._scratch = ShardScratch()
        self.averages = transport.world_size * transport.replicas > 1
        self._transport = transport
        self._with_squares = with_squares
        self._pool = StagingPool()
        self._round: Round | None = None
        self._graph_task: int | None = None  # the backward whose end closes a round
        self._late: tuple[int, ShardedParam] | None = None  # a thread, and the param whose hooks it was running
        # Used until the order is learned
        self._order_is_learned = False
        self._completed: list[int] = []  # indices of the buckets that the last round completed, in order
        self._is_discarding = False
        # Since reset
        self._refused: str | None = None  # why a gradient was reduced as zeros
        self._launches: list[int] = []  # by bucket index

    def add(self, params: list[ShardedParam], buckets: list[FlatBucket]) -> None:
        super().add(params, buckets)
        self._launches += [0] * len(buckets)
        self._order_is_learned = False
        self._completed.clear()
        if self._take is None:
            allocate_gradient_shards(buckets)
        else:
            for bucket in buckets:
                set_gradient_scale(bucket)
            self._scratch.reserve(buckets)
        self._pool.reserve(buckets)
        self._hooks.register(params)

    # While backward runs

    def on_gradient(self, index: int) -> None:
        param = self._params[index]
        check_gradient(param)
        with self._lock:
            will_change = self._hooks.put_last(index)
            if not self._is_synchronizing:
                return
            if self._round is not None and self._round.ready[index]:
                if self._take is not None:
                    raise second_round(param.name)
                self._close_round()
            current = self._open_round() if self._round is None else self._round
            self._close_after_backward()
            if param.local.is_cuda:
                stream = torch.cuda.current_stream(param.local.device)
                for bucket in param.buckets:
                    current.streams.setdefault(bucket.index, set()).add(stream)
            thread = threading.get_ident()
            late, self._late = self._late, (thread, param) if will_change else None
            if late is not None and late[0] == thread:
                self._complete(late[1], current)  # the hooks that came after this one have run
            if not will_change:
                self._complete(param, current)
            while current.can_launch:
                self._launch_next(current, may_wait=False)

    def _complete(self, param: ShardedParam, current: Round) -> None:
        """Take in that the gradient of ``param`` is complete."""
        current.ready[param.index] = True
        if param.local is not param.parameter:
            # A Partial gradient is reduced over its mesh now, in the order of backward: buckets are complete at other
            # times on ranks that hold larger parts of parameters.
            placement.local_gradient(param.parameter)
        for bucket in param.buckets:
            current.missing[bucket.index] -= 1
            if current.missing[bucket.index] == 0:
                self._completed.append(bucket.index)

    def _close_after_backward(self) -> None:
        """Close the round at the end of the backward that is running, if it is the outermost."""
        task = torch._C._current_graph_task_id()
        if task in (-1, self._graph_task):
            return
        self._graph_task = task
        reducer = weakref.ref(self)

        def close() -> None:
            live = reducer()
            if live is not None and not _is_nested_backward():
                with live._lock:
                    live._close_round()

        torch.autograd.Variable._execution_engine.queue_callback(close)

    # Rounds

    def _open_round(self) -> Round:
        if self._take is not None and any(self._launches):
            raise second_round(next(param.name for param in self._params if self.used[param.index]))
        replaced = self.make_exact() if any(self._launches) else []
        self.rounds += 1
        self._has_local = False
        self._completed.clear()
        self._round = self._round_of(self.order)
        for bucket in (bucket for arena in replaced for bucket in arena.buckets):
            if bucket.parameters.is_cuda:  # another stream may launch it, and must wait for the copy of its shard
                self._round.streams[bucket.index] = {torch.cuda.current_stream(bucket.parameters.device)}
        return self._round

    def _round_of(self, order: list[int]) -> Round:
        missing = [sum(param.parameter.requires_grad for param, _ in bucket.segments) for bucket in self._buckets]
        return Round(order, [False] * len(self._params), missing)

    def _close_round(self, *, may_wait: bool = False) -> None:
        """Launch the remaining buckets of an open round, if there is one."""
        if self._round is None:
            return
        self._late = None  # its buckets are launched now, at the latest
        while not self._round.is_launched:
            self._launch_next(self._round, may_wait=may_wait)
        self._round = None
        # The user's code may wait for the device before the next step.
        for transport in {bucket.arena.transport for bucket in self._buckets}:
            transport.expect_progress(self._buckets[0].parameters.device)

    def _launch_next(self, current: Round, *, may_wait: bool) -> None:
        with defer_signals():
            index = current.order[current.next]
            self._launch(index, current, may_wait=may_wait)

    @torch.no_grad()
    def _launch(self, index: int, current: Round, *, may_wait: bool) -> None:
        """Reduce the next bucket of the round. If this raises before it sends, the bucket remains the next one."""
        bucket = self._buckets[index]
        staging = self._pool.acquire(bucket, may_wait=may_wait)
        try:
            with joined_streams(current.streams.get(index), bucket.parameters.device):
                error = copy_in(bucket, staging.send, self.used, current.partly_launched)
            stats = self._new_stats(bucket, with_squares=self._with_squares)
            if self._take is None:
                is_later = self._launches[index] > 0
                self._pool.reduce_scatter(bucket, staging, gradient_shard(bucket), accumulate=is_later, stats=stats)
            else:
                shard = self._scratch.take(bucket)
                then = partial(self._pass_on, bucket, shard, stats)
                self._pool.reduce_scatter(bucket, staging, shard, accumulate=False, stats=stats, then=then)
        except BaseException:
            self._pool.release(bucket, staging)
            raise
        self._refused = self._refused or error
        current.streams.pop(index, None)
        current.next += 1
        self._launches[index] += 1
        self._free_gradients(bucket, current.partly_launched)

    def _pass_on(self, bucket: FlatBucket, shard: Tensor, stats: GradStats) -> None:
        """Give a reduced shard to ``take``, unless all gradients are being discarded."""
        assert self._take is not None
        if self._is_discarding or self._take(bucket, shard, stats, self.used):
            self._scratch.give_back(bucket)

    def _free_gradients(self, bucket: FlatBucket, partly_launched: dict[int, Tensor | None]) -> None:
        for param, _ in bucket.segments:
            parameter = param.parameter
            if len(param.buckets) == 1:
                parameter.grad = None
                continue
            if param.index not in partly_launched:
                partly_launched[param.index] = param.gradient
                parameter.grad = None
            if len({self._launches[other.index] for other in param.buckets}) == 1:  # this was the last of them
                del partly_launched[param.index]

    # Between backwards

    def close(self) -> None:
        with self._lock:
            if self._has_local and self._round is None:
                self._open_round()
            self._close_round(may_wait=True)
            self.local_error = self._refused or self._find_foreign_gradient()
            self._has_local = not self._is_synchronizing
            never_launched = [index for index in self.order if self._launches[index] == 0]
            if never_launched:
                self._round = self._round_of(never_launched)
                self._close_round(may_wait=True)

    def _find_foreign_gradient(self) -> str | None:
        """Return an error if ``p.grad`` was written after its gradient was reduced and freed: it would be ignored."""
        for param in self._params:
            if param.parameter.grad is not None and all(self._launches[bucket.index] for bucket in param.buckets):
                return foreign_gradient(param)
        return None

    def close_open_round(self) -> None:
        with self._lock:
            self._close_round(may_wait=True)

    @property
    def rounds_since_reset(self) -> int:
        if not self.order:
            return 0
        # Every round launches the last bucket once; an open round may not have done so yet.
        return self._launches[self.order[-1]] + int(self._round is not None and not self._round.is_launched)

    @property
    def rounds_after_close(self) -> int:
        return max(1, self.rounds_since_reset + int(self._has_local and self._round is None))

    def catch_up(self, count: int) -> None:
        with self._lock:
            self._close_round(may_wait=True)
            while self.order and self.rounds_since_reset < count:
                self._open_round()
                self._close_round(may_wait=True)

    @property
    def is_idle(self) -> bool:
        return self._round is None and self._pool.is_idle

    def wait_all(self) -> None:
        self._pool.wait_all()

    def _wait_for_device(self, device: torch.device) -> None:
        self._pool.wait_for_device(device)

    def learn_order(self) -> None:
        # Incomplete buckets (unused parameters) go last. If rank 0 had no gradient, the next step tries again. The host
        # waits for the device here, so it must not try again only because no bucket was complete.
        if self._order_is_learned or not self._buckets:
            return
        completed = set(self._completed)
        order = self._completed + [index for index in self.order if index not in completed]
        device = self._buckets[0].parameters.device
        agreed = torch.tensor([any(self.used), *order], dtype=torch.int64, device="cpu").to(device)
        self._transport.broadcast(agreed).wait()
        has_gradient, *self.order = agreed.tolist()
        self._order_is_learned = bool(has_gradient)

    def reset(self) -> None:
        self._is_discarding = True
        try:
            self.close_open_round()
            self.wait_all()
        finally:
            self._is_discarding = False
        self._pool.trim()
        super().reset()
        self._launches = [0] * len(self._buckets)
        self._refused = None
        self._scratch.reset()

    def shard_bytes(self) -> int:
        return self._scratch.nbytes()

    def staging_bytes(self) -> int:
        return self._pool.nbytes()


def _is_nested_backward() -> bool:
    """Return whether the backward that has just ended runs inside another one (reentrant activation checkpointing).

    If so, the backward of an autograd Function written in Python is on this thread's stack.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _CUSTOM_BACKWARD:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_CUSTOM_BACKWARD: Any = torch.autograd.function.BackwardCFunction.apply.__code__
