# SPDX-License-Identifier: Apache-2.0
"""The interface of a transport: how to allocate, where to allocate, what to move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam.chunks import OnChunk, sum_sources_
from shardadam.ranks.store_barrier import StoreBarrier


class Pending(ABC):
    """A transfer under way. Its buffers belong to the transport until ``wait`` has returned.

    ``wait`` is called once. Where transfers run on a device's stream it makes the current stream wait and returns at
    once; where the host takes part in them (Gloo, shared memory) it blocks until the peers have come.

    Args:
        on_host: whether ``wait`` is work of the host, which may as well be done as soon as it is ``done``.
    """

    on_host = True

    @abstractmethod
    def done(self) -> bool:
        """True if ``wait`` would return without waiting on the host for a peer."""

    @abstractmethod
    def wait(self) -> None:
        """Completes the transfer; its results are valid on the current stream afterwards."""

    def wait_on_this_stream(self) -> None:
        """After ``wait``: the same for the current stream, where that is another one by now."""
        return None

    def is_released(self) -> bool:
        """After ``wait``: whether what this rank has sent may be written again; peers may be reading it still."""
        return True

    def await_release(self) -> None:
        """Waits for that."""
        return None


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


@dataclass(frozen=True, slots=True)
class ReduceScatter:
    """Sum ``staging.send[:numel]`` over ranks and write ``scale`` times this rank's slice of the sum to ``shard``.

    Args:
        staging: its ``send`` holds the bucket's gradients. The transport may write all of it until it is released.
        numel: elements to sum, from the start of ``send``: a multiple of the world size.
        shard: ``numel / world_size`` elements, float32 or float64 whatever the dtype of ``send``. Not valid before
            ``Pending.wait`` has returned.
        scale: multiplies the sum.
        accumulate: add to what ``shard`` holds instead of overwriting it.
        on_chunk: called with each stretch of ``shard`` once it has its final value.
    """

    staging: Staging
    numel: int
    shard: Tensor
    scale: float
    accumulate: bool
    on_chunk: OnChunk | None = None

    @property
    def send(self) -> Tensor:
        """The bucket: ``numel`` elements."""
        return self.staging.send[: self.numel]

    def sum_(self, sources: Sequence[Tensor]) -> None:
        """Writes the scaled sum of ``sources``, every rank's slice for this rank, to ``shard``."""
        sum_sources_(self.shard, sources, scale=self.scale, accumulate=self.accumulate, on_chunk=self.on_chunk)


class Transport(ABC):
    """Moves flat buffers among the ranks of one process group, for one optimizer.

    ``rank`` and ``world_size`` are those of the shard group; ``replicas`` of them hold the same, and this rank is in
    the ``replica``-th; ``control`` and ``store_barrier`` are of all.
    """

    rank: int
    world_size: int
    replica: int = 0
    replicas: int = 1
    control: dist.ProcessGroup | None = None  # for what ranks must agree on; None for one rank
    store_barrier: StoreBarrier = StoreBarrier(None, 0, [0])

    def parameters(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocates a zeroed flat buffer that parameters will be views of."""
        return torch.zeros(numel, dtype=dtype, device=device)

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        """Allocates room for a bucket of up to ``numel`` elements. Local."""
        return Staging(torch.empty(numel, dtype=dtype, device=device), None)

    def discard(self, staging: Staging) -> None:
        """Gives a staging buffer back, whose transfers are over and released. Local."""
        return None

    def gradients(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Allocates a zeroed flat buffer of gradients that peers read where they lie; None where there is no such
        thing.
        """
        return None

    def sources(self, flat: Tensor) -> list[Tensor]:
        """Of a slice of such a buffer: this rank's slices of it on all ranks, in rank order, where they lie. Local.

        What peers have written before a ``fence``, or before an ``all_reduce``, is there after it.
        """
        raise NotImplementedError

    @abstractmethod
    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        """Starts a reduce-scatter. All ranks must pass the same ``numel``, and a ``send`` of the same dtype."""

    @abstractmethod
    def all_gather(self, flat: Tensor) -> Pending:
        """In place: every rank's slice of ``flat`` becomes what that rank holds there."""

    @abstractmethod
    def all_reduce(self, block: Tensor) -> Pending:
        """In place: the sum of a small ``block`` over ranks."""

    @abstractmethod
    def broadcast(self, tensor: Tensor) -> Pending:
        """In place: what rank 0 of the group holds. ``tensor`` must be dense in memory; its memory is what travels."""

    def fence(self) -> None:
        """Returns when all ranks have come here."""
        self.all_reduce(torch.zeros(1)).wait()

    def poll(self, seconds: float) -> bool:
        """Waits a moment for news of the peers; False, at once, where there is no way to. Local."""
        return False

    def abort(self) -> None:
        """Tells the others, where there is a way to, that this rank does not go on with them. Local."""
        return None

    def close(self, *, clean: bool) -> None:
        """Gives back what the transport holds outside its buffers, when its optimizer is gone. Not collective.

        Args:
            clean: every transfer that has been started has been waited for.
        """
        return None


def in_memory_order(tensor: Tensor) -> Tensor:
    """The bytes of a dense ``tensor`` as they lie in memory: backends treat dtypes and strides differently."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def own_slice(flat: Tensor, rank: int, world_size: int) -> Tensor:
    """``rank``'s of ``world_size`` equal slices of a flat buffer."""
    shard_numel = flat.numel() // world_size
    return flat[rank * shard_numel : (rank + 1) * shard_numel]
