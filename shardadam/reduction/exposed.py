# SPDX-License-Identifier: Apache-2.0
"""Gradients that stay in ``p.grad``, where neighbours read them: it is a view of a flat buffer of the transport.

As under DDP with ``gradient_as_bucket_view``: the hook of a new gradient copies it into its place and makes ``p.grad``
that place; further gradients are added there by autograd. While it is in the cache it is checked for being finite, and
small enough that no sum over ranks overflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardadam.buckets import FlatArena, FlatBucket, Member, view_of
from shardadam.reduction.base import check_gradient
from shardadam.transport import Transport
from shardadam.update import Sources


class ExposedGradients:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._divisor = transport.world_size * transport.replicas
        self._flats: dict[FlatArena, Tensor] = {}
        self._members: list[Member] = []
        self._views: dict[int, Tensor] = {}  # by ordinal
        self._owner_of: dict[int, int] = {}  # by id of the view: the ordinal
        self._checked: dict[int, int] = {}  # by ordinal: the version of the view that has been checked
        self._too_large: set[int] = set()  # ordinals of gradients that are not finite, or whose sum might not be
        self._cleared: set[int] = set()  # ordinals of views that are known to be zero
        self._sources: dict[int, Sources] = {}  # by index of the bucket

    def add(self, members: list[Member], buckets: list[FlatBucket]) -> list[Member]:
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
        exposed = [member for member in members if member.arena in self._flats]
        for member in exposed:
            view = self._views[member.ordinal] = view_of(self._flats[member.arena], member)
            self._owner_of[id(view)] = member.ordinal
            self._cleared.add(member.ordinal)
        self._members += exposed
        return exposed

    def holds(self, bucket: FlatBucket) -> bool:
        return bucket.index in self._sources

    def sources(self, bucket: FlatBucket) -> Sources:
        return self._sources[bucket.index]

    @torch.no_grad()
    def take(self, member: Member) -> None:
        """Takes what autograd has just put into ``p.grad``."""
        parameter, view = member.parameter, self._views[member.ordinal]
        if parameter.grad is not None and parameter.grad is not view:
            check_gradient(member)
            view.copy_(parameter.grad)
            parameter.grad = view
            torch.autograd.graph.increment_version(view)  # once more: it is another gradient, and not added to (Watch)
        self._check(member.ordinal, view)

    def bring_in(self, used: list[bool]) -> None:
        """Puts what ``p.grad`` holds now where neighbours read it; zeros where it holds nothing.

        Args:
            used: which members have a gradient, written here.
        """
        gradients = [self._gradient_of(member) for member in self._members]
        for member, gradient in zip(self._members, gradients, strict=True):
            ordinal = member.ordinal
            view = self._views[ordinal]
            used[ordinal] = gradient is not None
            if gradient is view:
                if self._checked.get(ordinal) != view._version:
                    self._check(ordinal, view)
            elif gradient is not None:  # written by hand, or by another than autograd
                check_gradient(member)
                view.copy_(gradient)
                self._check(ordinal, view)
            elif ordinal not in self._cleared:
                view.zero_()
                self._cleared.add(ordinal)
                self._too_large.discard(ordinal)
                self._checked.pop(ordinal, None)

    def _gradient_of(self, member: Member) -> Tensor | None:
        gradient = member.parameter.grad
        if gradient is not None and self._owner_of.get(id(gradient), member.ordinal) != member.ordinal:
            return gradient.clone()  # it is in another parameter's place, which may be written before it is read
        return gradient

    def is_finite(self) -> bool:
        """Whether no gradient of this rank can make a sum over ranks infinite or NaN."""
        return not self._too_large

    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self._flats.values())

    def _check(self, ordinal: int, view: Tensor) -> None:
        self._cleared.discard(ordinal)
        self._checked[ordinal] = view._version
        if view.numel() == 0:
            return
        low, high = (float(extreme) for extreme in torch.aminmax(view))
        exact = torch.promote_types(view.dtype, torch.float32)
        limit = torch.finfo(exact).max / self._divisor
        if math.isfinite(low) and math.isfinite(high) and -limit <= low and high <= limit:
            self._too_large.discard(ordinal)
        else:
            self._too_large.add(ordinal)
