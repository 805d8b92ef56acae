# SPDX-License-Identifier: Apache-2.0
"""What the engine knows of offloaded state: a store reserves it, and brings that of one bucket to the update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardadam.offload.policies import DiskOffload, Offload
from shardadam.offload.regions import Region, tensor_starts
from shardadam.precision import Format


@dataclass(frozen=True, slots=True, eq=False)
class Reserved:
    """The state of an arena in a store.

    Args:
        store: that has it.
        state: all of it, by the names in ``update/formats.py``, on the CPU. Use it between steps only, after
            ``StateStore.settle``.
        nbytes: of the state.
        home: what the store needs to find it.
    """

    store: StateStore
    format: Format
    numel: int
    state: dict[str, Tensor]
    home: Any = None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values())


@dataclass(slots=True, eq=False)
class StoredShard:
    """The state of one bucket in a store.

    Args:
        state: views of ``reserved.state``.
        device: of the parameters.
        pending: what a store on streams waits for before it copies the state again.
    """

    reserved: Reserved
    regions: Sequence[Region]
    state: dict[str, Tensor]
    device: torch.device
    pending: Any = field(default=None)


class StateStore(ABC):
    """Keeps the state of an optimizer between steps, and brings it to the update bucket by bucket.

    Threads may call it, one at a time; others wait.

    Attributes:
        error: which read or write has failed, so that state has been lost, and no bucket is updated any more; or None.
        kind: "disk" or "host".
        buffer_bytes: the size of all buffers on the device through which state passes.
    """

    kind: ClassVar[str]
    error: str | None = None
    buffer_bytes: int = 0

    @abstractmethod
    def reserve(self, format: Format, numel: int, device: torch.device) -> Reserved:
        """Return room for the state of an arena of ``numel`` elements of this rank, all zero.

        Raises:
            OSError, ValueError: there is none.
        """

    @abstractmethod
    def add(self, reserved: Reserved, elements: slice, device: torch.device) -> StoredShard:
        """Return the state of a bucket, whose shard is ``elements`` of its arena on ``device``; grow the buffers."""

    @abstractmethod
    def expect(self, order: Sequence[StoredShard]) -> None:
        """Say in which order ``on_device`` will probably be called, so that state is read ahead."""

    @abstractmethod
    def on_device(self, stored: StoredShard) -> AbstractContextManager[dict[str, Tensor] | None]:
        """Context manager: give the state of a bucket, on the device of its parameters; changes are stored at the end.

        Gives None if the state cannot be read or ``error`` is set; then the bucket must not be updated.
        """

    @abstractmethod
    def end_step(self) -> None:
        """Complete a step. The host waits for the disk, if at all, but not for a GPU."""

    @abstractmethod
    def settle(self) -> None:
        """Make ``Reserved.state`` valid: wait until all changes are stored. Forget what was read ahead. Local."""

    @abstractmethod
    def recover(self) -> None:
        """Forget ``error``: the whole state has been written anew."""

    @abstractmethod
    def read(self, reserved: Reserved, name: str, elements: slice) -> Tensor:
        """Return ``elements`` of a tensor of ``reserved.state``, to be read only, without more memory than they take.

        Raises:
            OSError: they cannot be read.
        """

    @abstractmethod
    def has_written(self, reserved: Reserved, nbytes: int) -> None:
        """Take in that ``nbytes`` of ``reserved.state`` have been written; free the memory of many such.

        Raises:
            OSError: what has been written cannot be stored.
        """

    @abstractmethod
    def close(self) -> None:
        """Free threads and buffers. Nothing may be called any more."""


def state_of(reserved: Reserved, regions: Sequence[Region]) -> dict[str, Tensor]:
    """Return the views of ``reserved.state`` that are a bucket's."""
    starts, _ = tensor_starts(reserved.format, reserved.numel)
    state = {}
    for region in regions:
        start, stop = (at - starts[region.name] for at in (region.start, region.stop))
        state[region.name] = reserved.state[region.name][start // region.dtype.itemsize : stop // region.dtype.itemsize]
    return state


def open_store(offload: Offload | None) -> StateStore | None:
    """Return a new store, which holds nothing yet; None for state in memory of the device."""
    if offload is None:
        return None
    if isinstance(offload, DiskOffload):
        from shardadam.offload.disk import DiskStore

        return DiskStore(offload)
    from shardadam.offload.host import HostStore

    return HostStore()
