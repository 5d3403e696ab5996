"""HTML that escapes every value, and the Markdown that runs write.

Content of a run can never become markup.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors.secrets import hide_secrets
from launcher.utils.files import read_regular
from launcher.utils.text import counted, without_escapes

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("launcher.runs.report"),
        autoescape=True,
        finalize=show,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["counted"] = counted
    return environment


def show(value: Any) -> Any:
    """Return a value without control characters and secrets, before it is escaped."""
    if isinstance(value, int | float) or hasattr(value, "__html__"):
        return value
    return "" if value is None else hide_secrets(without_escapes(str(value)))


def render_page(name: str, /, **values: Any) -> str:
    """Return a page from its template."""
    return _environment().get_template(name).render(values)


def render_macro(name: str, /, *values: Any) -> Markup:
    """Return a part of a page: a macro of ``macros.html``."""
    found: Markup = getattr(_environment().get_template("macros.html").module, name)(*values)
    return found


def png_image(path: Path, *, limit: int) -> Markup:
    """Return a PNG as part of the page.

    Raises:
        OSError: it is not a regular file, or has more than ``limit`` bytes.
    """
    data = base64.b64encode(read_regular(path, limit=limit)).decode("ascii")
    return render_macro("picture", data, path.name)


_CODE = re.compile(r"`([^`]+)`")
_TABLE_RULE = re.compile(r"^\|[\s:|-]+\|?$")


def render_markdown(text: str) -> Markup:
    """Return a page's content."""
    return render_macro("markdown", list(_markdown_blocks(text)))


def _markdown_blocks(text: str) -> Iterator[tuple[str, Markup | list[Markup]]]:
    """Yield tags and what they hold."""
    for sort, group in groupby(text.splitlines(), key=_block_kind):
        lines = list(group)
        if sort == "heading":
            for line in lines:
                depth = len(line) - len(line.lstrip("#"))
                yield f"h{min(depth + 2, 6)}", _markdown_inline(line.lstrip("# "))
        elif sort == "list":
            yield "ul", [_markdown_inline(line[2:]) for line in lines]
        elif sort == "table":
            yield "table", _markdown_table(lines)
        elif sort == "text":
            yield "p", _markdown_inline(" ".join(lines))


def _block_kind(line: str) -> str:
    if not line.strip():
        return "nothing"
    return "heading" if line.startswith("#") else {"- ": "list", "| ": "table", "|-": "table"}.get(line[:2], "text")


def _markdown_table(lines: list[str]) -> Markup:
    rows = [
        [_markdown_inline(cell.strip()) for cell in line.strip().strip("|").split("|")]
        for line in lines
        if not _TABLE_RULE.match(line)
    ]
    return render_macro("table", rows[0], rows[1:])


def _markdown_inline(text: str) -> Markup:
    return render_macro("inline", _CODE.split(text))
