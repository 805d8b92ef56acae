# SPDX-License-Identifier: Apache-2.0
"""Gradients that stay in ``p.grad``, where peers read them: it is a view of a flat buffer of the transport.

As under DDP with ``gradient_as_bucket_view``: the hook of a new gradient copies it into its place and makes ``p.grad``
that place; further gradients are added there by autograd. While it is in the cache it is checked for being finite, and
small enough that no sum over ranks overflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardadam.engine.reduction.base import check_gradient
from shardadam.engine.storage import FlatArena, FlatBucket, ShardedParam, view_of
from shardadam.transport import Transport
from shardadam.update import Sources


class BucketViews:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._divisor = transport.world_size * transport.replicas
        self._flats: dict[FlatArena, Tensor] = {}
        self._params: list[ShardedParam] = []
        self._views: dict[int, Tensor] = {}  # by index
        self._owner_of: dict[int, int] = {}  # by id of the view: the index
        self._checked: dict[int, int] = {}  # by index: the version of the view that has been checked
        self._too_large: set[int] = set()  # indices of gradients that are not finite, or whose sum might not be
        self._cleared: set[int] = set()  # indices of views that are known to be zero
        self._sources: dict[int, Sources] = {}  # by index of the bucket

    def add(self, params: list[ShardedParam], buckets: list[FlatBucket]) -> list[ShardedParam]:
        """Gives gradients their places, as far as the transport has any; returns whose. Collective."""
        for bucket in buckets:
            arena = bucket.arena
            if arena not in self._flats and bucket.wire_dtype == arena.parameters.dtype:
                parameters = arena.parameters
                flat = self._transport.gradients(parameters.numel(), parameters.dtype, parameters.device)
                if flat is not None:
                    self._flats[arena] = flat
            if arena in self._flats:
                whole = self._flats[arena][bucket.plan.offset : bucket.plan.offset + bucket.numel]
                self._sources[bucket.index] = Sources(self._transport.sources(whole), 1 / self._divisor)
        bucket_views = [param for param in params if param.arena in self._flats]
        for param in bucket_views:
            view = self._views[param.index] = view_of(self._flats[param.arena], param)
            self._owner_of[id(view)] = param.index
            self._cleared.add(param.index)
        self._params += bucket_views
        return bucket_views

    def holds(self, bucket: FlatBucket) -> bool:
        return bucket.index in self._sources

    def sources(self, bucket: FlatBucket) -> Sources:
        return self._sources[bucket.index]

    @torch.no_grad()
    def take(self, param: ShardedParam) -> None:
        """Takes what autograd has just put into ``p.grad``."""
        parameter, view = param.parameter, self._views[param.index]
        if parameter.grad is not None and parameter.grad is not view:
            check_gradient(param)
            view.copy_(parameter.grad)
            parameter.grad = view
            torch.autograd.graph.increment_version(view)  # once more: a new gradient, not added to
        self._check(param.index, view)

    def bring_in(self, used: list[bool]) -> None:
        """Puts what ``p.grad`` holds now where peers read it; zeros where it holds nothing.

        Args:
            used: which params have a gradient, written here.
        """
        gradients = [self._gradient_of(param) for param in self._params]
        for param, gradient in zip(self._params, gradients, strict=True):
            index = param.index
            view = self._views[index]
            used[index] = gradient is not None
            if gradient is view:
                if self._checked.get(index) != view._version:
                    self._check(index, view)
            elif gradient is not None:  # written by hand, or by another than autograd
                check_gradient(param)
                view.copy_(gradient)
                self._check(index, view)
            elif index not in self._cleared:
                view.zero_()
                self._cleared.add(index)
                self._too_large.discard(index)
                self._checked.pop(index, None)

    def _gradient_of(self, param: ShardedParam) -> Tensor | None:
        gradient = param.parameter.grad
        if gradient is not None and self._owner_of.get(id(gradient), param.index) != param.index:
            return gradient.clone()  # it is in another parameter's place, which may be written before it is read
        return gradient

    def is_finite(self) -> bool:
        """Whether no gradient of this rank can make a sum over ranks infinite or NaN."""
        return not self._too_large

    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flats.values())

    def _check(self, index: int, view: Tensor) -> None:
        self._cleared.discard(index)
        self._checked[index] = view._version
        if view.numel() == 0:
            return
        low, high = (float(extreme) for extreme in torch.aminmax(view))
        exact = torch.promote_types(view.dtype, torch.float32)
        limit = torch.finfo(exact).max / self._divisor
        if math.isfinite(low) and math.isfinite(high) and -limit <= low and high <= limit:
            self._too_large.discard(index)
        else:
            self._too_large.add(index)
