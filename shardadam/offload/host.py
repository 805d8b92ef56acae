# SPDX-License-Identifier: Apache-2.0
"""State in pinned host memory, copied to the GPU and back in stream order. The host never waits in a step.

Note: order of copies
    Each of the two buffers has a stream of its own, on which its copies in and out follow each other. The update waits
    for the copy in, the copy out for the update. State is copied in again only after ``StoredShard.pending``, the copy
    out of the last step, which may have been on the other stream.

Note: captured steps
    A capture begins when the device is idle. Its copies begin after, and end before, the stream that is captured. A
    graph may be replayed between two other steps: from then on, a step's copies wait for the current stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from shardadam.offload.buffers import BufferedStore, Slot
from shardadam.offload.regions import views_of
from shardadam.offload.store import Reserved, StoredShard
from shardadam.precision import Format
from shardadam.transport.streams import is_capturing
from shardadam.update import formats


@dataclass(slots=True, eq=False, kw_only=True)
class _Slot(Slot):
    """A buffer and the stream of its copies."""

    stream: torch.cuda.Stream


class HostStore(BufferedStore[_Slot]):
    """State of parameters on GPUs in pinned host memory (``HostOffload``)."""

    kind = "host"

    def __init__(self) -> None:
        super().__init__()
        self._is_captured = False  # a graph may be replayed at any time

    def reserve(self, format: Format, numel: int, device: torch.device) -> Reserved:
        if device.type != "cuda":
            raise ValueError(
                f"offload: found HostOffload() and a parameter on {device}, expected parameters on CUDA devices: the "
                "state of others is in host memory already. Use offload=None, or DiskOffload(directory)."
            )
        state = {
            name: torch.zeros(length, dtype=dtype, device="cpu", pin_memory=True)
            for name, (length, dtype) in formats.tensors(format, numel).items()
        }
        return Reserved(self, format, numel, state)

    def expect(self, order: Sequence[StoredShard]) -> None:
        with self._lock:
            self._forget_copies()
            for device, slots in self._slots.items():
                self._is_captured = self._is_captured or is_capturing(device)
                if self._is_captured:
                    for slot in slots:
                        slot.stream.wait_stream(torch.cuda.current_stream(device))
            self._expect(order)

    @contextmanager
    def on_device(self, stored: StoredShard) -> Iterator[dict[str, Tensor] | None]:
        with self._lock:
            slot = self._take(stored)
            current = torch.cuda.current_stream(stored.device)
            current.wait_stream(slot.stream)
            self._fill_next(stored)
            views = views_of(stored.regions, slot.on_device)
            try:
                yield views
            finally:
                slot.stream.wait_stream(current)
            with torch.cuda.stream(slot.stream):
                for name, tensor in stored.state.items():
                    tensor.copy_(views[name], non_blocking=True)
                stored.pending = None if is_capturing(stored.device) else slot.stream.record_event()

    def end_step(self) -> None:
        with self._lock:
            self._forget_copies()
            for device, slots in self._slots.items():
                if is_capturing(device):
                    for slot in slots:
                        torch.cuda.current_stream(device).wait_stream(slot.stream)

    def settle(self) -> None:
        if self._is_settled and not self._is_captured:
            return
        with self._lock:
            self._forget_copies()
            for device, slots in self._slots.items():
                for slot in slots:
                    slot.stream.synchronize()
                if self._is_captured:
                    torch.cuda.synchronize(device)
            self._is_settled = True

    def recover(self) -> None:
        self.error = None

    def read(self, reserved: Reserved, name: str, elements: slice) -> Tensor:
        self.settle()
        return reserved.state[name][elements]

    def has_written(self, reserved: Reserved, nbytes: int) -> None:
        pass

    def close(self) -> None:
        for device, slots in self._slots.items():
            for slot in slots:  # the memory goes back to the stream that is current
                torch.cuda.current_stream(device).wait_stream(slot.stream)
        self._next = {}
        self._slots = {}

    def _new_slot(self, nbytes: int, device: torch.device) -> _Slot:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        stream.wait_stream(torch.cuda.current_stream(device))  # which may still use what the memory was before
        return _Slot(on_device=memory, stream=stream)

    def _fill(self, stored: StoredShard, slot: _Slot) -> None:
        self._is_settled = False
        slot.holds = stored
        if stored.pending is not None and not is_capturing(stored.device):
            slot.stream.wait_event(stored.pending)
        views = views_of(stored.regions, slot.on_device)
        with torch.cuda.stream(slot.stream):
            for name, tensor in stored.state.items():
                views[name].copy_(tensor, non_blocking=True)

    def _forget_copies(self) -> None:
        for slot in self._all_slots():
            slot.holds = None
        self._next = {}
