# SPDX-License-Identifier: Apache-2.0
"""Draws docs/images/layout.svg from the layout that the optimizer itself makes of a small model.

python docs/pictures.py        # needs matplotlib
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from shardadam.layout import ParameterSpec, build_layout

IMAGES = Path(__file__).parent / "images"
# A block of a transformer, in the order of its registration: name and number of elements.
PARAMETERS = {"norm": 128, "qkv": 128 * 12, "out": 128 * 4, "norm 2": 128, "up": 128 * 8, "down": 128 * 8}
COLORS = ("#56b4e9", "#0072b2", "#e69f00", "#cc79a7", "#009e73", "#d55e00")
TEXT_COLORS = ("black", "white", "black", "black", "white", "white")
GRAY = "#777777"  # readable on light and dark pages
FONT_SIZE = 11  # at least 12 px where a page shows the picture 690 px wide
NARROW_NUMEL = 200  # a box of fewer elements is too narrow for its name
HEIGHT = 0.7
ROWS = {"parameters": 3.2, "buckets": 1.6, "shards": 0.0}
GAP_NUMEL = 60
RANKS = 2
BUCKET_BYTES = 128 * 16 * 4


def draw_layout(path: Path) -> None:
    specs = [ParameterSpec(numel, 4, "fp32") for numel in PARAMETERS.values()]
    layout = build_layout(specs, world_size=RANKS, bucket_bytes=BUCKET_BYTES)
    names = list(PARAMETERS)
    axes = Figure(figsize=(10, 3.8)).add_subplot()
    start = 0
    for index, (name, numel) in enumerate(PARAMETERS.items()):
        draw_box(axes, start, "parameters", numel, index, name)
        if numel < NARROW_NUMEL:
            draw_text(axes, start + numel / 2, ROWS["parameters"] + HEIGHT + 0.1, name, ha="center")
        start += numel
    total = start
    start = 0
    for number, bucket in enumerate(layout.buckets):
        for segment in bucket.segments:
            draw_box(
                axes, start + segment.offset, "buckets", segment.numel, segment.parameter, names[segment.parameter]
            )
        draw_text(axes, start, ROWS["buckets"] + HEIGHT + 0.1, f"bucket {number}")
        for rank in range(RANKS):
            low = start + rank * bucket.shard_numel
            end = low
            for segment in bucket.shard_segments(rank):
                draw_box(axes, low + segment.offset, "shards", segment.numel, segment.parameter)
                end = low + segment.offset + segment.numel
            draw_padding(axes, end, low + bucket.shard_numel - end)
            frame = Rectangle(
                (low, ROWS["shards"]), bucket.shard_numel, HEIGHT, fill=False, edgecolor=GRAY, linewidth=2
            )
            axes.add_patch(frame)
            draw_text(axes, low + bucket.shard_numel / 2, ROWS["shards"] - 0.4, f"rank {rank}", ha="center")
        start += bucket.numel + GAP_NUMEL
    for name, y in ROWS.items():
        draw_text(axes, -60, y + HEIGHT / 2, name, ha="right", va="center")
    axes.set_xlim(-700, max(total, start))
    axes.set_ylim(-0.6, 4.3)
    axes.axis("off")
    axes.figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})


def draw_box(axes: Axes, x: float, row: str, numel: int, parameter: int, label: str = "") -> None:
    y, color = ROWS[row], TEXT_COLORS[parameter]
    axes.add_patch(Rectangle((x, y), numel, HEIGHT, facecolor=COLORS[parameter], edgecolor="white", linewidth=0.8))
    if label and numel >= NARROW_NUMEL:
        draw_text(axes, x + numel / 2, y + HEIGHT / 2, label, color=color, ha="center", va="center")


def draw_padding(axes: Axes, x: float, numel: int) -> None:
    if numel:
        axes.add_patch(Rectangle((x, ROWS["shards"]), numel, HEIGHT, fill=False, hatch="////", edgecolor=GRAY))


def draw_text(
    axes: Axes, x: float, y: float, text: str, *, color: str = GRAY, ha: str = "left", va: str = "baseline"
) -> None:
    axes.text(x, y, text, fontsize=FONT_SIZE, color=color, ha=ha, va=va)


if __name__ == "__main__":
    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "shardadam"
    IMAGES.mkdir(exist_ok=True)
    draw_layout(IMAGES / "layout.svg")
