# SPDX-License-Identifier: Apache-2.0
"""Text for a terminal of 80 columns: aligned tables, wrapped paragraphs and readable sizes."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Literal

from shardadam.checkpoint.files import printable

WIDTH = 80
"""Columns that output may take, whatever the terminal has: it looks the same in a file, a log and a message."""


def show(text: str, *, to: Literal["stdout", "stderr"] = "stdout") -> None:
    """Prints text. All output of commands passes here, so that nothing in it controls the terminal.

    What the terminal's encoding lacks is escaped, too.
    """
    stream = getattr(sys, to)
    text = printable(text, keep="\n")
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def table(rows: Sequence[Sequence[str]], *, right: Iterable[int]) -> str:
    """Aligns ``rows``, all of one length, in columns; columns with an index in ``right`` are aligned to the right.

    A line break in a cell is escaped, as it would look like a row of its own. Columns are two spaces apart, or one if
    the table would be wider than ``WIDTH``.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    return "\n".join(
        gap.join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def side_by_side(labels: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    """Aligns ``columns``, each as long as ``labels``, beside them; in several tables if one would be too wide."""
    tables = []
    while columns:
        count = len(columns)
        while True:
            rows = [[label, *(column[index] for column in columns[:count])] for index, label in enumerate(labels)]
            text = table(rows, right=range(1, count + 1))
            if count == 1 or max(map(len, text.splitlines())) <= WIDTH:
                break
            count -= 1
        tables.append(text)
        columns = columns[count:]
    return "\n\n".join(tables)


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Aligns names and what is said about them, which goes on in the next line if it is too long for one."""
    known = [(printable(name), printable(text)) for name, text in rows]
    width = max(len(name) for name, _ in known)
    lines = []
    for name, text in known:
        first, *others = _lines(text, WIDTH - width - 2) or [""]
        lines += [f"{name:<{width}}  {first}".rstrip(), *(f"{'':{width}}  {line}" for line in others)]
    return "\n".join(lines)


def paragraph(text: str) -> str:
    """Wraps ``text``, but not within words, so that a path can be copied."""
    return "\n".join(_lines(text, WIDTH))


def _lines(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)  # options have hyphens


def binary_size(nbytes: int) -> str:
    """``nbytes`` in the largest fitting unit of 1024: "3.5 GiB"."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def plural(count: int, noun: str) -> str:
    """ "1 rank", "1,024 ranks"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Unit:
    """One decimal unit for all numbers of a table, so that a reader can compare them.

    Args:
        largest: the table's largest number, in bytes; the unit is the largest that is not larger.
    """

    def __init__(self, largest: int) -> None:
        self.name, self.nbytes = next((unit for unit in _UNITS if largest >= unit[1]), ("bytes", 1))

    def __call__(self, nbytes: int) -> str:
        """``nbytes`` as a number in this unit, with two decimals below a thousand (none for bytes)."""
        number = nbytes / self.nbytes
        return f"{number:,.{0 if self.nbytes == 1 or number >= 999.995 else 2}f}"

    def named(self, nbytes: int) -> str:
        """The same, followed by the unit."""
        return f"{self(nbytes)} {self.name}"


_UNITS = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3))
