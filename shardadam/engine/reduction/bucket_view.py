# SPDX-License-Identifier: Apache-2.0
"""Bucket views: ``p.grad`` are views of a flat buffer that the transport allocates and that peers can read.

As in DDP with ``gradient_as_bucket_view``: a hook copies a new gradient into its view and sets ``p.grad`` to the view;
autograd adds later gradients to the view. Only for CPUs, as the host reads values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardadam.engine.reduction.base import check_gradient, gradient_error
from shardadam.engine.storage import FlatArena, FlatBucket, ShardedParam, view_of
from shardadam.engine.strides import memory_order
from shardadam.sums.stats import is_within
from shardadam.transport import Transport
from shardadam.update import Sources


class BucketViews:
    """The bucket views of one optimizer's gradients.

    Each gradient is checked while it is in the cache: it must be finite, and so small that no sum over ranks overflows.
    """

    def __init__(self) -> None:
        self._flats: dict[FlatArena, Tensor] = {}
        self._params: list[ShardedParam] = []  # those with a view
        self._sources: dict[int, Sources] = {}  # by bucket index
        # By param index.
        self._views: dict[int, Tensor] = {}
        self._checked_version: dict[int, int] = {}  # the version of the view when it was checked
        self._not_finite: set[int] = set()
        self._zeroed: set[int] = set()  # the view holds zeros
        self._index_of_view: dict[int, int] = {}  # by id() of the view
        self._ranks: dict[int, int] = {}  # the number of ranks whose gradients are summed up

    def add(self, params: list[ShardedParam], buckets: list[FlatBucket]) -> list[ShardedParam]:
        """Create bucket views for the gradients of ``params``, if the transport has memory that peers can read.

        Collective: all ranks must call it.

        Returns:
            The params that have a view.
        """
        for bucket in buckets:
            arena = bucket.arena
            is_plain = all(param.local is param.parameter for param in arena.params)
            if arena not in self._flats and is_plain and bucket.wire_dtype == arena.parameters.dtype:
                parameters = arena.parameters
                flat = arena.transport.allocate_gradients(parameters.numel(), parameters.dtype, parameters.device)
                if flat is not None:
                    self._flats[arena] = flat
            if arena in self._flats:
                whole = self._flats[arena][bucket.plan.offset : bucket.plan.offset + bucket.numel]
                self._sources[bucket.index] = Sources(arena.transport.sources(whole), 1 / arena.shard_group.divisor)
        viewed = [param for param in params if param.arena in self._flats]
        for param in viewed:
            view = self._views[param.index] = view_of(self._flats[param.arena], param)
            self._index_of_view[id(view)] = param.index
            self._ranks[param.index] = param.arena.shard_group.ranks
            self._zeroed.add(param.index)
        self._params += viewed
        return viewed

    def holds(self, bucket: FlatBucket) -> bool:
        """Return whether the bucket's gradients have views."""
        return bucket.index in self._sources

    def sources(self, bucket: FlatBucket) -> Sources:
        """Return the gradients of all ranks for this rank's shard."""
        return self._sources[bucket.index]

    @torch.no_grad()
    def take(self, param: ShardedParam) -> None:
        """Copy the gradient that autograd has just written into its view, unless it is there already; check it.

        Leaves a gradient of another dtype (``p.grad_dtype``) in ``p.grad``, where it accumulates; ``write`` copies it.
        """
        parameter, view = param.parameter, self._views[param.index]
        if parameter.grad is not None and parameter.grad is not view:
            check_gradient(param)
            if parameter.grad.dtype != view.dtype:
                return
            view.copy_(parameter.grad)
            parameter.grad = view
        self._check(param.index, view)

    def write(self, used: list[bool]) -> str | None:
        """Make every view equal to its ``p.grad``, or zero if that is None. Does not change ``p.grad``.

        Args:
            used: by param index; set to whether there is a gradient.

        Returns:
            An error if a gradient is sparse or has another shape than its parameter; it counts as absent.
        """
        error = None
        gradients = [self._gradient_of(param) for param in self._params]
        for param, gradient in zip(self._params, gradients, strict=True):
            index = param.index
            view = self._views[index]
            if gradient is not view and (found := gradient_error(param)) is not None:
                error, gradient = error or found, None
            used[index] = gradient is not None
            if gradient is view:
                if self._checked_version.get(index) != view._version:
                    self._check(index, view)
            elif gradient is not None:  # the user has replaced it
                view.copy_(gradient)
                self._check(index, view)
            elif index not in self._zeroed:
                view.zero_()
                self._zeroed.add(index)
                self._not_finite.discard(index)
                self._checked_version.pop(index, None)
        return error

    def _gradient_of(self, param: ShardedParam) -> Tensor | None:
        gradient = param.gradient
        if gradient is not None and self._index_of_view.get(id(gradient), param.index) != param.index:
            return gradient.clone()  # another parameter's view, which may be written first
        return gradient

    def are_finite(self) -> bool:
        """Return whether no gradient of this rank can make a sum over ranks infinite or NaN."""
        return not self._not_finite

    def transports(self) -> list[Transport]:
        """Return the transports of the ranks that read the views."""
        return list(dict.fromkeys(arena.transport for arena in self._flats))

    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flats.values())

    def _check(self, index: int, view: Tensor) -> None:
        self._zeroed.discard(index)
        self._checked_version[index] = view._version
        if view.numel() == 0:
            return
        exact = torch.promote_types(view.dtype, torch.float32)  # the dtype of the sum
        if is_within(memory_order(view, view), torch.finfo(exact).max / self._ranks[index]):
            self._not_finite.discard(index)
        else:
            self._not_finite.add(index)
