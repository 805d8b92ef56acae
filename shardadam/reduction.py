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
    user's until we join it. Hooks and the end-of-backward callback therefore launch and never wait for a peer.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from shardadam.buckets import FlatBucket, Member, StagingPool, memory_order
from shardadam.transport import Transport

_reducers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Who brings a parameter's gradients to its optimizer: the newest. An older one may live on in a scheduler or a
traceback, and would take them first.
"""


def _take_over(members: list[Member], reducer: GradientReducer | ExternalGradients) -> None:
    for member in members:
        older = _reducers.get(member.parameter)  # type: ignore[no-untyped-call]
        if older is not None and (superseded := older()) is not None:
            superseded.is_superseded = True
        _reducers[member.parameter] = weakref.ref(reducer)


class GradientReducer:
    """Brings the gradients of ``p.grad`` into the gradient shards of all buckets, as means over ranks.

    Args:
        hooked: reduce while backward runs and free ``p.grad`` (``gradient_sync="backward"``). Otherwise everything
            happens in ``close`` and ``p.grad`` stays.

    ``used[ordinal]`` says whether this rank has had a gradient for a parameter since ``reset``; ``rounds`` counts.
    """

    def __init__(self, transport: Transport, *, hooked: bool) -> None:
        self._pool = StagingPool(transport)
        self.used: list[bool] = []
        self.rounds = 0
        self.is_superseded = False
        self._transport = transport
        self._hooked = hooked
        self._members: list[Member] = []
        self._buckets: list[FlatBucket] = []
        self._handles: list[Any] = []
        self._lock = threading.RLock()  # hooks of parameters on two devices run in two threads
        # The launch order, as indices of buckets, and what this rank has seen of the order of completion.
        self.order: list[int] = []
        self._order_is_learned = False
        self._completed: list[int] = []
        self._synchronizing = True
        self._has_local = False  # gradients have gathered in p.grad under no_sync, and no round has taken them
        # Of the round that is open.
        self._open = False
        self._ready: list[bool] = []
        self._missing: list[int] = []  # of each bucket, how many gradients it still waits for
        self._next = 0  # how many buckets of the order have been launched
        self._held: dict[int, Tensor | None] = {}  # gradients of which some pieces have been launched, by ordinal
        # Since reset.
        self._launches: list[int] = []  # of each bucket
        self._taken: list[Snapshot] = []  # not hooked: the gradients that the shards hold
        self._graph_task: int | None = None
        self._streams: dict[int, set[torch.cuda.Stream]] = {}

    def add(self, members: list[Member], buckets: list[FlatBucket]) -> None:
        """Takes new parameters in. Between rounds only."""
        first = len(self._buckets)
        self._members += members
        self._buckets += buckets
        self.used += [False] * len(members)
        self._launches += [0] * len(buckets)
        self.order += range(first, len(self._buckets))
        self._order_is_learned = False
        self._completed.clear()
        for index, bucket in enumerate(buckets, first):
            bucket.index = index
            self._pool.reserve(bucket)
        _take_over(members, self)
        if self._hooked:
            this = weakref.ref(self)
            for member in members:
                hook = _hook(this, member.ordinal)
                register = member.parameter.register_post_accumulate_grad_hook
                self._handles.append(register(hook))  # type: ignore[no-untyped-call]

    @property
    def is_idle(self) -> bool:
        """Whether every transfer that was started has been completed."""
        return not self._open and self._pool.is_idle

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # While backward runs

    def _on_gradient(self, member: Member) -> None:
        check_gradient(member)
        with self._lock:
            if self.is_superseded or not self._synchronizing:
                return
            if self._open and self._ready[member.ordinal]:
                self._close_round()
            if not self._open:
                self._open_round()
            self._close_after_backward()
            self._ready[member.ordinal] = True
            for bucket in member.buckets:
                index = bucket.index
                if member.parameter.is_cuda:
                    self._streams.setdefault(index, set()).add(torch.cuda.current_stream(member.parameter.device))
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
        self._ready = [False] * len(self._members)
        self._missing = [sum(member.parameter.requires_grad for member, _ in b.pieces) for b in self._buckets]
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
        """Launches what has not been launched since ``reset``, zeros for gradients that are absent.

        Collective: the ranks that have seen no gradient at all take part with zeros.
        """
        with self._lock:
            if self._has_local and not self._open:
                self._open_round()
            self._close_round(may_wait=True)
            self._has_local = self._hooked and not self._synchronizing
            if not self._hooked and not is_current(self._taken, self._members):
                self.reset()
                self.rounds += 1
                self._taken = snapshot(self._members)
            for index in self.order:
                if self._launches[index] == 0:
                    self._launch(index, may_wait=True)

    def close_open_round(self) -> None:
        """Launches what is left of a round that is open. Does nothing between rounds."""
        with self._lock:
            self._close_round(may_wait=True)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients gather in ``p.grad``; the next round takes them."""
        self.close_open_round()
        before, self._synchronizing = self._synchronizing, False
        try:
            yield
        finally:
            self._synchronizing = before
            self._has_local = self._hooked

    def catch_up(self, count: int) -> None:
        """Runs rounds of zeros until there have been ``count`` since ``reset``, as on the ranks that have run most."""
        with self._lock:
            self._close_round(may_wait=True)
            while self.rounds_since_reset < count:
                self._open_round()
                self._close_round(may_wait=True)

    @property
    def rounds_since_reset(self) -> int:
        """How many rounds this rank has run or opened since ``reset``: the last bucket is launched once in each."""
        if not self.order:
            return 0
        return self._launches[self.order[-1]] + int(self._open and self._next < len(self.order))

    def settle(self) -> None:
        """Waits for all transfers: the gradient shards hold the means."""
        self._pool.drain()

    def reset(self) -> None:
        """Forgets the reduced gradients: the next round overwrites the gradient shards. Waits for what is under way."""
        self.close_open_round()
        self.settle()
        self._launches = [0] * len(self._buckets)
        self.used = [False] * len(self._members)
        self._has_local = False
        self._taken = []

    def staging_bytes(self) -> int:
        return sum(staging.nbytes for staging in self._pool.buffers())

    def learn_order(self) -> None:
        """Makes the order in which rank 0's last backward completed the buckets the launch order of all ranks.

        Collective. Buckets that did not complete (unused parameters) go last. Until rank 0 has seen a gradient the
        order of the layout serves.
        """
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
        index = self.order[self._next]
        self._next += 1
        self._launch(index, may_wait=may_wait)

    @torch.no_grad()
    def _launch(self, index: int, *, may_wait: bool) -> None:
        bucket = self._buckets[index]
        self._join_streams(index, bucket)
        staging = self._pool.acquire(bucket, may_wait=may_wait)
        send = staging.send[: bucket.numel]
        self._fill(send, bucket)
        scale = 1 / self._transport.world_size
        if send.dtype == torch.float16:  # the sum of halves would overflow long before the mean does
            send.mul_(scale)
            scale = 1.0
        pending = self._transport.reduce_scatter(
            staging, bucket.numel, bucket.shard.gradient, scale=scale, accumulate=self._launches[index] > 0
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
        for member, piece in bucket.pieces:
            target = send[piece.offset : piece.offset + piece.numel]
            check_gradient(member)
            gradient = self._held.get(member.ordinal, member.parameter.grad)
            if gradient is None:
                zeros.append(target)
                continue
            self.used[member.ordinal] = True
            targets.append(target)
            gradients.append(memory_order(gradient, member.parameter)[piece.start : piece.start + piece.numel])
        if targets:
            torch._foreach_copy_(targets, gradients)
        if zeros:
            torch._foreach_zero_(zeros)

    def _free_gradients(self, bucket: FlatBucket) -> None:
        for member, _ in bucket.pieces:
            parameter, ordinal = member.parameter, member.ordinal
            if ordinal not in self._held:
                self._held[ordinal], parameter.grad = parameter.grad, None
            # A parameter in several buckets is through once they have been launched equally often. Until then what it
            # held when its first piece was launched stays what this round reduces, whatever arrives in p.grad.
            if len(member.buckets) == 1 or len({self._launches[b.index] for b in member.buckets}) == 1:
                del self._held[ordinal]

    def _join_streams(self, index: int, bucket: FlatBucket) -> None:
        """Gradients may have been computed on several streams; the copy waits for them all."""
        for stream in self._streams.pop(index, ()):
            current = torch.cuda.current_stream(bucket.parameters.device)
            if stream != current:
                current.wait_stream(stream)


class ExternalGradients:
    """Gradients that somebody else has averaged (DDP, Trainer): each rank takes its segments out of ``p.grad``.

    The same surface as ``GradientReducer``; nothing travels and nothing runs while backward does.
    """

    def __init__(self) -> None:
        self.used: list[bool] = []
        self.rounds = 0
        self.is_superseded = False
        self.order: list[int] = []
        self._members: list[Member] = []
        self._buckets: list[FlatBucket] = []
        self._taken: list[Snapshot] = []

    def add(self, members: list[Member], buckets: list[FlatBucket]) -> None:
        _take_over(members, self)
        self._members += members
        for index, bucket in enumerate(buckets, len(self._buckets)):
            bucket.index = index
            self.order.append(index)
        self._buckets += buckets
        self.used += [False] * len(members)

    is_idle = True

    def remove_hooks(self) -> None:
        return None

    @torch.no_grad()
    def close(self) -> None:
        if is_current(self._taken, self._members):
            return
        self.rounds += 1
        self._taken = snapshot(self._members)
        for bucket in self._buckets:
            for member, _ in bucket.pieces:
                check_gradient(member)
                self.used[member.ordinal] = member.parameter.grad is not None
            bucket.shard.gradient.zero_()
            targets, gradients = [], []
            for member, segment in bucket.segments:
                gradient = member.parameter.grad
                if gradient is not None:
                    ordered = memory_order(gradient, member.parameter)
                    targets.append(bucket.shard.gradient[segment.offset : segment.offset + segment.numel])
                    gradients.append(ordered[segment.start : segment.start + segment.numel])
            if targets:
                torch._foreach_copy_(targets, gradients)

    def close_open_round(self) -> None:
        return None

    def catch_up(self, count: int) -> None:
        return None

    rounds_since_reset = 0

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def settle(self) -> None:
        return None

    def learn_order(self) -> None:
        return None

    def reset(self) -> None:
        self._taken = []
        self.used = [False] * len(self.used)

    def staging_bytes(self) -> int:
        return 0


Snapshot = tuple[Tensor | None, int]


def snapshot(members: list[Member]) -> list[Snapshot]:
    """The gradients in ``p.grad``, such that ``is_current`` can tell whether they have been written since."""
    return [(g, -1 if g is None else g._version) for g in (member.parameter.grad for member in members)]


def is_current(taken: list[Snapshot], members: list[Member]) -> bool:
    now = snapshot(members)
    return len(now) == len(taken) and all(
        g is before and version == version_before
        for (g, version), (before, version_before) in zip(now, taken, strict=True)
    )


def check_gradient(member: Member) -> None:
    gradient = member.parameter.grad
    if gradient is None:
        return
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"Parameter {member.name!r} has a sparse gradient ({gradient.layout}), expected a dense one. Build the "
            "embedding with sparse=False, or keep the parameter in an optimizer of its own (torch.optim.SparseAdam)."
        )
    if gradient.shape != member.shape:
        raise RuntimeError(
            f"Parameter {member.name!r} has a gradient of shape {tuple(gradient.shape)}, expected "
            f"{tuple(member.shape)} as when the optimizer was built. Build it anew after changing a shape."
        )


def _hook(reducer: weakref.ref[GradientReducer], ordinal: int) -> Callable[[Tensor], None]:
    """A hook that does not keep the reducer alive."""

    def on_gradient(parameter: Tensor) -> None:
        live = reducer()
        if live is not None:
            live._on_gradient(live._members[ordinal])

    return on_gradient


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
