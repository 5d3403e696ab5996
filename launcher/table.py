"""Columns of plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from launcher.terminal import one_line


def table(rows: Sequence[Sequence[str]], *, indent: str = "", width: int | None = None) -> Iterator[str]:
    """Yield the rows as lines with aligned columns, two spaces between them.

    Args:
        rows: cells; every row has as many. Control characters and escape sequences in them are left out.
        indent: put before each line.
        width: wrap the last column so that lines stay within this many characters, where it leaves room for words.
    """
    if not rows:
        return
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    taken = len(indent) + sum(widths) + 2 * len(widths)
    room = None if width is None else max(30, width - taken)
    for row in rows:
        start = indent + "".join(f"{cell:{size}}  " for cell, size in zip(row, widths, strict=False))
        lines = [row[-1]] if room is None else textwrap.wrap(row[-1], room, break_long_words=False) or [""]
        yield (start + lines[0]).rstrip()
        yield from (" " * taken + line for line in lines[1:])
