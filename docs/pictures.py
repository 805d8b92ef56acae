# SPDX-License-Identifier: Apache-2.0
"""Draws docs/images/layout.svg from the layout that the optimizer itself makes of a small model.

python docs/pictures.py        # needs matplotlib
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from shardadam.layout import ParameterSpec, build_layout

IMAGES = Path(__file__).parent / "images"
# A block of a transformer, in the order of its registration: name and number of elements.
PARAMETERS = {"norm": 128, "qkv": 128 * 12, "out": 128 * 4, "norm 2": 128, "up": 128 * 8, "down": 128 * 8}
COLORS = ("#56b4e9", "#0072b2", "#e69f00", "#cc79a7", "#009e73", "#d55e00")
RANKS = 2
BUCKET_BYTES = 128 * 16 * 4


def draw_layout(path: Path) -> None:
    specs = [ParameterSpec(numel, 4, "fp32") for numel in PARAMETERS.values()]
    layout = build_layout(specs, world_size=RANKS, bucket_bytes=BUCKET_BYTES)
    names = list(PARAMETERS)
    figure = Figure(figsize=(10, 3.6))
    axes = figure.add_subplot()
    rows = {"parameters": 3.0, "buckets": 1.5, "shards": 0.0}
    start = 0.0
    total = sum(PARAMETERS.values())
    for index, (name, numel) in enumerate(PARAMETERS.items()):
        box(axes, start, rows["parameters"], numel, COLORS[index], name if numel > 200 else "")
        start += numel
    start = 0.0
    gap = 60.0
    for number, bucket in enumerate(layout.buckets):
        for segment in bucket.segments:
            label = names[segment.parameter] if segment.numel > 200 else ""
            box(axes, start + segment.offset, rows["buckets"], segment.numel, COLORS[segment.parameter], label)
        axes.text(start, rows["buckets"] + 0.78, f"bucket {number}", fontsize=8, color="#777777")
        for rank in range(RANKS):
            low = start + rank * bucket.shard_numel
            for segment in bucket.shard_segments(rank):
                box(axes, low + segment.offset, rows["shards"], segment.numel, COLORS[segment.parameter], "")
            frame = Rectangle(
                (low, rows["shards"]), bucket.shard_numel, 0.7, fill=False, edgecolor="#777777", linewidth=2
            )
            axes.add_patch(frame)
            axes.text(low + bucket.shard_numel / 2, -0.32, f"rank {rank}", fontsize=8, color="#777777", ha="center")
        start += bucket.numel + gap
    for name, y in rows.items():
        axes.text(-40, y + 0.35, name, ha="right", va="center", fontsize=10, color="#777777")
    axes.set_xlim(-700, max(total, start))
    axes.set_ylim(-0.6, 4.0)
    axes.axis("off")
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


def box(axes: object, x: float, y: float, width: float, color: str, label: str) -> None:
    axes.add_patch(Rectangle((x, y), width, 0.7, facecolor=color, edgecolor="white", linewidth=0.8))  # type: ignore[attr-defined]
    if label:
        axes.text(x + width / 2, y + 0.35, label, ha="center", va="center", fontsize=8, color="white")  # type: ignore[attr-defined]


if __name__ == "__main__":
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "shardadam"
    IMAGES.mkdir(exist_ok=True)
    draw_layout(IMAGES / "layout.svg")
