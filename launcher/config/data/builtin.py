"""Data that needs no files: Python's documentation, and chats that the package makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.config.data.chat_tasks import NUM_CHATS, chat_tasks
from launcher.config.data.text import PYTHON_DOCS, python_docs

CHAT_TASKS = "chat-tasks"


@dataclass(frozen=True, kw_only=True)
class BuiltinData:
    """Rows that ``data.path`` names by a word."""

    label: str
    """What it is, for plans."""
    unit: str
    """What one row is called in messages."""
    column: str
    """The one column of its rows."""
    num_rows: int | None = None
    """``None`` of text, which is not counted in rows."""

    @property
    def is_text(self) -> bool:
        """Whether its rows are documents."""
        return self.column == "text"


BUILTIN_DATA: Mapping[str, BuiltinData] = {
    PYTHON_DOCS: BuiltinData(label="Python's documentation", unit="topic", column="text"),
    CHAT_TASKS: BuiltinData(label="chats about small tasks", unit="chat", column="messages", num_rows=NUM_CHATS),
}


def builtin_rows(name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of built-in data, in a fixed order."""
    rows: Iterable[dict[str, Any]] = ({"text": text} for text in python_docs()) if name == PYTHON_DOCS else chat_tasks()
    yield from rows
