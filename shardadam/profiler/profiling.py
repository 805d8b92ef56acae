# SPDX-License-Identifier: Apache-2.0
"""``shardadam.profile``: torch's profiler around some steps of a user's loop, and the page that shows one of them."""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from shardadam.optimizer import ShardedAdam
from shardadam.profiler import trace
from shardadam.profiler.timeline import page
from shardadam.profiler.trace import COLOURS, Event, Interval
from shardadam.ranks import desync
from shardadam.ranks.agreement import exchange

_STEP = "profile.step "
_ALONE = "which ends this one or is ended by it. Run no other at the same time."
_NOTES = (
    "Exposed communication is the time in which a rank communicates or waits for other ranks while nothing of it "
    "computes. On a GPU it is measured on its streams, on a CPU on threads, where a thread inside of reduce-scatter, "
    "step-sync or all-gather communicates. Operations outside of backward and of step() are forward. The profiler "
    "itself slows steps of many small operations."
)


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One profiled step of one rank.

    Args:
        ms: from the end of the step before to its end.
        exposed_ms: in which this rank communicated, or waited for others, while nothing of it computed.
        parts: ms of each part, by the names in ``trace.COLOURS``; on a GPU of its streams, else of threads. Parts that
            run at the same time all count.
        peak_bytes: the most memory that torch had allocated on the GPU in the step; on a CPU the most that the process
            had resident in it, with code and shared memory; since the process began, where that cannot be reset. None
            where the system does not tell. Other code that reads these peaks finds them reset.
    """

    ms: float
    exposed_ms: float
    parts: dict[str, float]
    peak_bytes: int | None


class profile:
    """Context manager that profiles some steps of a loop, and writes the timeline of one of them as an HTML page.

        with shardadam.profile("step.html", optimizer) as profile:
            for batch in loader:
                ...  # forward, backward, step, zero_grad
                profile.step()
        print(profile)

    The page shows the profiled step of median length, with a row for each thread and stream of each rank. It needs no
    network. Costs nothing before and after the profiled steps.

    Args:
        path: of the page. Rank 0 of all ranks that train the model writes it.
        optimizer: whose ranks take part, model-parallel ones included.
        skip: steps before profiling begins, which allocate buffers; the same on all ranks.
        steps: to profile, at least 1; the same on all ranks.

    Raises:
        FileNotFoundError: on rank 0: there is no folder for the page.

    Attributes:
        steps: what was found, of each profiled step of this rank; empty before the last of them.
    """

    def __init__(self, path: str | Path, optimizer: ShardedAdam, *, skip: int = 2, steps: int = 3) -> None:
        if steps < 1 or skip < 0:
            raise ValueError(f"profile: found skip={skip} and steps={steps}, expected at least 0 and 1")
        self.path = Path(path)
        self.steps: list[StepProfile] = []
        self._job = optimizer._engine.job
        if self._job.rank == 0 and not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"profile: found no directory {self.path.parent}, expected it, for {self.path.name}. Create it first."
            )
        self._device = optimizer._engine.skipped_steps.device
        self._skip, self._count = skip, steps
        self._done = 0
        self._profiler: torch.profiler.profile | None = None
        self._range: Any = None
        self._peaks: list[int | None] = []

    def __enter__(self) -> profile:
        self._begin_step()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop profiling. If the loop has ended before the last step was profiled, rank 0 warns; nothing is written."""
        self._stop()
        if kind is None and self._done < self._skip + self._count and self._job.rank == 0:
            warnings.warn(
                f"profile: {self._done} steps have ended, expected {self._skip + self._count} (skip + steps), so "
                f"{self.path} is not written. Call profile.step() after each step, or lower skip and steps.",
                stacklevel=2,
            )

    def step(self) -> None:
        """Say that a step has ended: call it last in the loop. At the last profiled step, collective.

        Raises:
            RuntimeError: another profiler of torch is running; or, on every rank, was running on any rank.
        """
        if self._profiler is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._end_range()
            self._peaks.append(_peak_bytes(self._device))
        self._done += 1
        if self._done == self._skip + self._count:
            profiler, is_running = self._profiler, _is_profiling()
            self._stop()
            assert profiler is not None
            with desync.in_call("profile.step", self):
                # Torch crashes when it exports the trace of a profiler that another one has ended.
                self._finish(_events(profiler) if is_running else [])
        else:
            self._begin_step()

    def _begin_step(self) -> None:
        index = self._done - self._skip
        if not 0 <= index < self._count:
            return
        if self._profiler is None:
            if _is_profiling():
                raise RuntimeError(f"profile: found another profiler of torch running, {_ALONE}")
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                activities.append(ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        _reset_peak(self._device)
        self._range = record_function(f"{_STEP}{index}")
        self._range.__enter__()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _stop(self) -> None:
        self._end_range()
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()

    def _finish(self, events: Sequence[Event]) -> None:
        """Compare the ranks and write the page. Collective."""
        spans = steps_of(events)
        found = [intervals_of(events, start, end) for start, end in spans]
        steps = [
            _summary(end - start, counted, peak)
            for (start, end), (_, counted), peak in zip(spans, found, self._peaks, strict=False)
        ]
        mine = (socket.gethostname(), [start for start, _ in spans], found, steps)
        control = self._job.control
        ranks = [mine] if control is None else exchange(mine, control)
        for rank, (_, starts, _, _) in enumerate(ranks):
            if len(starts) != self._count:
                raise RuntimeError(
                    f"profile: found {len(starts)} of {self._count} profiled steps in the trace of rank {rank}. "
                    f"Another profiler of torch was running, {_ALONE}"
                )
        self.steps = steps
        if self._job.rank == 0:
            self._write(ranks)

    def _write(self, ranks: Sequence[Any]) -> None:
        lengths = [step.ms for step in ranks[0][3]]
        shown = lengths.index(statistics.median_low(lengths))
        host, starts = ranks[0][0], [one[1][shown] for one in ranks]
        first = min(start for start, one in zip(starts, ranks, strict=True) if one[0] == host)
        drawn = []
        for start, (of_host, _, found, _) in zip(starts, ranks, strict=True):
            late = start - first if of_host == host else 0.0  # clocks of other hosts differ
            intervals, _ = found[shown]
            drawn.append([replace(one, start=one.start + late, end=one.end + late) for one in intervals])
        table = [["step", "rank", "ms", "exposed communication, ms", "peak memory, MB", *map(_label, COLOURS)]]
        for index in range(self._count):
            table += [
                [str(index + self._skip + 1), str(rank), *_cells(one[3][index])] for rank, one in enumerate(ranks)
            ]
        title = f"Step {shown + self._skip + 1} on {len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'}"
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        try:
            temporary.write_text(page(title, drawn, table, _NOTES), encoding="utf-8")
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def __str__(self) -> str:
        """Return a line for each profiled step of this rank; the page has all ranks."""
        lines = []
        where = f" on rank {self._job.rank} of {self._job.world_size}" if self._job.world_size > 1 else ""
        for index, one in enumerate(self.steps):
            peak = "unknown" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:,.1f} MB"
            lines.append(
                f"step {index + self._skip + 1}{where}: {one.ms:.2f} ms, {one.exposed_ms:.2f} ms of exposed "
                f"communication, peak memory {peak}"
            )
        return "\n".join(lines) or f"no step profiled: {self._done} of {self._skip + self._count} have ended"


def steps_of(events: Sequence[Event]) -> list[tuple[float, float]]:
    """Return start and end of each profiled step."""
    found = [
        (event["name"], *trace.ends(event))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(_STEP)
    ]
    return [(start, end) for _, start, end in sorted(found, key=lambda one: int(one[0].removeprefix(_STEP)))]


def intervals_of(events: Sequence[Event], start: float, end: float) -> tuple[list[Interval], list[Interval]]:
    """Return what ran in a step, in microseconds since it began: all of it, and what its sums are made of.

    These are the streams of a GPU if there are any, else the threads and transfers of a CPU.
    """
    # What is drawn narrower than a pixel is joined; the time of Python between two operations belongs to both.
    host = trace.of_host(events, gap=max(100.0, (end - start) / 500))
    device = trace.of_device(events, trace.ranges_of(events))
    main = _main_thread(events)
    moved = [
        replace(one, row="main thread" if one.row == main else one.row, start=one.start - start, end=one.end - start)
        for one in trace.clipped([*host, *device], start, end)
    ]
    streams = [one for one in moved if one.row.startswith("stream ")]
    return moved, streams or moved


def _main_thread(events: Sequence[Event]) -> str:
    return next(
        f"thread {event['tid']}"
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(_STEP)
    )


def _summary(length: float, counted: list[Interval], peak: int | None) -> StepProfile:
    parts = {part: trace.duration([one for one in counted if one.part == part]) / 1e3 for part in COLOURS}
    return StepProfile(length / 1e3, trace.exposed(counted) / 1e3, parts, peak)


def _label(part: str) -> str:
    return "rest of step()" if part == "other" else part.replace("_", "-")


def _cells(step: StepProfile) -> list[str]:
    peak = "" if step.peak_bytes is None else f"{step.peak_bytes / 1e6:,.1f}"
    return [f"{step.ms:.2f}", f"{step.exposed_ms:.2f}", peak, *(f"{step.parts[part]:.2f}" for part in COLOURS)]


def _events(profiler: torch.profiler.profile) -> list[Event]:
    """Return the complete events of a trace, by a clock that all processes of a host share."""
    handle, name = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    try:
        profiler.export_chrome_trace(name)
        content = json.loads(Path(name).read_text())
    finally:
        Path(name).unlink()
    base = content.get("baseTimeNanoseconds", 0) / 1e3
    events: list[Event] = [event for event in content["traceEvents"] if event.get("ph") == "X"]
    return [{**event, "ts": event["ts"] + base} for event in events]


def _is_profiling() -> bool:
    return torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)
