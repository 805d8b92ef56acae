# SPDX-License-Identifier: Apache-2.0
"""``shardadam plan --plot``: draws the numbers of a plan as bars. Imports matplotlib only when it draws."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from shardadam.cli.comparison import Comparison, Usage
from shardadam.cli.errors import CommandError
from shardadam.cli.plan_text import name_of
from shardadam.cli.text import Unit, plural

# Okabe and Ito's palette, which colour-blind readers can tell apart; as in benchmarks/results/memory-vs-n.png.
_PARTS = (
    ("parameters", ("parameters",), "#9A9A9A"),
    ("gradients, gradient shard, staging", ("gradients", "gradient_shard", "staging"), "#56B4E9"),
    ("moments", ("moments",), "#D55E00"),
    ("master", ("master",), "#E69F00"),
    ("average", ("average",), "#009E73"),
    ("tables, buffers of offloaded state", ("scalars", "tables", "offload_buffers"), "#000000"),
)


def plot(found: Comparison, path: Path) -> None:
    """Writes the picture to ``path``; its suffix selects the file format.

    Raises:
        CommandError: matplotlib is not installed, or does not know the suffix.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib, which is not installed: pip install 'shardadam[benchmark]'")
    figure_module: Any = importlib.import_module("matplotlib.figure")  # not pyplot, which would look for a display
    usages = _shown(found)
    unit = Unit(max(usage.total for usage in usages))
    figure = figure_module.Figure(figsize=(10, 1.6 + 0.36 * len(usages)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    left = [0.0] * len(usages)
    for label, kinds, colour in _PARTS:
        widths = [sum(usage.kinds[kind] for kind in kinds) / unit.nbytes for usage in usages]
        if any(widths):
            axes.barh(range(len(usages)), widths, left=left, color=colour, label=label, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, usage in enumerate(usages):
        axes.annotate(unit(usage.total), (left[row], row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    if found.available is not None:
        axes.axvline(found.available / unit.nbytes, color="#0072B2", ls="--", label="memory of a rank")
    axes.set_yticks(range(len(usages)), [_label(usage) for usage in usages])
    for label, usage in zip(axes.get_yticklabels(), usages, strict=True):
        label.set_fontweight("bold" if found.is_asked(usage) else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(*left, (found.available or 0) / unit.nbytes))
    axes.set_xlabel(f"{unit.name} per rank, without activations")
    axes.set_title(
        f"{found.source.what}: {found.source.numel:,} parameters on {plural(found.ranks, 'rank')}", loc="left"
    )
    figure.legend(loc="outside lower center", ncol=3, frameon=False, fontsize=9)
    try:
        figure.savefig(path)
    except ValueError as error:  # an unknown suffix
        raise CommandError(f"--plot {path}: {error}") from error


def _shown(found: Comparison) -> list[Usage]:
    """Returns other optimizers, and ours in every format with the requested ``gradient_sync``."""
    others = [usage for usage in found.alternatives if usage.setting is None]
    ours = [usage for usage in found.formats if usage.name == found.asked.gradient_sync]
    return [*others, *ours]


def _label(usage: Usage) -> str:
    if usage.setting is None:
        return name_of(usage)
    precision = usage.setting.precision
    master = "" if usage.kinds["master"] == 0 and precision.master != "none" else f", master {precision.master}"
    return f"{usage.name}: moments {precision.moments}{master}"
