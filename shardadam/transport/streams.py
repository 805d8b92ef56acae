# SPDX-License-Identifier: Apache-2.0
"""Transfers on CUDA streams: one communication stream per device, and one event per transfer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from shardadam.transport.base import Pending


class CommunicationStreams:
    """One high-priority stream per device, created at first use."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of ``device``."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        return self._streams[device]

    def on(self, device: torch.device) -> CommunicationStream:
        """Return a context manager that enqueues the work inside on the stream of ``device``."""
        return CommunicationStream(self.of(device))


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

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        torch.cuda.current_stream(self._stream.device).wait_event(self._event)

    def wait_on_this_stream(self) -> None:
        self.wait()
