# SPDX-License-Identifier: Apache-2.0
"""The two buffers of each device through which offloaded state passes in turn, whatever fills and empties them."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

from shardadam.offload.regions import buffer_bytes, regions_of
from shardadam.offload.store import Reserved, StateStore, StoredShard, state_of


@dataclass(slots=True, eq=False, kw_only=True)
class Slot:
    """A buffer.

    Args:
        on_device: 1-D uint8, on the device of the parameters.
        holds: the bucket whose state is in it, or will be once it is filled.
    """

    on_device: Tensor
    holds: StoredShard | None = None


_S = TypeVar("_S", bound=Slot)


class BufferedStore(StateStore, Generic[_S]):
    """A store with two buffers of each device, as large as the state of the largest bucket there."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._slots: dict[torch.device, list[_S]] = {}  # two of each device; the first is used next
        self._next: dict[StoredShard, StoredShard] = {}  # what is expected after each bucket
        self._is_settled = True

    def add(self, reserved: Reserved, elements: slice, device: torch.device) -> StoredShard:
        self.settle()
        regions = regions_of(reserved.format, reserved.numel, elements)
        nbytes = buffer_bytes(regions)
        slots = self._slots.get(device)
        if slots is None or slots[0].on_device.numel() < nbytes:
            self._slots[device] = [self._new_slot(nbytes, device) for _ in range(2)]
            self.buffer_bytes = sum(slot.on_device.nbytes for slot in self._all_slots())
        return StoredShard(reserved, regions, state_of(reserved, regions), device)

    @abstractmethod
    def _new_slot(self, nbytes: int, device: torch.device) -> _S:
        """Return a buffer of ``nbytes``, uninitialised."""

    @abstractmethod
    def _fill(self, stored: StoredShard, slot: _S) -> None:
        """Start to bring the state of a bucket into a buffer."""

    def _all_slots(self) -> list[_S]:
        return [slot for slots in self._slots.values() for slot in slots]

    def _expect(self, order: Sequence[StoredShard]) -> None:
        """Start with the first bucket of each device, and remember what follows each."""
        for device, slots in self._slots.items():
            on_device = [stored for stored in order if stored.device == device]
            self._next.update(pairwise(on_device))
            if on_device:
                self._fill(on_device[0], slots[0])

    def _take(self, stored: StoredShard) -> _S:
        """Return the buffer that holds the state of a bucket, or will. The other one is used next."""
        slots = self._slots[stored.device]
        slot = next((slot for slot in slots if slot.holds is stored), slots[0])
        if slot.holds is not stored:
            self._fill(stored, slot)
        slot.holds = None  # also if the update raises: then nothing is written
        slots.remove(slot)
        slots.append(slot)
        return slot

    def _fill_next(self, stored: StoredShard) -> None:
        """Start to bring what is expected after ``stored`` into the other buffer."""
        following, other = self._next.get(stored), self._slots[stored.device][0]
        if following is not None and other.holds is not following:
            self._fill(following, other)
