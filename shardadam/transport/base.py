# SPDX-License-Identifier: Apache-2.0
"""The interface of a transport: how to allocate, where to allocate, what to move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.agreement import Meeting
from shardadam.chunks import chunks


class Pending(ABC):
    """A transfer under way. Its buffers belong to the transport until ``wait`` has returned.

    ``wait`` is called once. Where transfers run on a device's stream it makes the current stream wait and returns at
    once; where the host takes part in them (Gloo) it blocks until the peers have come.
    """

    @abstractmethod
    def done(self) -> bool:
        """True if ``wait`` would return without waiting on the host for a peer."""

    @abstractmethod
    def wait(self) -> None:
        """Completes the transfer; its results are valid on the current stream afterwards."""


class Finished(Pending):
    """A transfer that was complete when it was asked for."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Staging:
    """Room for one bucket of gradients on its way: ``send`` is filled by the caller; ``receive`` is the transport's
    own.
    """

    send: Tensor
    receive: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.send.nbytes + (0 if self.receive is None else self.receive.nbytes)


class Transport(ABC):
    """Moves flat buffers among the ranks of one process group, for one optimizer."""

    rank: int
    world_size: int
    control: dist.ProcessGroup | None = None  # for what ranks must agree on; None for one rank
    meeting: Meeting = Meeting(None, 0, [0])

    def parameters(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocates a zeroed flat buffer that parameters will be views of."""
        return torch.zeros(numel, dtype=dtype, device=device)

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        """Allocates room for a bucket of up to ``numel`` elements."""
        return Staging(torch.empty(numel, dtype=dtype, device=device), None)

    @abstractmethod
    def reduce_scatter(self, staging: Staging, numel: int, shard: Tensor, *, scale: float, accumulate: bool) -> Pending:
        """Sums ``staging.send[:numel]`` over ranks; ``scale`` times this rank's slice of the sum goes to ``shard``.

        Args:
            numel: a multiple of the world size.
            shard: ``numel / world_size`` elements, float32 or float64, whatever travels. Not valid before ``wait``.
            accumulate: add to what ``shard`` holds, instead of overwriting it.
        """

    @abstractmethod
    def all_gather(self, flat: Tensor) -> Pending:
        """In place: every rank's slice of ``flat`` becomes what that rank holds there."""

    @abstractmethod
    def all_reduce(self, block: Tensor) -> Pending:
        """In place: the sum of a small ``block`` over ranks."""

    @abstractmethod
    def broadcast(self, tensor: Tensor) -> Pending:
        """In place: what rank 0 of the group holds. ``tensor`` must be dense in memory; its memory is what travels."""

    def close(self, *, clean: bool) -> None:
        """Gives back what the transport holds outside its buffers, when its optimizer is gone. Not collective.

        Args:
            clean: every transfer that has been started has been waited for.
        """
        return None


def sum_sources_(shard: Tensor, sources: Sequence[Tensor], *, scale: float, accumulate: bool) -> None:
    """``scale`` times the sum of ``sources``, in their order and in the dtype of ``shard``, into or onto ``shard``."""
    for chunk in chunks(0, shard.numel(), shard.device):
        part = shard[chunk]
        total = torch.empty_like(part) if accumulate else part
        first, *others = (source[chunk] for source in sources)
        if others and first.dtype == others[0].dtype == total.dtype:
            torch.add(first, others.pop(0), out=total)
        else:
            total.copy_(first)
        for other in others:
            total.add_(other)
        if scale != 1:
            total.mul_(scale)
        if accumulate:
            part.add_(total)


def own_slice(flat: Tensor, rank: int, world_size: int) -> Tensor:
    """``rank``'s of ``world_size`` equal slices of a flat buffer."""
    shard_numel = flat.numel() // world_size
    return flat[rank * shard_numel : (rank + 1) * shard_numel]
