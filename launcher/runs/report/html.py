"""HTML that escapes every value, and the Markdown that runs write.

Content of a run can never become markup.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Union

from launcher.errors.secrets import hide_secrets
from launcher.utils.files import read_regular
from launcher.utils.text import without_escapes

_VOID = frozenset({"img", "meta"})


class Html(str):
    """Markup; any value that is not of this class is escaped."""

    __slots__ = ()


Content = Union[str, None, "Iterable[Content]"]


def element(name: str, /, *content: Content, **attributes: str | float) -> Html:
    """Return an element.

    Args:
        name: of the element.
        content: of the element.
        attributes: with ``_`` for ``-``, and a trailing ``_`` after reserved words of Python (``class_``).
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*content)}</{name}>")


def join(*content: Content) -> Html:
    """Return contents one after the other."""
    return Html("".join(map(_escaped, content)))


def _escaped(content: Content) -> str:
    if content is None or isinstance(content, Html):
        return content or ""
    if isinstance(content, str):
        return html.escape(hide_secrets(without_escapes(content)))
    return join(*content)


def table_of(head: Sequence[Content], rows: Iterable[Sequence[Content]]) -> Html:
    """Return a table; without a head, the first cell of each row is its head."""
    top = element("thead", element("tr", [element("th", cell) for cell in head])) if head else None
    body = [element("tr", [element("th" if not head and not n else "td", c) for n, c in enumerate(r)]) for r in rows]
    return element("div", element("table", top, element("tbody", body)), class_="wide")


def section(title: str, *content: Content) -> Html:
    """Return a part of a page under its title; empty without content."""
    inside = join(*content)
    return element("section", element("h2", title), inside) if inside else Html()


def folded(title: str, *content: Content) -> Html:
    """Return content that a reader can unfold."""
    return element("details", element("summary", title), *content)


def verbatim(text: str) -> Html:
    """Return text with its line ends and spaces kept."""
    return element("pre", text)


def png_image(path: Path, *, alt: str, limit: int) -> Html:
    """Return a PNG as part of the page.

    Raises:
        OSError: it is not a regular file, or has more than ``limit`` bytes.
    """
    data = base64.b64encode(read_regular(path, limit=limit)).decode("ascii")
    return element("img", src=f"data:image/png;base64,{data}", alt=alt)


_CODE = re.compile(r"`([^`]+)`")
_TABLE_RULE = re.compile(r"^\|[\s:|-]+\|?$")


def render_markdown(text: str) -> Html:
    """Return a page's content."""
    return join(*_markdown_blocks(text))


def _markdown_blocks(text: str) -> Iterator[Html]:
    for sort, group in groupby(text.splitlines(), key=_block_kind):
        lines = list(group)
        if sort == "heading":
            for line in lines:
                depth = len(line) - len(line.lstrip("#"))
                yield element(f"h{min(depth + 2, 6)}", _markdown_inline(line.lstrip("# ")))
        elif sort == "list":
            yield element("ul", [element("li", _markdown_inline(line[2:])) for line in lines])
        elif sort == "table":
            yield _markdown_table(lines)
        elif sort == "text":
            yield element("p", _markdown_inline(" ".join(lines)))


def _block_kind(line: str) -> str:
    if not line.strip():
        return "nothing"
    return "heading" if line.startswith("#") else {"- ": "list", "| ": "table", "|-": "table"}.get(line[:2], "text")


def _markdown_table(lines: list[str]) -> Html:
    rows = [
        [_markdown_inline(cell.strip()) for cell in line.strip().strip("|").split("|")]
        for line in lines
        if not _TABLE_RULE.match(line)
    ]
    return table_of(rows[0], rows[1:])


def _markdown_inline(text: str) -> Html:
    parts = _CODE.split(text)
    return join(*(element("code", part) if number % 2 else part for number, part in enumerate(parts)))
