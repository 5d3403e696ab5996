"""A file of prompts, read a line at a time: JSON lines, CSV or plain text, of any length."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

Format = Literal["jsonl", "csv", "text"]

LONGEST_LINE_BYTES = 16 * 2**20
"""A longer line is refused: a file without line breaks must not fill the memory."""

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_TEXT_COLUMNS = ("prompt", "id")
"""Of a CSV file; what stands in others is read as JSON where it is some."""


@dataclass(frozen=True, slots=True)
class Record:
    """What one line asks for, or why it cannot be read."""

    number: int
    """Its place among the lines that are not blank, from 0."""
    line: int
    """Its line in the file, from 1; where it begins, if it takes several."""
    fields: dict[str, Any]
    problem: str = ""


class BadSource(Exception):
    """The file as a whole is none of its kind."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The file, and how it is written."""

    path: Path
    format: Format

    def records(self, wanted: Callable[[int], bool]) -> Iterator[Record]:
        """Yield the records whose number is ``wanted``; blank lines are none.

        Raises:
            BadSource: a CSV file without a header that names prompts.
            OSError: it cannot be read.
        """
        with self.path.open("rb") as file:
            if self.format == "csv":
                yield from _csv(file, wanted)
            else:
                yield from _lines(file, wanted, _json_fields if self.format == "jsonl" else _text_fields)

    def count(self, *, beat: Callable[[], None]) -> int:
        """Return how many records there are."""
        found = 0

        def note(number: int) -> bool:
            nonlocal found
            found = number + 1
            if number % 4096 == 0:
                beat()
            return False

        for _ in self.records(note):
            raise AssertionError("none is wanted")
        return found

    def digest(self, *, beat: Callable[[], None] = lambda: None) -> str:
        """Return the SHA-256 of its bytes."""
        found = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                found.update(block)
                beat()
        return found.hexdigest()


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield number and bytes of each line; ``None`` for one that is too long."""
    number = 0
    while line := file.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        if len(line) > LONGEST_LINE_BYTES and not line.endswith(b"\n"):
            while (more := file.readline(_BLOCK)) and not more.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line.removeprefix(_BOM) if number == 1 else line


def _lines(
    file: BinaryIO, wanted: Callable[[int], bool], fields_of: Callable[[str], dict[str, Any]]
) -> Iterator[Record]:
    number = -1
    for line, raw in _raw_lines(file):
        if raw is not None and not raw.strip():
            continue
        number += 1
        if not wanted(number):
            continue
        if raw is None:
            yield Record(number, line, {}, f"is longer than {LONGEST_LINE_BYTES:,} bytes")
            continue
        try:
            yield Record(number, line, fields_of(raw.rstrip(b"\r\n").decode()))
        except UnicodeDecodeError as error:
            yield Record(number, line, {}, f"is not UTF-8: byte {error.start + 1}")
        except (ValueError, RecursionError) as error:
            yield Record(number, line, {}, f"is no JSON object: {error}")


def _json_fields(text: str) -> dict[str, Any]:
    found = json.loads(text, parse_constant=_no_constant)
    if not isinstance(found, dict):
        raise ValueError("it is something else")  # noqa: TRY004 (of the file, not of the program)
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _text_fields(text: str) -> dict[str, Any]:
    return {"prompt": text}


def _csv(file: BinaryIO, wanted: Callable[[int], bool]) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_LINE_BYTES)
    rows = csv.reader(_decoded(file), strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise BadSource(f"its header cannot be read: {error}") from error
    if len(set(header)) < len(header) or not {"prompt", "messages"} & set(header):
        raise BadSource(f"its header needs a column prompt, each column once; it has {', '.join(header) or 'none'}")
    number = -1
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            number += 1
            if wanted(number):
                yield Record(number, line, {}, f"is no CSV: {error}")
            continue
        if row is None:
            return
        if row:
            number += 1
            if wanted(number):
                yield _record(number, line, header, row)


def _decoded(file: BinaryIO) -> Iterator[str]:
    """Yield lines as text; bytes that are not UTF-8 stay visible, so that only their row is refused."""
    for _, raw in _raw_lines(file):
        yield "\udcff\n" if raw is None else raw.decode(errors="surrogateescape")


def _record(number: int, line: int, header: list[str], row: list[str]) -> Record:
    if len(row) != len(header):
        return Record(number, line, {}, f"has {len(row)} cells, and the header names {len(header)} columns")
    if any("\udc80" <= character <= "\udcff" for cell in row for character in cell):
        return Record(number, line, {}, f"is not UTF-8, or longer than {LONGEST_LINE_BYTES:,} bytes")
    cells = zip(header, row, strict=True)
    return Record(number, line, {name: _value(name, cell) for name, cell in cells if cell or name == "prompt"})


def _value(name: str, cell: str) -> Any:
    if name in _TEXT_COLUMNS:
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell
