# SPDX-License-Identifier: Apache-2.0
"""The interface of a reducer, the registry of reducers by parameter, and checks of gradients that all reducers share.

A reducer writes gradient shards. It must not clip, update or gather.
"""

from __future__ import annotations

import operator
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from shardadam.engine.storage import FlatArena, FlatBucket, ShardedParam, gradient_shard
from shardadam.sums.scattered import Scattered
from shardadam.sums.stats import GradStats
from shardadam.transport import Transport, placement
from shardadam.transport.job import ranks_of_transport
from shardadam.update import Sources

Gradients = Tensor | Scattered
"""Reduced gradients of one bucket: this rank's shard, or gradients of its arena's parameters where they are."""

Take = Callable[[FlatBucket, Gradients, GradStats, Sequence[bool]], bool]
"""Takes a bucket's reduced gradients and their statistics, and for each param index whether this rank has had a
gradient. Returns whether it has used them; otherwise it keeps them until the step.
"""

_reducers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By parameter: a weak reference to the newest reducer that has it. Older reducers may be alive, in a scheduler or a
traceback, but must not take its gradients.
"""


def reducer_of(parameter: Tensor) -> Reducer | None:
    """Return the reducer that takes the parameter's gradients; None if there is none, or it was deleted."""
    newest = _reducers.get(parameter)  # type: ignore[no-untyped-call]
    return None if newest is None else newest()


def without_experts_of_others(named: Mapping[str, Tensor], transport: Transport) -> dict[str, Tensor]:
    """Return the parameters without those that another optimizer trains, and that may be others on other ranks."""
    ranks = ranks_of_transport(transport)
    left = {}
    for name, parameter in named.items():
        reducer = reducer_of(parameter)
        params = () if reducer is None else reducer._params
        held_by = [ranks_of_transport(param.arena.transport) for param in params if param.parameter is parameter]
        if all(ranks <= alike for alike in held_by):
            left[name] = parameter
    return left


def parameters_of_gradients(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters that have a reducer and whose ``p.grad`` is one of ``gradients``.

    Without gradients, which "backward" frees, return all parameters that have a reducer and no ``p.grad``.
    """
    wanted = {id(gradient) for gradient in gradients} or {id(None)}
    return [parameter for parameter in _reducers if id(parameter.grad) in wanted]


def _supersede_older(params: list[ShardedParam], reducer: Reducer) -> None:
    for param in params:
        older = reducer_of(param.parameter)
        if older is not None:
            older.is_superseded = True
        _reducers[param.parameter] = weakref.ref(reducer)


class Reducer(ABC):
    """Reduces the gradients in ``p.grad`` to the gradient shards of all buckets, as means over all ranks.

    All gradients that are reduced between two calls of ``reset`` belong to one step.

    Attributes:
        used: by param index: whether this rank has had a gradient since ``reset``.
        order: the indices of all buckets in the order in which they are reduced, the same on all ranks.
        rounds: number of rounds since the reducer was built. If it has not changed, neither have the gradient shards.
        local_error: what the last ``close`` found wrong with this rank's gradients; to be raised on all ranks.
        averages: whether it averages gradients over several ranks.
        takes_gradients: whether gradients are taken out of ``p.grad`` during backward.
        updates_in_backward: whether an update uses the gradients during backward, so that nothing can discard them.
        keeps_gradients: whether ``p.grad`` holds the mean gradients from backward to the step, for others to clip.
        is_superseded: another optimizer has been built over the parameters, and this reducer ignores their gradients.
    """

    averages = False
    takes_gradients = False
    updates_in_backward = False
    keeps_gradients = False

    def __init__(self) -> None:
        self.used: list[bool] = []
        self.order: list[int] = []
        self.rounds = 0
        self.local_error: str | None = None
        self.is_superseded = False
        self._params: list[ShardedParam] = []
        self._parameters: list[Tensor] = []  # those of the params
        self._shapes: list[torch.Size] = []  # of the parameters
        self._distributed: list[int] = []  # indices of the params that are DTensors
        self._buckets: list[FlatBucket] = []
        # Since reset
        self._grad_stats: dict[int, GradStats] = {}  # by bucket index: of what its shard holds
        self._overwritten = GradStats(with_squares=False)  # of shards before they were clipped by value or scaled
        self._replaced: list[Tensor] = []  # gradient shards that streams may still be reading

    def add(self, params: list[ShardedParam], buckets: list[FlatBucket]) -> None:
        """Add parameters and their buckets, and set the buckets' indices. No round may be open.

        Collective: all ranks must call it.
        """
        _supersede_older(params, self)
        self._params += params
        self._parameters += [param.parameter for param in params]
        self._shapes += [param.shape if param.local is param.parameter else param.parameter.shape for param in params]
        self._distributed += [param.index for param in params if param.local is not param.parameter]
        for index, bucket in enumerate(buckets, len(self._buckets)):
            bucket.index = index
            self.order.append(index)
        self._buckets += buckets
        self.used += [False] * len(params)

    def _seen_gradients(self) -> SeenGradients:
        """Return what is in ``p.grad`` now."""
        # First those of DTensors, which may replace what is in p.grad by what is placed as the parameter is.
        of_dtensors = [self._params[index].gradient for index in self._distributed]
        gradients = [*(parameter.grad for parameter in self._parameters), *of_dtensors]
        return SeenGradients(gradients, [-1 if gradient is None else gradient._version for gradient in gradients])

    def _gradients_in(self, seen: SeenGradients) -> list[Tensor | None]:
        """Return what this rank holds of every ``p.grad``; None also for those with a ``gradient_error``.

        The first error becomes ``local_error``, unless there is one.
        """
        gradients = seen.gradients[: len(self._params)]
        present = [gradient for gradient in gradients if gradient is not None]
        expected = [shape for shape, one in zip(self._shapes, gradients, strict=True) if one is not None]
        are_alike = [gradient.shape for gradient in present] == expected
        if are_alike and all(gradient.layout is torch.strided for gradient in present):
            to_check: Iterable[int] = self._distributed
        else:
            to_check = range(len(gradients))
        for index in to_check:
            error = gradient_error(self._params[index])
            self.local_error = self.local_error or error
            gradients[index] = None if error else self._params[index].gradient
        return gradients

    def remove_hooks(self) -> None:
        """Remove what ``add`` has registered: hooks, and this reducer as that of its parameters."""
        for param in self._params:
            if reducer_of(param.parameter) in (self, None):
                _reducers.pop(param.parameter, None)  # type: ignore[no-untyped-call]

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank is the first of those that train some parameter together, and warns on behalf of them."""
        return any(param.arena.transport.store_barrier.rank == 0 for param in self._params)

    def has_taken(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether the gradient of any of ``parameters`` was taken out of ``p.grad`` since ``reset``."""
        if not self.takes_gradients or not any(self.used):
            return False
        wanted = {id(parameter) for parameter in parameters}
        return any(id(own) in wanted for own, used in zip(self._parameters, self.used, strict=True) if used)

    def why_not_in_grad(self, parameter: Tensor) -> str | None:
        """Return why ``p.grad`` is not the averaged gradient, as the end of a message; None if it is."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Start the reduction of all gradients that are not reduced yet; absent ones count as zeros.

        Collective: all ranks must call it, including those without any gradient.
        """

    def close_open_round(self) -> None:
        """Launch the rest of an open round. Only a reducer that works during backward has open rounds."""
        return None

    def no_sync(self) -> AbstractContextManager[None]:
        """Return a context manager in which gradients accumulate in ``p.grad``. By default they always do."""
        return nullcontext()

    @property
    def rounds_since_reset(self) -> int:
        """Number of rounds that this rank has opened since ``reset``; 0 if no rank can run ahead of another."""
        return 0

    @property
    def rounds_after_close(self) -> int:
        """What ``rounds_since_reset`` will be after ``close``."""
        return 0

    def catch_up(self, count: int) -> None:
        """Run rounds of zeros until ``rounds_since_reset`` is ``count``, the largest of any rank."""
        return None

    @property
    def is_idle(self) -> bool:
        """Whether every transfer that was started is complete."""
        return True

    def wait_all(self) -> None:
        """Wait for all transfers that were started."""
        return None

    def _wait_for_device(self, device: torch.device) -> None:
        """Make the current stream of ``device`` wait for all transfers there; for others only if the host must."""
        return None

    def sum_up(self) -> None:
        """Write the means to all gradient shards, if that is not done yet. Collective: all ranks must call it."""
        self.wait_all()

    @torch.no_grad()
    def make_exact(self) -> list[FlatArena]:
        """Keep gradient shards in their lasting dtype from now on, as several rounds or a write need it.

        With gradients "auto" that is the dtype of the arithmetic. The sums of one round have no more digits than the
        dtype in which they have arrived. With others, shards have it from the start.

        Returns:
            The arenas whose shards have been replaced, by copies made on the current stream.
        """
        replaced = []
        for arena in self._arenas():
            lasting, before = arena.format.gradient_dtype, arena.gradient_shard
            if before is not None and before.dtype != lasting:
                self._wait_for_device(arena.parameters.device)
                arena.allocate_gradient_shard(lasting)
                for bucket in arena.buckets:
                    gradient_shard(bucket).copy_(before[bucket.shard_slice])
                self._replaced.append(before)
                replaced.append(arena)
        return replaced

    def gradients(self, bucket: FlatBucket) -> Sources | Scattered | None:
        """Return where the update finds the gradients of the bucket's arena; None if the gradient shard has them."""
        return None

    def await_readers(self) -> None:
        """Wait until no peer reads this rank's gradients any more. Collective: all ranks must call it."""
        return None

    def grad_stats(self, *, with_squares: bool) -> list[GradStats]:
        """Return the statistics of this rank's gradient shards, after ``close``. Collective: all ranks must call it.

        Args:
            with_squares: whether the sums of squares are needed.
        """
        self.sum_up()
        for bucket in self._buckets:
            stats = self._grad_stats.get(bucket.index)
            if stats is None or (with_squares and not stats.with_squares):
                self._measure(bucket, with_squares=with_squares)
        return [*self._grad_stats.values(), self._overwritten]

    def _arenas(self) -> list[FlatArena]:
        return list(dict.fromkeys(bucket.arena for bucket in self._buckets))

    def _new_stats(self, bucket: FlatBucket, *, with_squares: bool) -> GradStats:
        """Replace the statistics of a bucket by new ones, of nothing yet."""
        stats = self._grad_stats[bucket.index] = stats_of(bucket.arena, bucket.squares, with_squares=with_squares)
        return stats

    def _measure(self, bucket: FlatBucket, *, with_squares: bool) -> None:
        self._new_stats(bucket, with_squares=with_squares).measure(gradient_shard(bucket))

    def measure_again(self, bucket: FlatBucket) -> None:
        """Replace the statistics of a bucket whose gradient shard has been written; non-finite ones stay non-finite."""
        before = self._grad_stats[bucket.index]
        self._overwritten.flags += before.finite_flags()
        self._measure(bucket, with_squares=before.with_squares)

    def learn_order(self) -> None:
        """Set ``order`` to that in which rank 0's last backward completed the buckets, if reduction runs in backward.

        Collective: all ranks must call it.
        """
        return None

    def reset(self) -> None:
        """Discard the reduced gradients, after completing all transfers. Does not change ``p.grad``."""
        self.used = [False] * len(self._params)
        self._grad_stats.clear()
        self._overwritten = GradStats(with_squares=False)
        self._replaced.clear()

    def gradient_bytes(self) -> int:
        """Return the bytes of gradients that the reducer holds outside of shards and staging."""
        return 0

    def shard_bytes(self) -> int:
        """Return the bytes of reduced gradients outside of the arenas' gradient shards."""
        return 0

    def staging_bytes(self) -> int:
        """Return the bytes of the staging buffers."""
        return 0


def stats_of(arena: FlatArena, squares: Tensor | None, *, with_squares: bool) -> GradStats:
    """Return statistics, of nothing yet, for gradients of the arena."""
    scale, weight = arena.gradient_scale, arena.norm_weight
    return GradStats(with_squares=with_squares, scale=scale, weight=weight, squares=squares)


def allocate_gradient_shards(buckets: Sequence[FlatBucket]) -> None:
    """Allocate the gradient shards of new buckets."""
    for bucket in buckets:
        bucket.arena.allocate_gradient_shard(shard_dtype(bucket))
        set_gradient_scale(bucket)


def shard_dtype(bucket: FlatBucket) -> torch.dtype:
    """Return the dtype of the bucket's gradient shard; with gradients "auto" that in which the transport's sums arrive,
    until ``Reducer.make_exact``.
    """
    format, device = bucket.arena.format, bucket.parameters.device
    if format.gradients != "auto":
        return format.gradient_dtype
    return bucket.arena.transport.sum_dtype(bucket.wire_dtype, format.gradient_dtype, device)


def set_gradient_scale(bucket: FlatBucket) -> None:
    """Set ``gradient_scale`` of the bucket's arena: what the transport leaves to the reader of its sums."""
    arena = bucket.arena
    leaves_scale = bucket.wire_dtype != torch.float16 and not arena.transport.scales_sums(bucket.parameters.device)
    arena.gradient_scale = 1 / arena.shard_group.divisor if leaves_scale else 1.0


class SeenGradients(NamedTuple):
    """The tensors that were in ``p.grad``, and their versions; of DTensors, followed by their local tensors."""

    gradients: list[Tensor | None]
    versions: list[int]

    def is_same(self, other: SeenGradients) -> bool:
        """Return whether ``p.grad`` held the same tensors, and nothing has written to them in between."""
        same_count = len(self.gradients) == len(other.gradients)
        return (
            same_count and self.versions == other.versions and all(map(operator.is_, self.gradients, other.gradients))
        )


NOTHING_SEEN = SeenGradients([], [])


def gradient_error(param: ShardedParam) -> str | None:
    """Return an error if ``p.grad`` is sparse or its shape differs from the parameter's when it was added."""
    gradient, parameter = param.parameter.grad, param.parameter
    if gradient is None:
        return None
    if gradient.layout != torch.strided:
        return (
            f"Parameter {param.name!r} has a sparse gradient ({gradient.layout}), expected a dense one. Build the "
            "embedding with sparse=False, or give the parameter to an optimizer of its own (torch.optim.SparseAdam)."
        )
    if param.local is parameter:
        shape = param.shape
    else:
        shape = parameter.shape
        if placement.mesh_of(gradient) != placement.mesh_of(parameter):
            return (
                f"Parameter {param.name!r} is a DTensor on {placement.mesh_of(parameter)}, but its gradient is a "
                f"{type(gradient).__name__} on {placement.mesh_of(gradient)}, expected the same mesh. Leave p.grad to "
                "autograd, or distribute what you write there."
            )
    if gradient.shape != shape:
        return (
            f"Parameter {param.name!r} has a gradient of shape {tuple(gradient.shape)}, expected "
            f"{tuple(shape)} as when the optimizer was built. Build a new optimizer after changing a shape."
        )
    return None


def foreign_gradient(param: ShardedParam) -> str:
    """Return the error for a gradient in ``p.grad`` after that of this step was taken out of it."""
    return (
        f"Parameter {param.name!r} has a gradient in p.grad although this optimizer has reduced and freed "
        "it during backward; expected None. If the model is wrapped in DistributedDataParallel "
        "(accelerate's prepare, transformers.Trainer and Lightning's DDP strategy do that), remove the "
        "wrapper (shardadam.integrations.accelerate.ShardedAccelerator, shardadam.integrations."
        'transformers.ShardedTrainer), or build the optimizer with gradient_sync="external". If your own '
        'code writes p.grad after backward, write in p.register_hook instead, or use gradient_sync="step".'
    )


def second_round(name: str) -> RuntimeError:
    """Return the error for a second gradient of parameter ``name`` since the last step, with update="backward"."""
    return RuntimeError(
        f'Parameter {name!r} has a second gradient since the last step, expected one: update="backward" has used the '
        "first one already. To accumulate over several backwards, run all but the last inside optimizer.no_sync(). If "
        "reentrant checkpoints share the parameter, use checkpoint(..., use_reentrant=False). Or build the optimizer "
        'with update="step".'
    )


def check_gradient(param: ShardedParam) -> None:
    """Raise RuntimeError if there is a ``gradient_error``."""
    error = gradient_error(param)
    if error is not None:
        raise RuntimeError(error)
