"""The Markdown that runs write (headings, lists, tables, paragraphs, code) as HTML; markup in it is plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from launcher.report.markup import Html, element, rows_of, together

_CODE = re.compile(r"`([^`]+)`")
_RULE = re.compile(r"^\|[\s:|-]+\|?$")


def render_markdown(text: str) -> Html:
    """Return a page's content."""
    return together(*_blocks(text))


def _blocks(text: str) -> Iterator[Html]:
    for sort, group in groupby(text.splitlines(), key=_sort):
        lines = list(group)
        if sort == "heading":
            for line in lines:
                depth = len(line) - len(line.lstrip("#"))
                yield element(f"h{min(depth + 2, 6)}", _inline(line.lstrip("# ")))
        elif sort == "list":
            yield element("ul", [element("li", _inline(line[2:])) for line in lines])
        elif sort == "table":
            yield _table(lines)
        elif sort == "text":
            yield element("p", _inline(" ".join(lines)))


def _sort(line: str) -> str:
    if not line.strip():
        return "nothing"
    return "heading" if line.startswith("#") else {"- ": "list", "| ": "table", "|-": "table"}.get(line[:2], "text")


def _table(lines: list[str]) -> Html:
    rows = [
        [_inline(cell.strip()) for cell in line.strip().strip("|").split("|")]
        for line in lines
        if not _RULE.match(line)
    ]
    return rows_of(rows[0], rows[1:])


def _inline(text: str) -> Html:
    parts = _CODE.split(text)
    return together(*(element("code", part) if number % 2 else part for number, part in enumerate(parts)))
