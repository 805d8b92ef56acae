# SPDX-License-Identifier: Apache-2.0
"""The interface of a transport: how to allocate, where to allocate, what to move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardadam import pages
from shardadam.ranks.store_barrier import StoreBarrier
from shardadam.sums.sources import sum_sources_
from shardadam.sums.stats import GradStats


class Pending(ABC):
    """A transfer in flight. Its buffers must not be used until ``wait`` has returned.

    Call ``wait`` once. If the transfer runs on a CUDA stream, ``wait`` makes the current stream wait and returns at
    once; a second call changes nothing. If the host takes part (Gloo, shared memory), ``wait`` blocks until all ranks
    have started the transfer.

    Attributes:
        on_host: whether ``wait`` is work of the host. If so, it is worth calling as soon as ``done`` returns True.
    """

    on_host = True

    @abstractmethod
    def done(self) -> bool:
        """Return True if ``wait`` would not make the host wait for a peer."""

    @abstractmethod
    def wait(self) -> None:
        """Complete the transfer. The current stream may use its results afterwards."""

    def wait_on_this_stream(self) -> None:
        """Make another stream, the current one, wait as well. Call it after ``wait``."""
        return None

    def wait_for_buffer(self) -> None:
        """Make the current stream wait until the transfer has read what this rank sent. Before ``wait`` or after it."""
        self.wait_on_this_stream()

    def is_released(self) -> bool:
        """Return True if no peer still reads what this rank sent, so that it may be written. Call it after ``wait``."""
        return True

    def await_release(self) -> None:
        """Wait until ``is_released`` returns True. Call it after ``wait``."""
        return None


class Finished(Pending):
    """A transfer that was complete when it was requested."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Staging:
    """The buffers of one reduce-scatter. The caller fills ``send``; the transport alone uses ``receive``."""

    send: Tensor
    receive: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.send.nbytes + (0 if self.receive is None else self.receive.nbytes)


@dataclass(frozen=True, slots=True)
class ReduceScatter:
    """Sum ``staging.send[:numel]`` over ranks and write ``scale`` times this rank's slice of the sum to ``shard``.

    Args:
        staging: its ``send`` holds the bucket's gradients. The transport may overwrite them.
        numel: elements to sum, from the start of ``send``: a multiple of the world size.
        shard: ``numel / world_size`` elements, in float32 or float64, in ``Transport.sum_dtype``, or in bfloat16: then
            the sum is made as for float32, and rounded once. Valid after ``Pending.wait``.
        scale: multiplies the sum.
        accumulate: add to what ``shard`` holds instead of overwriting it.
        stats: of ``shard``; measures its final values.
    """

    staging: Staging
    numel: int
    shard: Tensor
    scale: float
    accumulate: bool
    stats: GradStats | None = None

    @property
    def send(self) -> Tensor:
        """The bucket's gradients: ``numel`` elements."""
        return self.staging.send[: self.numel]

    def sum_(self, sources: Sequence[Tensor]) -> None:
        """Write the scaled sum of ``sources`` to ``shard``: one tensor from each rank, as long as ``shard``."""
        sum_sources_(self.shard, sources, scale=self.scale, accumulate=self.accumulate, stats=self.stats)


class Transport(ABC):
    """Moves flat buffers between the ranks of one optimizer.

    Attributes:
        rank, world_size: in the shard group.
        replica, replicas: index of this shard group, and the number of shard groups; they hold equal state.
        control: group over all ranks for small Python objects; None for one rank.
        store_barrier: over all ranks.
        devices: the types of the devices whose tensors it moves; None for all.
        sends: whether there are other ranks to send anything to.
        trainable_devices: those of ``devices`` that trainable parameters may be on; None for all of them.
    """

    rank: int
    world_size: int
    replica: int = 0
    replicas: int = 1
    control: dist.ProcessGroup | None = None
    store_barrier: StoreBarrier = StoreBarrier(None, 0, [0])
    devices: frozenset[str] | None = None
    sends = True
    trainable_devices: frozenset[str] | None = None

    def allocate_parameters(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a zeroed flat buffer for parameters. Collective: all ranks must call it with the same arguments."""
        return pages.zeros(numel, dtype, device)

    def allocate_staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Staging:
        """Allocate staging for a bucket of up to ``numel`` elements. Local."""
        return Staging(torch.empty(numel, dtype=dtype, device=device), None)

    def sum_dtype(self, wire_dtype: torch.dtype, exact_dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Return the dtype in which sums of gradients of ``wire_dtype`` arrive; no other dtype tells more of them."""
        return exact_dtype

    def scales_sums(self, device: torch.device) -> bool:
        """Return True if it costs nothing to multiply sums on ``device`` by a scale; else their reader should."""
        return True

    def free_staging(self, staging: Staging) -> None:
        """Free a staging buffer. Its transfers must be complete and released. Local."""
        return None

    def allocate_gradients(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Allocate a zeroed flat buffer for gradients that peers can read; None where that is unsupported.

        Collective: all ranks must call it with the same arguments.
        """
        return None

    def sources(self, flat: Tensor) -> list[Tensor]:
        """Return this rank's slice of ``flat`` as a view of every rank's memory, in rank order. Local.

        After a ``fence`` or an ``all_reduce``, the views show what all ranks wrote before it.

        Args:
            flat: a slice of a buffer from ``allocate_gradients``, at the same offset on all ranks.
        """
        raise NotImplementedError

    @abstractmethod
    def reduce_scatter(self, request: ReduceScatter) -> Pending:
        """Start a reduce-scatter. Collective: all ranks must pass the same ``numel``, and a ``send`` of one dtype.

        May raise only before it sends: the caller then starts it again.
        """

    @abstractmethod
    def all_gather(self, flat: Tensor) -> Pending:
        """Start an all-gather, in place: each of the equal slices of ``flat`` comes from its rank. Collective."""

    @abstractmethod
    def all_reduce(self, block: Tensor) -> Pending:
        """Start an all-reduce of a small ``block``, in place: its sum over ranks. Collective."""

    @abstractmethod
    def broadcast(self, tensor: Tensor) -> Pending:
        """Start a broadcast from rank 0 of the group, in place. Collective.

        Args:
            tensor: dense in memory, with the same strides on all ranks, as its bytes are sent in memory order.
        """

    def fence(self) -> None:
        """Wait until all ranks of the shard group have called it. Collective."""
        self.all_reduce(torch.zeros(1, device="cpu")).wait()

    def expect_progress(self, device: torch.device) -> None:
        """If the transfers on ``device`` that are enqueued now hang, log it before the backend's timeout. Local.

        Call it after the last transfer before the host may wait for the device. Nothing to do where the host itself
        waits for transfers, and so raises.
        """
        return None

    def poll(self, seconds: float) -> bool:
        """Poll peers for up to ``seconds``; return False immediately where that is unsupported. Local."""
        return False

    def abort(self) -> None:
        """Tell the other ranks, where that is supported, that this rank has left the current call. Local."""
        return None

    def close(self, *, clean: bool) -> None:
        """Release everything but the buffers, once the optimizer is gone. Local.

        Args:
            clean: every started transfer has been waited for.
        """
        return None


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return the bytes of a dense ``tensor`` in memory order, as backends treat dtypes and strides differently."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def scale_for_mean_(send: Tensor, divisor: float) -> float:
    """Return the ``ReduceScatter.scale`` that divides the sum over ranks by ``divisor``: their number, for the mean.

    Scales float16 in place instead: its sum would overflow long before the mean does.
    """
    if send.dtype != torch.float16:
        return 1 / divisor
    send.mul_(1 / divisor)
    return 1.0


def own_slice(flat: Tensor, rank: int, world_size: int) -> Tensor:
    """Return ``rank``'s slice of ``flat``, which is cut into ``world_size`` equal slices."""
    shard_numel = flat.numel() // world_size
    return flat[rank * shard_numel : (rank + 1) * shard_numel]
