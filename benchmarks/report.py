# SPDX-License-Identifier: Apache-2.0
"""Draws the results of `step.py`, memory by number of ranks, and a timeline of one step.

    python benchmarks/report.py step a.json b.json ...                  step-time.png, step-memory.png
    python benchmarks/report.py memory                                  memory-vs-n.png, from one process
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/report.py timeline --out trace.json
    python benchmarks/report.py draw-timeline trace.json                timeline.png

Pictures go to `--to`, by default benchmarks/results. Colours: Okabe and Ito's palette, safe for colour-blind readers.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
from contenders import ENTRIES, Settings, make_data, make_model
from fake_world import rank_0_of
from torch.profiler import ProfilerActivity, profile, record_function

from shardadam import Precision, ShardedAdamW
from shardadam.profiler.trace import COLOURS, part_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

OURS, PEERS, EXTRA = "#D55E00", "#9A9A9A", "#0072B2"
PURPLE, GREEN, YELLOW, SKY = "#CC79A7", "#009E73", "#E69F00", "#56B4E9"
NOT_COMPARED = "#DDDDDD"  # bf16 peers that keep no master
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130})
RESULTS = Path(__file__).resolve().parent / "results"


# Bars


def bars(axes: Any, result: dict[str, Any], value: Any, names: list[str]) -> None:
    """Horizontal bars, the smallest on top. `value(contender)` gives the bar's length and its whisker's ends."""
    rows = sorted(names, key=lambda name: -value(result["contenders"][name])[0])
    for row, name in enumerate(rows):
        entry = ENTRIES[name]
        middle, low, high = value(result["contenders"][name])
        is_peer = result["dtype"] == "fp32" or entry.has_master
        colour = OURS if entry.is_ours else PEERS if is_peer else NOT_COMPARED
        axes.barh(row, middle, color=colour, xerr=[[middle - low], [high - middle]], error_kw={"capsize": 3, "lw": 1})
        form = f"{middle:.2f}" if middle < 20 else f"{middle:.0f}"
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # keeps the line at 1 off the number
        axes.annotate(form, (high, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9, bbox=white)
    axes.set_yticks(range(len(rows)), [ENTRIES[name].label for name in rows])
    for label, name in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if ENTRIES[name].is_ours else "normal")
    axes.set_title(f"{result['world_size']} ranks, {result['dtype']}", loc="left")
    axes.margins(x=0.1)


def draw_step(paths: list[Path], to: Path) -> None:
    results = sorted(
        (json.loads(path.read_text()) for path in paths), key=lambda r: (r["dtype"] != "fp32", r["world_size"])
    )
    time_of = lambda one: (statistics.median(one["to_fastest"]), min(one["to_fastest"]), max(one["to_fastest"]))  # noqa: E731
    peak_of = lambda one: tuple(f(one["memory"]["peak"]) / 1e6 for f in (statistics.mean, min, max))  # noqa: E731
    kinds = [
        ("step-time.png", time_of, "time of a whole step / fastest peer's in the same round", "rounds"),
        ("step-memory.png", peak_of, "peak memory over the plain model, MB a rank", "memory"),
    ]
    legend = [Patch(color=OURS, label="shardadam"), Patch(color=PEERS, label="peer")]
    if any(result["dtype"] == "bf16" for result in results):
        legend.append(Patch(color=NOT_COMPARED, label="peer without float32 masters"))
    for file, value, axis, needed in kinds:
        shown = [
            (result, names)
            for result in results
            if (names := [name for name, one in result["contenders"].items() if name in ENTRIES and needed in one])
        ]
        if not shown:
            continue
        columns = min(2, len(shown))
        rows = -(-len(shown) // columns)
        height = 0.36 * max(len(names) for _, names in shown) + 1.2
        figure, grid = plt.subplots(rows, columns, figsize=(7.2 * columns, height * rows), squeeze=False)
        for axes, (result, names) in zip(grid.flat, shown, strict=False):
            bars(axes, result, value, names)
            axes.set_xlabel(axis)
            if file == "step-time.png":
                axes.axvline(1, color="black", lw=1, ls="--")
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        first = results[0]
        figure.legend(handles=legend, ncol=3, loc="upper center", bbox_to_anchor=(0.5, 0), frameon=False)
        figure.suptitle(
            f"{first['numel'] / 1e6:.1f}M parameters; {first['hardware']}; torch {first['versions']['torch']}"
        )
        save(figure, to / file)


# Memory by number of ranks


def memory_of(world_size: int, model: torch.nn.Module, **options: Any) -> Any:
    """`memory()` of rank 0 of `world_size`."""

    with rank_0_of(world_size):
        optimizer = ShardedAdamW(model.named_parameters(), transport="collective", **options)
        found = optimizer.memory()
        del optimizer
        gc.collect()
        return found


def draw_memory(to: Path) -> None:
    ranks = [1, 2, 4, 8, 16, 32, 64]
    figure, grid = plt.subplots(1, 2, figsize=(13, 4.8), sharey=True)
    cases = [
        (grid[0], torch.float32, Precision(), "fp32 parameters", 8),
        (grid[1], torch.bfloat16, Precision(master="split"), "bf16 parameters, split masters", 12),
    ]
    parts = [
        ("parameters", "parameters", PEERS),
        ("gradient shard, staging", "gradient_shard staging", SKY),
        ("moments", "moments", OURS),
        ("master", "master", YELLOW),
        ("tables, scalars", "tables scalars", "black"),
    ]
    for axes, dtype, precision, title, adamw_state in cases:
        numel = sum(p.numel() for p in make_model(dtype).parameters())
        found = [memory_of(n, make_model(dtype), precision=precision) for n in ranks]
        bottom = [0.0] * len(ranks)
        for label, fields, colour in parts:
            heights = [sum(getattr(memory, field) for field in fields.split()) / numel for memory in found]
            if max(heights) > 0:
                axes.bar(range(len(ranks)), heights, bottom=bottom, color=colour, label=label, width=0.7)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        for x, total in enumerate(bottom):
            axes.annotate(
                f"{total:.1f}", (x, total), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9
            )
        size = torch.empty(0, dtype=dtype).element_size()
        adamw = size + size + adamw_state
        masters = "" if dtype == torch.float32 else " on fp32 copies"
        axes.axhline(adamw, color=EXTRA, ls="--", label=f"AdamW{masters}: parameters, gradients, state")
        axes.annotate(f"{adamw:g}", (len(ranks) - 0.5, adamw), xytext=(0, 4), textcoords="offset points", color=EXTRA)
        axes.set_xticks(range(len(ranks)), ranks)
        axes.set_xlabel("ranks N")
        axes.set_ylim(0, 19)
        axes.set_yticks(range(0, 17, 4))
        axes.set_title(title, loc="left")
        axes.legend(fontsize=9, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.82))
    grid[0].set_ylabel("bytes a parameter, on each rank")
    figure.suptitle("What the optimizer holds after it is built, from optimizer.memory()")
    save(figure, to / "memory-vs-n.png")


# Timeline of one step


def profile_step(name: str, settings: Settings) -> list[dict[str, Any]]:
    """The events of one warm step on this rank, in ms of a clock that all ranks of a host share. Collective."""
    contender = ENTRIES[name].build(make_model(settings.dtype), settings)
    tokens = make_data(dist.get_rank())[0]

    def step() -> None:
        with record_function("timeline.forward"):
            loss = contender.forward(tokens)
        with record_function("timeline.backward"):
            contender.backward(loss)
        with record_function("timeline.update"):
            contender.update()

    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        dist.barrier()
        step()
    wanted = ("timeline.", "shardadam.", "gloo:", "aten::_fused_adamw_")
    return [
        {"name": event.name(), "start_ms": event.start_ns() / 1e6, "ms": event.duration_ns() / 1e6}
        for event in profiled.profiler.kineto_results.events()
        if event.name().startswith(wanted) and event.name() != "gloo:barrier"
    ]


def record_timeline(out: Path, name: str, bucket_mb: float) -> None:
    """Profiles one step on every rank; rank 0 writes the events of all."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    events = profile_step(name, Settings(dtype=torch.float32, bucket_mb=bucket_mb))
    gc.collect()
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, events)
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"contender": name, "bucket_mb": bucket_mb, "ranks": of_ranks}) + "\n")
    dist.barrier()
    dist.destroy_process_group()


ROWS = ("update", "communication", "forward, backward")


def kind_of(name: str) -> tuple[str, str] | None:
    """The row of an event, and its part; None if it is not shown."""
    part = part_of(name)
    if part is None or part in ("copy_in", "other"):
        return None
    if part in ("forward", "backward"):
        return "forward, backward", part
    return "communication" if name.startswith("gloo:") or part in ("all_gather", "reduce_scatter") else "update", part


def draw_timeline(path: Path, to: Path) -> None:
    trace = json.loads(path.read_text())
    phases = [e for events in trace["ranks"] for e in events if e["name"].startswith("timeline.")]
    begin = min(e["start_ms"] for e in phases)
    names = [f"rank {rank}: {row}" for rank in reversed(range(len(trace["ranks"]))) for row in ROWS]
    figure, axes = plt.subplots(figsize=(13, 0.55 * len(names) + 1.8))
    seen: set[str] = set()
    for rank, events in enumerate(trace["ranks"]):
        for event in events:
            kind = kind_of(event["name"])
            if kind is None:
                continue
            row, colour = kind
            seen.add(colour)
            span = [(event["start_ms"] - begin, max(event["ms"], 0.1))]
            y = names.index(f"rank {rank}: {row}")
            axes.broken_barh(span, (y - 0.38, 0.76), facecolors=COLOURS[colour], edgecolor="white", lw=0.4)
    for after in range(len(ROWS), len(names), len(ROWS)):
        axes.axhline(after - 0.5, color="black", lw=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("ms since forward began")
    axes.set_xlim(0, 1.02 * max(e["start_ms"] + e["ms"] - begin for e in phases))
    handles = [Patch(color=COLOURS[name], label=name.replace("_", "-")) for name in COLOURS if name in seen]
    axes.legend(handles=handles, ncol=len(handles), loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    axes.set_title(f"One step of {ENTRIES[trace['contender']].label}, {len(trace['ranks'])} ranks, fp32, buckets of "
                   f"{trace['bucket_mb']:g} MiB", loc="left")  # fmt: skip
    save(figure, to / "timeline.png")


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=RESULTS, help="where pictures go")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("step").add_argument("json", nargs="+", type=Path)
    commands.add_parser("memory")
    timeline = commands.add_parser("timeline")
    timeline.add_argument("--out", type=Path, required=True)
    timeline.add_argument("--contender", default="shardadam-backward-auto")
    timeline.add_argument("--bucket-mb", type=float, default=8)
    commands.add_parser("draw-timeline").add_argument("json", type=Path)
    args = parser.parse_args()
    if args.command == "step":
        draw_step(args.json, args.to)
    elif args.command == "memory":
        draw_memory(args.to)
    elif args.command == "timeline":
        record_timeline(args.out, args.contender, args.bucket_mb)
    else:
        draw_timeline(args.json, args.to)


if __name__ == "__main__":
    main()
