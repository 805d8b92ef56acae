# SPDX-License-Identifier: Apache-2.0
"""What ran when in a step, from the events of torch's profiler: intervals by thread and stream, and sums over them.

Plain data and arithmetic; also for the benchmarks. Knows nothing of optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Event = dict[str, Any]
"""An event of a Chrome trace, with "name", "cat", "tid", "ts", "dur" (microseconds) and "args"."""

COLOURS = {  # Okabe and Ito's palette, safe for colour-blind readers
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "copy_in": "#F0E442",
    "reduce_scatter": "#D55E00",
    "step_sync": "#CC79A7",
    "update": "#009E73",
    "all_gather": "#E69F00",
    "other": "#9A9A9A",
}
"""The parts of a step, in the order in which they come."""
COMMUNICATION = ("reduce_scatter", "step_sync", "all_gather")
TRANSFERS = "transfers"
"""The row of what a backend of torch.distributed records from its start to its end, in threads of its own."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Start and end in microseconds of the profiler's clock. ``row``: a host thread, or a stream of the device."""

    part: str
    row: str
    start: float
    end: float


def part_of(name: str) -> str | None:
    """Return the part of a step that an event belongs to by its name; None: that of the event around it."""
    kind = name.removeprefix("shardadam.")
    if kind != name:
        return kind if kind in COLOURS else None
    if name in ("timeline.forward", "timeline.backward"):
        return name.removeprefix("timeline.")
    if name.startswith("autograd::engine::evaluate_function"):
        return "backward"
    if name == "aten::_fused_adamw_":
        return "update"
    if name.startswith(("Optimizer.step#", "Optimizer.zero_grad#")):
        return "other"
    backend, _, collective = name.partition(":")
    if backend in ("gloo", "nccl", "c10d"):
        return _of_collective(collective)
    return None


def _of_collective(name: str) -> str:
    name = name.lstrip("_:").lower().replace("_", "")
    if name.startswith(("allgather", "send", "recv")):  # the transport over Gloo gathers point to point
        return "all_gather"
    return "reduce_scatter" if name.startswith(("reducescatter", "alltoall")) else "step_sync"


def of_host(events: Iterable[Event], *, gap: float = 0.0) -> list[Interval]:
    """Return what each host thread did, without overlaps within a row: each moment belongs to the innermost part.

    Operations outside of any part are forward.

    Args:
        gap: intervals of one part that are at most so many microseconds apart are one.
    """
    found: list[Interval] = []
    threads: dict[str, list[Event]] = {}
    for event in events:
        if event.get("cat") not in ("cpu_op", "user_annotation"):
            continue
        if event["name"].startswith(("gloo:", "nccl:")):
            found.append(Interval(part_of(event["name"]) or "other", TRANSFERS, *ends(event)))
        elif event["cat"] == "cpu_op" or part_of(event["name"]) is not None:
            threads.setdefault(f"thread {event['tid']}", []).append(event)
    for row, of_thread in threads.items():
        found += merged(_innermost(row, of_thread), gap)
    return found


def _innermost(row: str, events: list[Event]) -> list[Interval]:
    """Return the intervals of one thread, whose events are nested or apart."""
    found: list[Interval] = []
    around: list[tuple[str, float]] = []  # part and end of the events that have begun
    now = 0.0

    def advance(to: float) -> None:
        nonlocal now
        while around and now < to:
            part, end = around[-1]
            stop = min(end, to)
            if stop > now:
                found.append(Interval(part, row, now, stop))
                now = stop
            if end <= to:
                around.pop()
        now = max(now, to)

    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        start, end = ends(event)
        advance(start)
        while around and around[-1][1] <= start:
            around.pop()
        around.append((part_of(event["name"]) or (around[-1][0] if around else "forward"), end))
    advance(max((end for _, end in around), default=now))
    return found


def of_device(events: Sequence[Event], host: Sequence[Interval]) -> list[Interval]:
    """Return what ran on the device, by stream; its part is what the host was doing when it launched it.

    Args:
        host: ranges of the host, which may be nested.
    """
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    backward = [event for event in events if event["name"].startswith("autograd::engine::evaluate_function")]
    found = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launch = launches.get(event["args"].get("correlation"))
        part = "forward"
        if launch is not None:
            inside = [one for one in host if one.row == f"thread {launch['tid']}" and is_in(launch, one.start, one.end)]
            if inside:
                part = min(inside, key=lambda one: one.end - one.start).part
            elif any(one["tid"] == launch["tid"] and is_in(launch, *ends(one)) for one in backward):
                part = "backward"
        if "nccl" in event["name"].lower() and part not in COMMUNICATION:
            part = _of_collective(event["name"].lower().rpartition("nccldevkernel")[2])
        found.append(Interval(part, f"stream {event['args']['stream']}", *ends(event)))
    return found


def ranges_of(events: Iterable[Event]) -> list[Interval]:
    """Return the ranges that the library records itself, by host thread; they may be nested."""
    return [
        Interval(event["name"].removeprefix("shardadam."), f"thread {event['tid']}", *ends(event))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith("shardadam.")
    ]


def ends(event: Event) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def is_in(event: Event, start: float, end: float) -> bool:
    return bool(start <= event["ts"] <= end)


def clipped(intervals: Iterable[Interval], start: float, end: float) -> list[Interval]:
    """Return the parts of intervals between ``start`` and ``end``."""
    inside = [replace(one, start=max(one.start, start), end=min(one.end, end)) for one in intervals]
    return [one for one in inside if one.start < one.end]


def merged(intervals: Iterable[Interval], gap: float) -> list[Interval]:
    """Join successive intervals of one row and part that are at most ``gap`` apart, with nothing in between."""
    found: list[Interval] = []
    for one in intervals:
        last = found[-1] if found else None
        if last is not None and (last.row, last.part) == (one.row, one.part) and one.start - last.end <= gap:
            found[-1] = replace(last, end=max(last.end, one.end))
        else:
            found.append(one)
    return found


def covered(intervals: Iterable[Interval]) -> list[tuple[float, float]]:
    """Return the union of intervals, ascending."""
    found: list[tuple[float, float]] = []
    for start, end in sorted((one.start, one.end) for one in intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def duration(intervals: Iterable[Interval]) -> float:
    """Return the length of the union of intervals."""
    return sum(end - start for start, end in covered(intervals))


def exposed(intervals: Sequence[Interval]) -> float:
    """Return the time in which a rank communicates, or waits for other ranks, while nothing of it computes."""
    compute = [one for one in intervals if one.part not in COMMUNICATION]
    return duration(intervals) - duration(compute)
