# SPDX-License-Identifier: Apache-2.0
"""Draws the timeline of a step as one HTML page with an SVG picture, which needs nothing else. Pure text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from shardadam.profiler.trace import COLOURS, Interval

_WIDTH, _LEFT, _ROW, _TOP = 1160, 190, 22, 40
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; color: #222; background: #fff; }}
table {{ border-collapse: collapse; margin: 1em 0; }} th, td {{ padding: 2px 14px 2px 0; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }} svg {{ max-width: 100%; height: auto; }}
</style></head><body><h1>{title}</h1>
{picture}
{table}
<p>{notes}</p>
</body></html>
"""


def page(title: str, ranks: Sequence[Sequence[Interval]], table: Sequence[Sequence[str]], notes: str) -> str:
    """Return the page.

    Args:
        ranks: the intervals of each rank, in microseconds since the step began.
        table: rows of text; the first one is the header.
    """
    return _PAGE.format(title=escape(title), picture=picture(ranks), table=_table(table), notes=escape(notes))


def picture(ranks: Sequence[Sequence[Interval]]) -> str:
    """Return the timeline as SVG: a row for each thread and stream of each rank."""
    names = [sorted({one.row for one in of_rank}, key=_order) for of_rank in ranks]
    rows = [(rank, row) for rank, of_rank in enumerate(names) for row in of_rank]
    places = {row: _TOP + index * _ROW for index, row in enumerate(rows)}
    end = max((one.end for of_rank in ranks for one in of_rank), default=1.0)
    scale, bottom = (_WIDTH - _LEFT - 20) / end, _TOP + len(rows) * _ROW
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 46}" width="{_WIDTH}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{bottom + 46}" fill="#ffffff"/>',  # also on a dark page
        *_legend({one.part for of_rank in ranks for one in of_rank}),
        *_axis(end, scale, bottom),
    ]
    for (rank, row), y in places.items():
        if y > _TOP and row == names[rank][0]:
            parts.append(f'<path d="M 0 {y} H {_WIDTH}" stroke="#222222" stroke-width="0.7"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(f"rank {rank}: {row}")}</text>')
    for rank, of_rank in enumerate(ranks):
        for one in of_rank:
            length = (one.end - one.start) / 1e3
            parts.append(
                f'<rect x="{_LEFT + one.start * scale:.2f}" y="{places[rank, one.row] + 3}" '
                f'width="{max((one.end - one.start) * scale, 0.4):.2f}" height="{_ROW - 6}" fill="{COLOURS[one.part]}">'
                f"<title>{one.part}: {length:.3f} ms, at {one.start / 1e3:.3f} ms</title></rect>"
            )
    return "\n".join([*parts, "</svg>"])


def _order(row: str) -> tuple[bool, int, str]:
    """Threads first, the main one before the others, then transfers and streams; numbers by size."""
    name, _, number = row.partition(" ")
    return name != "main" and name != "thread", int(number) if number.isdigit() else 0, row


def _legend(shown: set[str]) -> list[str]:
    found, x = [], float(_LEFT)
    for part in (part for part in COLOURS if part in shown):
        label = "rest of step()" if part == "other" else part.replace("_", "-")
        found.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{COLOURS[part]}"/>')
        found.append(f'<text x="{x + 17}" y="20">{label}</text>')
        x += 34 + 7.2 * len(label)
    return found


def _axis(end: float, scale: float, bottom: int) -> list[str]:
    """Return about ten ticks in ms, at round numbers."""
    unit = next(
        (base * 10**power for power in range(-3, 9) for base in (1, 2, 5) if base * 10.0**power * 10 >= end / 1e3), 1.0
    )
    found = [f'<text x="{_LEFT}" y="{bottom + 38}">ms since the step began</text>']
    for index in range(int(end / 1e3 / unit) + 1):
        x = _LEFT + index * unit * 1e3 * scale
        found.append(f'<path d="M {x:.1f} {_TOP - 6} V {bottom}" stroke="#dddddd"/>')
        found.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{index * unit:g}</text>')
    return found


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    lines = [f"<tr>{head.replace('td>', 'th>')}</tr>", *(f"<tr>{row}</tr>" for row in body)]
    return "<table>" + "\n".join(lines) + "</table>"
