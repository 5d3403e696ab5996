"""Rows of a local file, one at a time: JSON, CSV, Parquet, Arrow, or a line of text each."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from launcher.config.data.formats import (
    KIND_NAMES,
    LOOKED_AT_BYTES,
    TEXT_COLUMNS,
    BadFile,
    Compression,
    FileFormat,
    has_lone_returns,
    has_nul,
    not_utf8,
    open_bytes,
)
from launcher.utils.text import shell_word

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_ROWS_AT_ONCE = 1024
_AROUND_BYTES = 1 << 16
"""Bytes around an invalid byte, from which the remedy is chosen."""
_READ_WHOLE = {
    "parquet": "import pyarrow.parquet, sys; pyarrow.parquet.read_table(sys.argv[1])",
    "arrow": (
        'import pyarrow as pa, sys; f = pa.memory_map(sys.argv[1]); is_file = f.read(6) == b"ARROW1"; f.seek(0); '
        "(pa.ipc.open_file if is_file else pa.ipc.open_stream)(f).read_all()"
    ),
}
"""Programs that end with an error if a file is damaged."""


@dataclass(frozen=True, slots=True)
class Record:
    """Content of one row, or why it cannot be read."""

    number: int
    """Its place among the rows, from 0; blank lines are none."""
    line: int
    """Line in the file, from 1; the first one of a row of several lines.
    In a file without lines, the row's number from 1."""
    fields: dict[str, Any]
    problem: str = ""
    fix: str = ""
    """The command that repairs the whole file, if there is one."""


def _every(number: int) -> bool:
    return True


def read_rows(
    file: Path,
    found: FileFormat,
    wanted: Callable[[int], bool] = _every,
    *,
    longest_line: int,
    text_field: str = "text",
    columns: Sequence[str] | None = None,
    takes_nan: bool = True,
) -> Iterator[Record]:
    """Yield the rows whose number is ``wanted``; cells of a table are text.

    Args:
        file: what to read.
        found: how it is written.
        wanted: takes the number of a row; others are passed over without being parsed.
        longest_line: bytes; a longer line is a bad row, so that a file without line ends does not fill the memory.
        text_field: name of the field for text: of lines of text, and of texts in a JSON list.
        columns: those to read as far as the file has them, where the format stores columns apart; ``None`` reads all.
        takes_nan: take NaN and Infinity for numbers, as Python writes them, though JSON has none.

    Raises:
        BadFile: the file as a whole holds no rows, or is damaged.
        OSError: it cannot be read.
    """
    if found.kind in ("parquet", "arrow"):
        yield from _columnar_rows(file, found, wanted, columns)
        return
    loads = json.loads if takes_nan else _loads_strictly
    if found.lone_returns and found.kind in ("jsonl", "csv", "text"):
        raise has_lone_returns(file, found.compression)
    with open_bytes(file, found.compression) as stream:
        if found.kind == "csv":
            yield from _table_rows(_Decoded(stream, longest_line, file, found), found.delimiter, wanted)
        elif found.kind == "jsonl":
            yield from _lines(_Decoded(stream, longest_line, file, found), wanted, lambda text: _object(loads(text)))
        elif found.kind == "json":
            yield from _list_items(file, stream, found.compression, wanted, text_field, loads)
        elif found.kind == "text":
            yield from _lines(_Decoded(stream, longest_line, file, found), wanted, lambda text: {text_field: text})
        else:
            raise BadFile(f"holds {KIND_NAMES[found.kind]}, which has no rows", "give JSON lines, CSV or Parquet")


@dataclass(frozen=True, slots=True)
class FirstRows:
    """The first rows of a file."""

    columns: tuple[str, ...]
    text_columns: tuple[str, ...]
    """Those that hold text, as far as one can see; first the one that is most likely meant."""
    records: tuple[Record, ...] = ()
    """Rows that were read; none of Parquet and Arrow, whose columns have a type."""
    is_empty: bool = False
    """The file has no rows."""


def first_rows(file: Path, found: FileFormat, *, longest_line: int) -> FirstRows:
    """Return the columns of a file, from its header or its first mebibyte.

    Raises:
        BadFile: it holds no rows, or is damaged.
        OSError: it cannot be read.
    """
    if found.kind in ("parquet", "arrow"):
        return _first_of_schema(file, found)
    names = dict.fromkeys(table_header(file, found, longest_line=longest_line)) if found.kind == "csv" else {}
    records, left = [], LOOKED_AT_BYTES
    whole = found.whole or found.kind != "json"
    for record in read_rows(file, found, longest_line=longest_line) if whole else _first_items(file, found):
        records.append(record)
        names |= dict.fromkeys(record.fields)
        left -= sum(len(value) if isinstance(value, str) else 8 for value in record.fields.values())
        if left < 0 or len(records) == _ROWS_AT_ONCE:
            break
    chars: Counter[str] = Counter()
    for record in records:
        chars.update({name: len(value) for name, value in record.fields.items() if isinstance(value, str)})
    text = sorted(chars, key=lambda name: (name.lower() not in TEXT_COLUMNS, -chars[name]))
    return FirstRows(tuple(names), tuple(text), tuple(records), is_empty=not records)


def count_rows(file: Path, found: FileFormat, *, longest_line: int) -> int:
    """Return how many rows a file holds, as ``datasets`` counts them.

    Of text these are all lines, the blank ones too.

    Raises:
        BadFile: the file as a whole holds no rows, or is damaged.
        OSError: it cannot be read.
    """
    if found.kind == "parquet":
        import pyarrow.parquet

        with _damage_is_bad_file(file, found):
            return int(pyarrow.parquet.read_metadata(file).num_rows)
    if found.kind == "text":
        with io.TextIOWrapper(open_bytes(file, found.compression), encoding="utf-8", errors="replace") as lines:
            return sum(1 for _ in lines)
    last = -1

    def count(number: int) -> bool:
        nonlocal last
        last = number
        return False

    for _ in read_rows(file, found, count, longest_line=longest_line):
        pass  # none is wanted
    return last + 1


def _first_items(file: Path, found: FileFormat) -> Iterator[Record]:
    """Yield the first items of a JSON list that is too long to be read before anything starts."""
    with open_bytes(file, found.compression) as stream:
        text = stream.read(LOOKED_AT_BYTES).decode("utf-8-sig", errors="ignore").lstrip()
    if not text.startswith("["):
        raise BadFile("holds one JSON object and no list of rows", "write its rows as JSON lines")
    at = 1
    for number in itertools.count():
        while text[at : at + 1] in tuple(" \t\r\n,"):
            at += 1
        try:
            item, at = json.JSONDecoder().raw_decode(text, at)
        except ValueError:
            return  # the end of what was read
        yield _item(number, item, "text")


def _first_of_schema(file: Path, found: FileFormat) -> FirstRows:
    import pyarrow as pa
    import pyarrow.parquet

    with _damage_is_bad_file(file, found), pa.memory_map(str(file)) as source:
        if found.kind == "parquet":
            parquet = pyarrow.parquet.ParquetFile(source)
            schema, is_empty = parquet.schema_arrow, not parquet.metadata.num_rows
        else:
            schema, is_empty = _open_ipc(source).schema, False
        text = [field.name for field in schema if _is_text(field.type)]
        text.sort(key=lambda name: name.lower() not in TEXT_COLUMNS)
    return FirstRows(tuple(schema.names), tuple(text), is_empty=is_empty)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held))


def table_header(file: Path, found: FileFormat, *, longest_line: int) -> list[str]:
    """Return the names of a table's columns.

    Raises:
        BadFile: its first row names none, or one twice.
    """
    if found.lone_returns:
        raise has_lone_returns(file, found.compression)
    with open_bytes(file, found.compression) as stream:
        decoded = _Decoded(stream, longest_line, file, found)
        return _header(csv.reader(decoded, delimiter=found.delimiter, strict=True))


class _damage_is_bad_file:  # noqa: N801 (a context manager reads as a phrase)
    def __init__(self, file: Path, found: FileFormat) -> None:
        self._file, self._kind = file, found.kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        import pyarrow as pa

        if isinstance(error, pa.ArrowException | OSError):
            first = str(error).strip().split("\n")[0]
            command = f"python -c {shell_word(_READ_WHOLE[self._kind])} {shell_word(str(self._file))}"
            fix = f"copy it again, until this ends without an error: {command}"
            raise BadFile(f"is damaged or cut off ({KIND_NAMES[self._kind]}: {first})", fix) from error


def _object(found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"it is {json_type(found)}")  # noqa: TRY004 (of the file, not of the program)
    return found


def _loads_strictly(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def json_type(value: object) -> str:
    """Return the JSON name of a value's type, with its article."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    names = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _raw_lines(stream: BinaryIO, longest: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield number, position and bytes of each line; ``None`` for one that is too long."""
    position = 0
    for number in itertools.count(1):
        start, line = position, stream.readline(longest + 1)
        if not line:
            return
        position += len(line)
        if len(line) > longest and not line.endswith(b"\n"):
            while more := stream.readline(_BLOCK):
                position += len(more)
                if more.endswith(b"\n"):
                    break
            yield number, start, None
        elif number == 1 and line.startswith(_BOM):
            yield number, len(_BOM), line.removeprefix(_BOM)
        else:
            yield number, start, line


class _Decoded:
    """Lines decoded as text; invalid bytes stay visible, so only their row is rejected."""

    def __init__(self, stream: BinaryIO, longest: int, file: Path, found: FileFormat) -> None:
        self._lines, self._file, self._compression = _raw_lines(stream, longest), file, found.compression
        self._is_ascii = True
        self.longest = longest
        """Bytes of a line; a longer one is a bad row."""
        self.problem = self.fix = ""
        """The error of the last invalid line, and the command that repairs the file."""

    def __iter__(self) -> Iterator[str]:
        for _, position, raw in self._lines:
            yield self._as_long_line() if raw is None else self._decoded(raw, position)

    def texts(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, int, str | None]]:
        """Yield each wanted line that is not blank: its index, its line number and its text.

        The text of one with a problem is ``None``.
        """
        number = -1
        for line, position, raw in self._lines:
            if raw is not None and not raw.strip():
                continue
            number += 1
            if not wanted(number):
                continue
            self.problem = self.fix = ""
            text = self._as_long_line() if raw is None else self._decoded(raw, position).rstrip("\r\n")
            yield number, line, None if self.problem else text

    def _as_long_line(self) -> str:
        self.problem, self.fix = f"is longer than {self.longest:,} bytes", ""
        return "\udcff\n"

    def _decoded(self, raw: bytes, position: int) -> str:
        packed = self._compression
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            at, is_utf8 = position + error.start, not self._is_ascii
            bad = not_utf8(
                self._file, position=at, byte=raw[error.start], compression=packed, content=raw, is_utf8=is_utf8
            )
            self.problem, self.fix = bad.why, bad.fix
            return raw.decode(errors="surrogateescape")
        self._is_ascii = self._is_ascii and text.isascii()
        if "\0" in text:
            at = position + raw.index(0)
            self.problem = f"has a NUL byte at position {at}"
            self.fix = has_nul(self._file, position=at, compression=packed).fix
        return text


def _lines(
    decoded: _Decoded, wanted: Callable[[int], bool], fields_of: Callable[[str], dict[str, Any]]
) -> Iterator[Record]:
    for number, line, text in decoded.texts(wanted):
        if text is None:
            yield Record(number, line, {}, decoded.problem, decoded.fix)
            continue
        try:
            yield Record(number, line, fields_of(text))
        except (ValueError, RecursionError) as error:
            yield Record(number, line, {}, f"is not a JSON object: {error}")


def _list_items(
    file: Path,
    stream: BinaryIO,
    compression: Compression,
    wanted: Callable[[int], bool],
    text_field: str,
    loads: Callable[[str], Any],
) -> Iterator[Record]:
    raw = stream.read()
    content = raw.removeprefix(_BOM)
    try:
        found = loads(content.decode())
    except UnicodeDecodeError as error:
        raise not_utf8(
            file,
            position=len(raw) - len(content) + error.start,
            byte=content[error.start],
            compression=compression,
            content=content[max(0, error.start - _AROUND_BYTES) : error.start + _AROUND_BYTES],
            is_utf8=not content[: error.start].isascii(),
        ) from error
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data") and content.lstrip().startswith(b"["):
            raise BadFile("holds several JSON lists, and a row is an object", "write one object per line") from error
        if str(error).startswith("Extra data"):
            fix = f"write each in one line: jq -c . {shell_word(str(file))} > {_as_lines(file)}"
            raise BadFile("holds several JSON documents, none of them in one line", fix) from error
        raise BadFile(f"is damaged JSON: {error}", "correct it") from error
    if not isinstance(found, list):
        raise BadFile("holds one JSON object and no list of rows", _rows_of_object(file, found))
    for number, item in enumerate(found):
        if wanted(number):
            yield _item(number, item, text_field)


def _item(number: int, item: object, text_field: str) -> Record:
    if isinstance(item, dict | str):
        return Record(number, number + 1, item if isinstance(item, dict) else {text_field: item})
    return Record(number, number + 1, {}, f"is not a JSON object: it is {json_type(item)}")


def _rows_of_object(file: Path, found: object) -> str:
    """Return how to write an object's rows as JSON lines, as a command where one can do it."""
    values = found if isinstance(found, dict) and not _is_row(found) else {}
    tables = [key for key, value in values.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    name, target = shell_word(str(file)), _as_lines(file)
    if tables:
        code = f"import json, sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1]))[{tables[0]!r}]]"
        return f"write rows: python -c {shell_word(code)} {name} > {target}"
    held = list(found.values()) if isinstance(found, dict) else []
    rows = ""
    if held and all(isinstance(value, list) and len(value) == len(held[0]) and _is_plain(value) for value in held):
        rows = "dict(zip(found, row)) for row in zip(*found.values())"
    elif held and all(isinstance(value, dict) for value in held):
        rows = "row for row in found.values()"
    elif held and all(isinstance(value, str | int | float | list | dict) for value in held) and _is_row(found):
        rows = "found for _ in range(1)"
    if not rows:
        return "write its rows as JSON lines, an object each"
    code = f"import json, sys; found = json.load(open(sys.argv[1])); [print(json.dumps(row)) for row in ({rows})]"
    return f"write rows: python -c {shell_word(code)} {name} > {target}"


def _is_plain(values: list[object]) -> bool:
    """Return whether a list holds no messages, but the values of a column."""
    return not any(isinstance(value, dict) for value in values)


def _is_row(found: object) -> bool:
    """Return whether an object is one row of a known shape."""
    return isinstance(found, dict) and bool(
        {"text", "prompt", "messages", "conversations", "instruction"} & found.keys()
    )


def _as_lines(file: Path) -> str:
    return shell_word(str(file.with_name(f"{file.name.split('.')[0]}.rows.jsonl")))


def _table_rows(decoded: _Decoded, delimiter: str, wanted: Callable[[int], bool]) -> Iterator[Record]:
    csv.field_size_limit(decoded.longest)
    rows = csv.reader(decoded, delimiter=delimiter, strict=True)
    header = _header(rows)
    number = -1
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            number += 1
            if wanted(number):
                yield Record(number, line, {}, f"is not CSV: {error}")
            continue
        if row is None:
            return
        if row:
            number += 1
            if wanted(number):
                yield _table_record(number, line, header, row, decoded)


def _header(rows: Any) -> list[str]:
    try:
        header: list[str] = next(rows, [])
    except csv.Error as error:
        raise BadFile(f"its header cannot be read: {error}", "correct its first line") from error
    twice = next((name for at, name in enumerate(header) if name in header[:at]), None)
    if twice is not None or not header:
        why = f"its header names {twice!r} twice" if header else "it has no header"
        raise BadFile(why, "give each column a name of its own in the first line")
    return header


def _table_record(number: int, line: int, header: list[str], row: list[str], decoded: _Decoded) -> Record:
    if any("\udc80" <= character <= "\udcff" for cell in row for character in cell if not cell.isascii()):
        return Record(number, line, {}, decoded.problem, decoded.fix)
    if len(row) != len(header):
        return Record(number, line, {}, f"has {len(row)} cells, and the header names {len(header)} columns")
    if any("\0" in cell for cell in row):
        return Record(number, line, {}, decoded.problem, decoded.fix)
    return Record(number, line, dict(zip(header, row, strict=True)))


def _columnar_rows(
    file: Path, found: FileFormat, wanted: Callable[[int], bool], columns: Sequence[str] | None
) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet

    number = 0
    with _damage_is_bad_file(file, found), pa.memory_map(str(file)) as source:
        if found.kind == "parquet":
            names = None if columns is None else list(columns)
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=_ROWS_AT_ONCE, columns=names)
        else:
            batches = _ipc_batches(_open_ipc(source))
        for batch in batches:
            chosen = (
                batch if columns is None else batch.select([name for name in columns if name in batch.schema.names])
            )
            for row, problem in _rows_of(chosen):
                if wanted(number):
                    yield Record(number, number + 1, row, problem)
                number += 1


def _rows_of(batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each row of a batch, with its error.

    Text in it need not be UTF-8.
    """
    try:
        yield from ((row, "") for row in batch.to_pylist())
    except UnicodeDecodeError:
        for at in range(batch.num_rows):
            try:
                yield batch.slice(at, 1).to_pylist()[0], ""
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                yield {}, f"is not UTF-8: byte 0x{byte:02x} at position {error.start} of its text"


def _open_ipc(source: Any) -> Any:
    import pyarrow as pa

    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)


def _ipc_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        for index in range(reader.num_record_batches):
            for start in range(0, (batch := reader.get_batch(index)).num_rows, _ROWS_AT_ONCE):
                yield batch.slice(start, _ROWS_AT_ONCE)
    else:
        for batch in reader:
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield batch.slice(start, _ROWS_AT_ONCE)
