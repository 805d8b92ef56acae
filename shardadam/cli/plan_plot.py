# SPDX-License-Identifier: Apache-2.0
"""``shardadam plan --plot``: the same numbers as bars. Imports matplotlib when it draws."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from shardadam.cli.comparison import Comparison, Way
from shardadam.cli.errors import CommandError
from shardadam.cli.plan_text import NAMES
from shardadam.cli.text import Unit, plural

# Okabe and Ito's colours, which the colour-blind tell apart; the same as in benchmarks/results/memory-vs-n.png.
_PARTS = (
    ("parameters", ("parameters",), "#9A9A9A"),
    ("gradients, gradient shard, staging", ("gradients", "gradient_shard", "staging"), "#56B4E9"),
    ("moments", ("moments",), "#D55E00"),
    ("master", ("master",), "#E69F00"),
    ("tables", ("scalars", "tables"), "#000000"),
)


def plot(found: Comparison, path: Path) -> None:
    """
    Raises:
        CommandError: matplotlib is missing, or cannot write this kind of file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib, which is not installed: pip install 'shardadam[benchmark]'")
    figure_module: Any = importlib.import_module("matplotlib.figure")  # no pyplot: it would look for a display
    ways = _shown(found)
    unit = Unit(max(way.total for way in ways))
    figure = figure_module.Figure(figsize=(10, 1.6 + 0.36 * len(ways)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    left = [0.0] * len(ways)
    for label, kinds, colour in _PARTS:
        widths = [sum(way.kinds[kind] for kind in kinds) / unit.nbytes for way in ways]
        if any(widths):
            axes.barh(range(len(ways)), widths, left=left, color=colour, label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, way in enumerate(ways):
        axes.annotate(unit(way.total), (left[row], row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    if found.available is not None:
        axes.axvline(found.available / unit.nbytes, color="#0072B2", ls="--", label="memory of a rank")
    axes.set_yticks(range(len(ways)), [_label(way) for way in ways])
    for label, way in zip(axes.get_yticklabels(), ways, strict=True):
        label.set_fontweight("bold" if found.is_asked(way) else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(*left, (found.available or 0) / unit.nbytes))
    axes.set_xlabel(f"{unit.name} a rank, without activations")
    axes.set_title(
        f"{found.source.what}: {found.source.numel:,} parameters on {plural(found.ranks, 'rank')}", loc="left"
    )
    figure.legend(loc="outside lower center", ncol=3, frameon=False, fontsize=9)
    try:
        figure.savefig(path)
    except ValueError as error:  # a suffix that it does not know
        raise CommandError(f"--plot {path}: {error}") from error


def _shown(found: Comparison) -> list[Way]:
    """Peers, and every format with the ``gradient_sync`` asked for."""
    theirs = [way for way in found.peers if way.setting is None]
    ours = [way for way in found.formats if way.name == found.asked.gradient_sync]
    return [*theirs, *ours]


def _label(way: Way) -> str:
    if way.setting is None:
        return NAMES[way.name]
    precision = way.setting.precision
    master = "" if way.kinds["master"] == 0 and precision.master != "none" else f", master {precision.master}"
    return f"{way.name}: moments {precision.moments}{master}"
