# SPDX-License-Identifier: Apache-2.0
"""Profiles one step on one GPU: what runs on which stream, and does the host ever wait?

    python benchmarks/gpu_trace.py --to DIR [--layers 12 --width 1600 --batch 4 --context 512]

Uses NCCL with one rank: transfers run on their own stream, as with many ranks, but move nothing (a reduce-scatter only
copies into the shard). Writes `trace.json` for chrome://tracing or Perfetto, `trace.png`, and one JSON object as the
last line of the output: for each part of a step the streams that its kernels ran on, and all host calls that wait for
the device. `--rehearse`: a small model, also without a GPU, where there are no streams.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from gpu_train import Job, forward_backward  # also puts tests on the path
from torch.profiler import ProfilerActivity, profile, record_function

from shardadam import Precision, ShardedAdamW
from shardadam.profiler.trace import COLOURS, Interval, ends, is_in, of_device, ranges_of
from tests.on_cuda import nccl_of_one

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize")


def record(job: Job, path: Path) -> list[dict[str, Any]]:
    """Return the profiler's events of the fourth step."""
    model, tokens = job.model(), job.tokens()
    options: dict[str, Any] = {"transport": nccl_of_one()} if job.device.type == "cuda" else {}
    optimizer = ShardedAdamW(
        model.named_parameters(), max_grad_norm=1.0, precision=Precision(moments="int8"), **options
    )

    def step() -> None:
        with record_function("part.forward_backward"):
            forward_backward(model, tokens)
        with record_function("part.step"):
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU]
    if job.device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        with record_function("part.all"):
            step()
        if job.device.type == "cuda":
            torch.cuda.synchronize()
    profiled.export_chrome_trace(str(path))
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def waits(events: list[dict[str, Any]]) -> list[str]:
    """Return the host calls during the step that wait for the device."""
    start, end = ends(next(event for event in events if event["name"] == "part.all"))
    return [event["name"] for event in events if event["name"] in WAITS and is_in(event, start, end)]


def draw(intervals: list[Interval], title: str, path: Path) -> None:
    rows = sorted({one.row for one in intervals}, reverse=True)
    begin = min(one.start for one in intervals)
    figure, axes = plt.subplots(figsize=(13, 0.7 * len(rows) + 1.8))
    for row, name in enumerate(rows):
        for part, colour in COLOURS.items():
            spans = [
                ((one.start - begin) / 1e3, max((one.end - one.start) / 1e3, 0.005))
                for one in intervals
                if (one.row, one.part) == (name, part)
            ]
            axes.broken_barh(spans, (row - 0.38, 0.76), facecolors=colour)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("ms")
    axes.set_title(title, loc="left")
    shown = [part for part in COLOURS if any(one.part == part for one in intervals)]
    handles = [Patch(color=COLOURS[part], label=part.replace("_", "-")) for part in shown]
    axes.legend(handles=handles, ncol=len(handles), loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    figure.savefig(path, bbox_inches="tight", dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rehearse", action="store_true")
    for name, value in dict(layers=12, width=1600, batch=4, context=512).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    shape = (2, 64, 1, 16) if args.rehearse else (args.layers, args.width, args.batch, args.context)
    job = Job(torch.device(args.device), *shape)
    args.to.mkdir(parents=True, exist_ok=True)
    events = record(job, args.to / "trace.json")
    host = ranges_of(events)
    device = of_device(events, host)
    streams: dict[str, set[str]] = defaultdict(set)
    for one in device or host:
        streams[one.part].add(one.row)
    draw(host + device, f"One step of {job.layers} layers of {job.width}, int8 moments", args.to / "trace.png")
    found = {"streams": {part: sorted(some) for part, some in streams.items()}, "waits": waits(events)}
    print(f"The host waited {len(found['waits'])} times. Streams: {found['streams']}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
