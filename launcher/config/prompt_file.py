"""A file of prompts, read a line at a time: JSON lines, a JSON list, a table or plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from launcher.config.data.formats import KIND_NAMES, BadFile, FileFormat, has_lone_returns, inspect_file
from launcher.config.data.rows import Record, read_rows, table_header
from launcher.config.sampling import SamplingParams
from launcher.utils.text import did_you_mean, shell_command

SAMPLE_PROMPTS = Path(__file__).with_name("sample_prompts.jsonl")
"""The 16 prompts that come with the program."""
PromptFormat = Literal["jsonl", "json", "csv", "text"]
MAX_LINE_BYTES = 16 * 2**20
"""A longer line is refused: a file without line breaks must not fill the memory."""
_BLOCK = 1 << 20
_TEXT_COLUMNS = ("prompt", "id", "chat_template", "model")
"""Text columns of a table; other columns are parsed as JSON if they hold some."""
_PLAIN = "job.format=text"
_TO_LINES = "import datasets, sys; datasets.Dataset.from_{kind}(sys.argv[1]).to_json(sys.argv[2])"

_SUGGESTIONS = {
    **dict.fromkeys(
        (
            "text",
            "input",
            "inputs",
            "question",
            "query",
            "instruction",
            "content",
            "prompts",
            "user",
            "request",
            "body",
        ),
        "prompt",
    ),
    **dict.fromkeys(("conversation", "conversations", "chat", "dialog", "dialogue", "history"), "messages"),
    **dict.fromkeys(("max_new_tokens", "max_length", "max_completion_tokens", "n_predict"), "max_tokens"),
    "stop_strings": "stop",
    "stop_sequences": "stop",
}
"""Names that other programs and data sets have for a field."""


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """A prompt file and its format."""

    path: Path
    written: FileFormat

    @property
    def format(self) -> str:
        """Return its format, as in ``job.format``."""
        return self.written.kind

    def records(self, wanted: Callable[[int], bool]) -> Iterator[Record]:
        """Yield the records whose number is ``wanted``; blank lines are none.

        Raises:
            BadFile: a table without a header that names prompts, or a file that is damaged.
            OSError: it cannot be read.
        """
        is_table = self.written.kind == "csv"
        if is_table:
            _check_header(table_header(self.path, self.written, longest_line=MAX_LINE_BYTES))
        found = read_rows(
            self.path,
            self.written,
            wanted,
            longest_line=MAX_LINE_BYTES,
            text_field="prompt",
            takes_nan=False,
        )
        for record in found:
            yield replace(record, fields=_fields_of(record.fields)) if is_table else record

    def count(self, *, heartbeat: Callable[[], None]) -> int:
        """Return how many records there are."""
        found = 0

        def note(number: int) -> bool:
            nonlocal found
            found = number + 1
            if number % 4096 == 0:
                heartbeat()
            return False

        for _ in self.records(note):
            raise AssertionError("none is wanted")
        return found

    def digest(self, *, heartbeat: Callable[[], None] = lambda: None) -> str:
        """Return the SHA-256 of its bytes."""
        found = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
                heartbeat()
        return found.hexdigest()


def open_prompt_file(path: Path, format_: Literal[PromptFormat, "auto"] = "auto") -> PromptFile:
    """Return the file of prompts at ``path``, with its compression detected.

    Args:
        path: the file.
        format_: how it is written; ``auto`` goes by content and ending.

    Raises:
        BadFile: it is empty, damaged, or neither UTF-8 text nor of a format that holds prompts.
    """
    found = inspect_file(path, plain=_PLAIN, as_text=format_ == "text", by_row=True)
    if found.kind in ("parquet", "arrow"):
        code = _TO_LINES.format(kind="parquet" if found.kind == "parquet" else "file")
        command = shell_command(["python", "-c", code, str(path), str(path.with_suffix(".jsonl"))])
        raise BadFile(f"is {KIND_NAMES[found.kind]}, which is not a format for prompts", f"write JSON lines: {command}")
    if found.kind == "markup":
        raise BadFile(f"holds {KIND_NAMES[found.kind]}", f"extract its text, or set {_PLAIN} for one prompt per line")
    if found.lone_returns and found.kind != "json":
        raise has_lone_returns(path, found.compression)
    if format_ != "auto" and found.kind == "text":
        found = replace(found, kind=format_)
    if format_ not in ("auto", found.kind):
        why = f"holds {KIND_NAMES[found.kind]}, and job.format is {format_}"
        raise BadFile(why, f"set job.format=auto, or {_PLAIN} for one prompt per line")
    return PromptFile(path=path, written=found)


def unknown_field(name: str, known: Iterable[str], *, beside: Iterable[str]) -> str:
    """Return the error of an unknown field, with the one probably meant.

    Args:
        name: of the field.
        known: all fields there are.
        beside: the other fields of the line, which are not meant by this one.
    """
    meant = _SUGGESTIONS.get(name.lower())
    if meant is None or meant in beside:
        return f"{name}: no such field; {did_you_mean(name, known)}"
    return f"{name}: no such field; did you mean {meant}?"


def _check_header(header: list[str]) -> None:
    if not {"prompt", "messages"} & set(header):
        near = [name for name in header if _SUGGESTIONS.get(name.lower()) in ("prompt", "messages")]
        fix = f"did you mean {_SUGGESTIONS[near[0].lower()]} by {near[0]}?" if near else "rename the one that holds it"
        raise BadFile(f"its header needs a column prompt; it has {', '.join(header)}", fix)


def _fields_of(cells: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(name, cell) for name, cell in cells.items() if cell or name == "prompt"}


def _value(name: str, cell: str) -> Any:
    if name in _TEXT_COLUMNS:
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
FIELDS = ("prompt", "messages", "chat_template", "id", "model", "stop", *SAMPLING_FIELDS)
"""All that a line may say."""


class BadLine(Exception):
    """A line asks for what there is not; the message says what."""


def check_fields(record: Record) -> None:
    """Reject a line that cannot be parsed, has unknown fields or no prompt.

    These checks need no model.

    Raises:
        BadLine: says what is wrong.
    """
    if record.problem:
        raise BadLine(record.problem)
    for name in record.fields:
        if name not in FIELDS:
            raise BadLine(unknown_field(name, FIELDS, beside=record.fields))
    given = {name for name, value in record.fields.items() if value is not None}
    if ("prompt" in given) == ("messages" in given):
        raise BadLine("needs prompt or messages, and not both")
    if "chat_template" in given and "messages" not in given:
        raise BadLine("chat_template: is for messages, and this line has prompt")
