# SPDX-License-Identifier: Apache-2.0
"""Transfers on CUDA streams: one communication stream per device, and one event per transfer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from shardadam.transport.base import Pending


def is_capturing(device: torch.device) -> bool:
    """Return whether work for ``device`` is being captured into a CUDA graph. Always False for other devices."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class CommunicationStreams:
    """One high-priority stream per device, created at first use."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._owners: dict[torch.device, set[torch.cuda.Stream]] = {}  # that memory of buffers may belong to

    def on(self, device: torch.device) -> CommunicationStream:
        """Return a context manager that enqueues the work inside on the stream of ``device``."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self.note_owner(device)
        return CommunicationStream(self._streams[device])

    def note_owner(self, device: torch.device) -> None:
        """Remember that memory of transfers may belong to the current stream. ``on`` does so, too."""
        if device.type == "cuda":
            self._owners.setdefault(device, set()).add(torch.cuda.current_stream(device))

    def release(self) -> None:
        """Make all streams that memory of transfers may belong to wait for the transfers. Local.

        Note: memory that is freed after a transfer
            Memory belongs to the stream that was current when it was allocated, which may reuse it as soon as it is
            freed. It is freed on any thread, so all of these streams wait, not only the current one. A stream that is
            being captured must not wait for work from before the capture, and need not, as a capture begins when the
            device is idle.
        """
        with suppress(RuntimeError):  # a device that has failed runs nothing more
            for device, stream in self._streams.items():
                is_captured = _is_captured(stream)
                for owner in self._owners[device] | {torch.cuda.current_stream(device)}:
                    if _is_captured(owner) == is_captured:
                        owner.wait_stream(stream)


def _is_captured(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


class CommunicationStream(AbstractContextManager["torch.cuda.Stream"]):
    """Context manager: enqueues the work inside on ``stream``, after all work that the current stream holds."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._inside = torch.cuda.stream(stream)

    def __enter__(self) -> torch.cuda.Stream:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._inside.__enter__()  # type: ignore[no-untyped-call]
        return self._stream

    def __exit__(self, *exception: Any) -> None:
        self._inside.__exit__(*exception)


class InStreamOrder:
    """Runs pieces of work on a device in the order in which the host enqueues them, whatever streams are current."""

    def __init__(self) -> None:
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Context manager: the work inside follows that of the last such context, on the current stream."""
        if device.type == "cuda":
            current = torch.cuda.current_stream(device)
            last = self._last.get(device, current)
            if last != current:
                current.wait_stream(last)
            self._last[device] = current
        yield


class OnStream(Pending):
    """All work that ``stream`` holds now. ``wait`` makes the current stream wait for it, and returns at once.

    Args:
        kept: a temporary that ``stream`` uses; keeps its memory from being reused before ``wait``.
    """

    on_host = False

    def __init__(self, stream: torch.cuda.Stream, kept: Tensor | None = None) -> None:
        self._stream = stream
        self._kept = kept
        self._event = stream.record_event()
        self._is_captured = torch.cuda.is_current_stream_capturing()
        self._waiting: set[torch.cuda.Stream] = set()  # the streams that wait for it

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        """
        Raises:
            RuntimeError: a CUDA graph capture waits for a transfer that was started before it, or the other way round.
        """
        current = torch.cuda.current_stream(self._stream.device)
        if current in self._waiting:
            return
        is_captured = torch.cuda.is_current_stream_capturing()
        if is_captured and not self._is_captured:
            raise RuntimeError(
                "Found a transfer that was started before this CUDA graph capture and not waited for, expected none. "
                "Call optimizer.synchronize() and optimizer.zero_grad() before the capture, on all ranks."
            )
        if self._is_captured and not is_captured:
            raise RuntimeError(
                "Found a transfer that was started during a CUDA graph capture and not waited for inside it, expected "
                "none. Capture whole steps: forward, backward and optimizer.step()."
            )
        current.wait_event(self._event)
        self._waiting.add(current)

    def wait_on_this_stream(self) -> None:
        self.wait()
