# SPDX-License-Identifier: Apache-2.0
"""Gradients that this rank need not reduce: it is alone, or DDP or a trainer averages ``p.grad``
(``gradient_sync="external"``).

Statistics and update read the gradients where autograd has left them. They are copied to gradient shards only if
something writes to them there: clipping by value, a second backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardadam.chunks import chunks
from shardadam.engine.reduction.base import (
    NOTHING_SEEN,
    Reducer,
    Take,
    check_gradient,
    foreign_gradient,
    gradient_error,
    second_round,
    stats_of,
)
from shardadam.engine.reduction.copy_in import joined_streams
from shardadam.engine.reduction.during_backward import DuringBackward
from shardadam.engine.storage import FlatArena, FlatBucket, ShardedParam, gradient_shard
from shardadam.engine.strides import memory_order
from shardadam.layout import ALIGNMENT_NUMEL, Segment
from shardadam.sums import kernels_for
from shardadam.sums.reference import program_count
from shardadam.sums.scattered import Parts, Piece, Scattered
from shardadam.sums.stats import GradStats

_GROUP_NUMEL = 1 << 17
"""Most elements of the small gradients that one call measures together: as many as fit the cache of a CPU."""


class LocalReducer(Reducer):
    """Finds the gradients in ``close``, unless none was written or replaced since the last time. Sends nothing.

    Args:
        is_external: other code has averaged them. Otherwise they are rounded as if they were sent, so that results do
            not depend on the number of ranks.
    """

    keeps_gradients = True

    def __init__(self, *, is_external: bool) -> None:
        super().__init__()
        self._is_external = is_external
        self._gradients: dict[FlatArena, list[Tensor | None]] = {}  # by arena index: those that are not in a shard
        self._unordered: list[int] = []  # indices of the params whose logical order is not their memory order
        self._scattered: dict[FlatArena, Scattered] = {}  # of the arenas whose gradients are not in the shard
        self._in_shard: set[FlatArena] = set()  # the arenas whose gradients are
        self._arena_stats: dict[FlatArena, GradStats] = {}
        self._to_measure: dict[FlatArena | FlatBucket, list[Parts]] = {}  # see ``_parts_of``
        self._seen = NOTHING_SEEN  # of ``p.grad``

    def add(self, params: list[ShardedParam], buckets: list[FlatBucket]) -> None:
        super().add(params, buckets)
        for arena in dict.fromkeys(param.arena for param in params):
            self._gradients[arena] = [None] * len(arena.params)
        self._unordered += [param.index for param in params if not param.is_plain]
        if not self._is_external:
            for bucket in buckets:
                bucket.arena.gradient_scale = 1 / bucket.arena.shard_group.divisor

    @torch.no_grad()
    def close(self) -> None:
        now = self._seen_gradients()
        if now.is_same(self._seen):
            return
        self.reset()
        self.rounds += 1
        gradients = self._gradients_in(now)
        for index in self._unordered:
            gradients[index] = _ordered(self._params[index], gradients[index])
        for arena in self._gradients:
            self._gradients[arena] = gradients[arena.indices]
        self.used = [gradient is not None for gradient in gradients]
        self._seen = now

    def _take(self, param: ShardedParam, gradient: Tensor) -> None:
        """Add a gradient to what the parameter has since ``reset``."""
        is_first, self.used[param.index] = not self.used[param.index], True
        self._arena_stats.pop(param.arena, None)
        self._scattered.pop(param.arena, None)
        if is_first and param.arena not in self._in_shard:
            self._gradients[param.arena][param.arena_index] = _ordered(param, gradient)
        else:
            ordered = memory_order(gradient, param.local)
            self._move_to_shard(param.arena)
            for bucket, segment, target in _segments(param):
                for chunk in chunks(0, segment.numel, target.device):  # on the CPU, other dtypes take temporaries
                    target[chunk].add_(ordered[segment.start + chunk.start : segment.start + chunk.stop])
                self._grad_stats.pop(bucket.index, None)

    def _move_to_shard(self, arena: FlatArena) -> None:
        """Copy the arena's gradients to its shard, unless they are there."""
        if arena in self._in_shard:
            return
        scattered = self.scattered(arena)
        assert scattered is not None
        arena.allocate_gradient_shard(arena.format.gradient_dtype)
        for bucket in arena.buckets:
            segments = [segment for _, segment in bucket.shard_segments]
            scattered.write_(gradient_shard(bucket), segments, 0, bucket.plan.shard_numel)
        self._in_shard.add(arena)
        self._scattered.pop(arena)
        self._gradients[arena] = [None] * len(arena.params)

    def gradients(self, bucket: FlatBucket) -> Scattered | None:
        return self.scattered(bucket.arena)

    def scattered(self, arena: FlatArena) -> Scattered | None:
        """Return the gradients of the arena's parameters where they are; None if its gradient shard has them."""
        if arena in self._in_shard:
            return None
        if arena not in self._scattered:
            self._scattered[arena] = self._scatter(arena, self._gradients[arena])
        return self._scattered[arena]

    def _scatter(self, arena: FlatArena, gradients: list[Tensor | None]) -> Scattered:
        """Return gradients of the arena's parameters for statistics and update; without kernels, in this very list."""
        dtype = arena.format.exact_dtype
        if not self._is_external and arena.buckets[0].wire_dtype in (torch.bfloat16, torch.float16):
            dtype = arena.buckets[0].wire_dtype
        if arena.squares is None:
            return Scattered(gradients, dtype)
        return scatter(arena, gradients, _common_dtype(gradients, dtype) if self._is_external else dtype)

    @torch.no_grad()
    def grad_stats(self, *, with_squares: bool) -> list[GradStats]:
        found = [self._overwritten]
        for arena in self._arenas():
            scattered = self.scattered(arena)
            if scattered is None:
                for bucket in arena.buckets:
                    if bucket.index not in self._grad_stats:
                        self._measure(bucket, with_squares=True)
                    found.append(self._grad_stats[bucket.index])
            else:
                stats = self._arena_stats.get(arena)
                if stats is None or (with_squares and not stats.with_squares):
                    stats = self._arena_stats[arena] = self._measure_arena(arena, scattered, with_squares=with_squares)
                found.append(stats)
        return found

    def _measure_arena(self, arena: FlatArena, scattered: Scattered, *, with_squares: bool) -> GradStats:
        """Return the statistics of the gradients of this rank's shards."""
        if scattered.addresses is not None:
            return measure(arena, scattered)
        stats = stats_of(arena, None, with_squares=with_squares)
        if with_squares:
            stats.update_pieces([piece for bucket in arena.buckets for piece in _pieces(bucket, scattered)])
        else:
            self._find_nonfinite(arena, scattered, stats)
        return stats

    def _find_nonfinite(self, held_by: FlatArena | FlatBucket, scattered: Scattered, stats: GradStats) -> None:
        """Add whether the gradients of this rank's shards of an arena, or of one bucket, are finite."""
        if held_by not in self._to_measure:
            buckets = held_by.buckets if isinstance(held_by, FlatArena) else [held_by]
            self._to_measure[held_by] = parts_to_measure(buckets, scattered.dtype)
        for parts in self._to_measure[held_by]:
            if len(parts.order) > 1 or scattered.has(parts):
                stats.update(scattered.flat(parts))

    @torch.no_grad()
    def sum_up(self) -> None:
        for arena in self._arenas():
            self._move_to_shard(arena)
            for bucket in arena.buckets:
                if bucket.index not in self._grad_stats:
                    self._measure(bucket, with_squares=True)

    def reset(self) -> None:
        super().reset()
        for arena in self._gradients:
            self._gradients[arena] = [None] * len(arena.params)
        self._scattered.clear()
        self._in_shard.clear()
        self._arena_stats.clear()
        self._seen = NOTHING_SEEN
        self.local_error = None


class AloneReducer(LocalReducer, DuringBackward):
    """``gradient_sync="backward"`` on one rank: takes gradients out of ``p.grad`` while backward runs.

    Those of several backwards are summed up in the gradient shard, as on several ranks.
    """

    keeps_gradients = False

    def __init__(self) -> None:
        super().__init__(is_external=False)
        self._streams: dict[torch.device, set[torch.cuda.Stream]] = {}  # those that have computed gradients

    def add(self, params: list[ShardedParam], buckets: list[FlatBucket]) -> None:
        super().add(params, buckets)
        self._hooks.register(params)

    @torch.no_grad()
    def on_gradient(self, index: int) -> None:
        param = self._params[index]
        check_gradient(param)
        with self._lock:
            will_change = self._hooks.put_last(index)  # if so, `close` takes it
            if self._is_synchronizing and not will_change:
                self._take_out(param)

    def _take_out(self, param: ShardedParam) -> None:
        parameter, local = param.parameter, param.local
        if local.is_cuda:
            stream = torch.cuda.current_stream(local.device)
            self._streams.setdefault(local.device, set()).add(stream)
        gradient = param.gradient
        self.rounds += 1
        if gradient is None:
            return
        # A sum in the shard reads and writes what other streams have written.
        is_summed = self.used[param.index] or param.arena in self._in_shard
        streams = self._streams.get(local.device) if is_summed else None
        with joined_streams(streams, local.device):
            if gradient.requires_grad:
                gradient = gradient.detach()  # that of create_graph=True would keep its graph alive until the step
            wire_dtype = param.buckets[0].wire_dtype
            self._take(param, gradient if gradient.dtype == wire_dtype else gradient.to(wire_dtype))
        parameter.grad = None  # last: a gradient that is still there after a signal is an error, not lost

    @torch.no_grad()
    def close(self) -> None:
        with self._lock:
            self.local_error = None
            left = [param for param in self._params if param.parameter.grad is not None]
            for param in left:
                if self.used[param.index] and not self._has_local:
                    self.local_error = self.local_error or foreign_gradient(param)
                    self.rounds += 1  # so that the next sync raises, even if nothing else has changed since the last
                else:
                    error = gradient_error(param)
                    self.local_error = self.local_error or error
                    if error is None:
                        self._take_out(param)
            self._has_local = not self._is_synchronizing

    def gradient_bytes(self) -> int:
        return sum(gradient.nbytes for own in self._gradients.values() for gradient in own if gradient is not None)

    def reset(self) -> None:
        # The memory of gradients that are freed now belongs to the streams that have computed them.
        for device, streams in self._streams.items():
            current = torch.cuda.current_stream(device)
            for stream in streams - {current}:
                stream.wait_stream(current)
        self._streams.clear()
        super().reset()


class AloneInBackward(AloneReducer):
    """``update="backward"`` on one rank: passes on the gradients of each bucket as soon as it has all of them.

    Args:
        take: see ``Take``.
    """

    updates_in_backward = True

    def __init__(self, take: Take) -> None:
        super().__init__()
        self._pass = take
        self._missing: list[int] = []  # by bucket index: the number of gradients that it still needs
        self._passed: list[bool] = []  # by bucket index: since reset

    def add(self, params: list[ShardedParam], buckets: list[FlatBucket]) -> None:
        super().add(params, buckets)
        self._missing += [len(bucket.segments) for bucket in buckets]
        self._passed += [False] * len(buckets)

    def _take(self, param: ShardedParam, gradient: Tensor) -> None:
        if self.used[param.index]:
            raise second_round(param.name)
        super()._take(param, gradient)
        for bucket in param.buckets:
            self._missing[bucket.index] -= 1

    def _take_out(self, param: ShardedParam) -> None:
        super()._take_out(param)
        for bucket in param.buckets:
            if self._missing[bucket.index] == 0 and not self._passed[bucket.index]:
                self._pass_on(bucket)

    def _pass_on(self, bucket: FlatBucket) -> None:
        arena, self._passed[bucket.index] = bucket.arena, True
        gradients = self._gradients[arena]
        # Gradients of the bucket, and updates before this one, may be on several streams.
        device = bucket.parameters.device
        with joined_streams(self._streams.get(device), device):
            if bucket.squares is None:
                scattered = self._scatter(arena, gradients)
                stats = stats_of(arena, None, with_squares=False)
                self._find_nonfinite(bucket, scattered, stats)
            else:
                inside = {param.arena_index for param, _ in bucket.segments}
                own = [gradient if index in inside else None for index, gradient in enumerate(gradients)]
                scattered = self._scatter(arena, own)
                stats = measure_bucket(bucket, scattered)
            self._grad_stats[bucket.index] = stats
            is_used = self._pass(bucket, scattered, stats, self.used)
        for param, _ in bucket.segments if is_used else ():
            if all(self._passed[other.index] for other in param.buckets):
                gradients[param.arena_index] = None

    @torch.no_grad()
    def grad_stats(self, *, with_squares: bool) -> list[GradStats]:
        for bucket in self._buckets:
            if not self._passed[bucket.index]:
                self._pass_on(bucket)
        return [*self._grad_stats.values()]

    def reset(self) -> None:
        super().reset()
        self._missing = [len(bucket.segments) for bucket in self._buckets]
        self._passed = [False] * len(self._buckets)


def _ordered(param: ShardedParam, gradient: Tensor | None) -> Tensor | None:
    """Return a gradient whose logical order is the parameter's memory order. May share the memory of ``gradient``."""
    return gradient if gradient is None or param.is_plain else memory_order(gradient, param.local)


def scatter(arena: FlatArena, gradients: Sequence[Tensor | None], dtype: torch.dtype) -> Scattered:
    """Return the gradients of the arena's parameters for its kernels: contiguous, of one dtype."""
    same = [None if gradient is None else _readable(gradient, dtype) for gradient in gradients]
    return Scattered.with_addresses(same, dtype, arena.parameters.device)


def _common_dtype(gradients: Sequence[Tensor | None], exact: torch.dtype) -> torch.dtype:
    """Return the dtype of the gradients if all have the same, and kernels read it; else ``exact``."""
    dtypes = {gradient.dtype for gradient in gradients if gradient is not None}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {exact, torch.bfloat16, torch.float16} else exact


def _readable(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient as kernels read it: of ``dtype``, contiguous, and not a view that negates its memory."""
    if gradient.dtype == dtype and gradient.is_contiguous() and not gradient.is_neg():
        return gradient  # without calls that would do nothing
    return gradient.to(dtype).resolve_neg().contiguous()


def measure(arena: FlatArena, scattered: Scattered) -> GradStats:
    """Return the statistics of the gradients of this rank's shards, by the arena's kernels."""
    assert scattered.addresses is not None and arena.squares is not None
    squares = arena.squares[: program_count(arena.blocks.numel() * ALIGNMENT_NUMEL)]
    kernels_for(squares.device).measure_scattered(
        scattered.addresses,
        squares,
        blocks=arena.blocks,
        first_blocks=arena.counters.first_blocks,
        numels=arena.counters.numels,
        positions=arena.positions,
    )
    return stats_of(arena, squares, with_squares=True)


def measure_bucket(bucket: FlatBucket, scattered: Scattered) -> GradStats:
    """Return the statistics of the gradients of this rank's shard of one bucket, by its arena's kernels."""
    assert scattered.addresses is not None and bucket.squares is not None
    counters, shard = bucket.arena.counters, bucket.shard
    kernels_for(bucket.squares.device).measure_scattered(
        scattered.addresses,
        bucket.squares,
        blocks=shard.blocks,
        first_blocks=counters.first_blocks,
        numels=counters.numels,
        first_block=shard.first_block,
    )
    return stats_of(bucket.arena, bucket.squares, with_squares=True)


def parts_to_measure(buckets: Sequence[FlatBucket], dtype: torch.dtype) -> list[Parts]:
    """Return the gradients of this rank's shards of the buckets: large ones alone, small ones in groups."""
    groups: list[list[Piece]] = []
    room = 0
    for bucket in buckets:
        for param, segment in bucket.shard_segments:
            if segment.numel > room:
                groups.append([])
                room = _GROUP_NUMEL
            room -= segment.numel
            groups[-1].append(Piece(param.arena_index, segment.start, segment.start + segment.numel))
    arena = buckets[0].arena
    numels = [param.shape.numel() for param in arena.params]
    return [Parts(group, numels, arena.parameters.device, dtype) for group in groups if group]


def _pieces(bucket: FlatBucket, scattered: Scattered) -> Iterator[Tensor]:
    """Yield the parts of gradients in this rank's shard of the bucket."""
    for param, segment in bucket.shard_segments:
        piece = scattered.slice(param.arena_index, segment.start, segment.start + segment.numel)
        if piece is not None:
            yield piece


def _segments(param: ShardedParam) -> Iterator[tuple[FlatBucket, Segment, Tensor]]:
    """Yield each part of the parameter in this rank's shards, with its bucket and its slice of the gradient shard."""
    for bucket in param.buckets:
        for other, segment in bucket.shard_segments:
            if other is param:
                yield bucket, segment, gradient_shard(bucket)[segment.offset : segment.offset + segment.numel]
