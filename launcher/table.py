"""Columns of plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from launcher.terminal import one_line

_LEAST, _LEAST_LAST = 12, 30
"""Columns that a cell has at least, where lines are wrapped, and the last of a row."""


def table(
    rows: Sequence[Sequence[str]], *, indent: str = "", width: int | None = None, whole: Sequence[int] = ()
) -> Iterator[str]:
    """Yield the rows as lines with aligned columns, two spaces between them.

    Args:
        rows: cells; every row has as many. Control characters and escape sequences in them are left out.
        indent: put before each line.
        width: wrap cells so that lines stay within this many characters, where that leaves room for words.
        whole: columns whose cells are never broken: names that are copied.
    """
    if not rows:
        return
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    if width is not None:
        kept = sum(widths[column] for column in whole)
        free = [size for column, size in enumerate(widths) if column not in whole]
        narrowed = iter(_narrowed(free, room=width - kept - len(indent) - 2 * len(widths) - _LEAST_LAST))
        widths = [size if column in whole else next(narrowed) for column, size in enumerate(widths)]
    taken = len(indent) + sum(widths) + 2 * len(widths)
    last = None if width is None else max(_LEAST_LAST, width - taken)
    for row in rows:
        cells = [
            *(_wrapped(cell, size) for cell, size in zip(row, widths, strict=False)),
            _wrapped(row[-1], last, breaks=False),
        ]
        for number in range(max(map(len, cells))):
            parts = [lines[number] if number < len(lines) else "" for lines in cells]
            start = indent + "".join(f"{part:{size}}  " for part, size in zip(parts, widths, strict=False))
            yield (start + parts[-1]).rstrip()


def _narrowed(widths: list[int], *, room: int) -> list[int]:
    """Return widths that fit into ``room`` together, the widest ones made narrower, none below what is legible."""
    widths = list(widths)
    while sum(widths) > room and max(widths, default=0) > _LEAST:
        widest = max(widths)
        widths[widths.index(widest)] = max(_LEAST, widest - 1)
    return widths


def _wrapped(cell: str, size: int | None, *, breaks: bool = True) -> list[str]:
    """Return the lines of a cell; ``breaks`` says whether a word that is longer than its column is broken."""
    if size is None or len(cell) <= size:
        return [cell]
    return textwrap.wrap(cell, size, break_long_words=breaks, break_on_hyphens=False) or [""]
