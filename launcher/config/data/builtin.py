"""Data that comes with the package: Python's documentation, made-up chats, and preferences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.data.chat_tasks import NUM_CHATS, chat_tasks
from launcher.config.data.text import PYTHON_DOCS, python_docs

CHAT_TASKS = "chat-tasks"
SAMPLE_PREFERENCES = "sample-preferences"


@dataclass(frozen=True, kw_only=True)
class BuiltinData:
    """Rows that ``data.path`` names by a word."""

    label: str
    """What it is, for plans."""
    unit: str
    """What one row is called in messages."""
    columns: tuple[str, ...]
    """Of its rows, in the order of a row."""
    num_rows: int | None = None
    """``None`` of text, which is not counted in rows."""

    @property
    def is_text(self) -> bool:
        """Whether its rows are documents."""
        return self.columns == ("text",)


BUILTIN_DATA: Mapping[str, BuiltinData] = {
    PYTHON_DOCS: BuiltinData(label="Python's documentation", unit="topic", columns=("text",)),
    CHAT_TASKS: BuiltinData(label="chats about small tasks", unit="chat", columns=("messages",), num_rows=NUM_CHATS),
    SAMPLE_PREFERENCES: BuiltinData(
        label="preferences of short answers over wordy ones",
        unit="pair",
        columns=("prompt", "chosen", "rejected"),
        num_rows=64,
    ),
}


def builtin_rows(name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of built-in data, in a fixed order."""
    yield from _ROWS[name]()


def _documents() -> Iterator[dict[str, Any]]:
    return ({"text": text} for text in python_docs())


def _sample_preferences() -> Iterator[dict[str, Any]]:
    lines = Path(__file__).with_name("sample_preferences.jsonl").read_text(encoding="utf-8").splitlines()
    return map(json.loads, lines)


_ROWS: Mapping[str, Callable[[], Iterator[dict[str, Any]]]] = {
    PYTHON_DOCS: _documents,
    CHAT_TASKS: chat_tasks,
    SAMPLE_PREFERENCES: _sample_preferences,
}
