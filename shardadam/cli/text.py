# SPDX-License-Identifier: Apache-2.0
"""Text for a terminal of 80 to 120 columns: aligned tables and readable sizes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Literal

from shardadam.checkpoint.files import printable


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

    A line break in a cell is escaped, as it would look like a row of its own.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


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
        """``nbytes`` as a number in this unit, with two decimals (none for bytes)."""
        return f"{nbytes / self.nbytes:,.{0 if self.nbytes == 1 else 2}f}"

    def named(self, nbytes: int) -> str:
        """The same, followed by the unit."""
        return f"{self(nbytes)} {self.name}"


_UNITS = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3))
