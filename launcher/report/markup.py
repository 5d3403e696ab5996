"""HTML from values that are escaped by themselves: what comes from a run can never become markup."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Union

from launcher.runfiles import read_regular
from launcher.secrecy import hide_secrets
from launcher.terminal import without_escapes

_VOID = frozenset({"img", "meta"})


class Html(str):
    """Text that is markup already; whatever is not of this class is escaped where it is put."""

    __slots__ = ()


Content = Union[str, None, "Iterable[Content]"]


def element(name: str, /, *content: Content, **attributes: str | float) -> Html:
    """Return an element.

    Args:
        name: of the element.
        content: what is in it.
        attributes: written with ``_`` for ``-``, and behind a word that Python keeps (``class_``).
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{together(*content)}</{name}>")


def together(*content: Content) -> Html:
    """Return contents one after the other."""
    return Html("".join(map(_text, content)))


def _text(content: Content) -> str:
    if content is None or isinstance(content, Html):
        return content or ""
    if isinstance(content, str):
        return html.escape(hide_secrets(without_escapes(content)))
    return together(*content)


def rows_of(head: Sequence[Content], rows: Iterable[Sequence[Content]]) -> Html:
    """Return a table; without a head the first cell of each row is one."""
    top = element("thead", element("tr", [element("th", cell) for cell in head])) if head else None
    body = [element("tr", [element("th" if not head and not n else "td", c) for n, c in enumerate(r)]) for r in rows]
    return element("div", element("table", top, element("tbody", body)), class_="wide")


def section(title: str, *content: Content) -> Html:
    """Return a part of a page under its title; nothing where it has no content."""
    inside = together(*content)
    return element("section", element("h2", title), inside) if inside else Html()


def folded(title: str, *content: Content) -> Html:
    """Return what is shown once somebody asks for it."""
    return element("details", element("summary", title), *content)


def verbatim(text: str) -> Html:
    """Return text with its line ends and spaces."""
    return element("pre", text)


def picture(path: Path, *, alt: str, limit: int) -> Html:
    """Return a PNG as part of the page.

    Raises:
        OSError: it is no regular file, or has more than ``limit`` bytes.
    """
    data = base64.b64encode(read_regular(path, limit=limit)).decode("ascii")
    return element("img", src=f"data:image/png;base64,{data}", alt=alt)
