"""Rows of a local file, one at a time: JSON, CSV, Parquet, Arrow, or a line of text each."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from launcher.config.data.formats import (
    KIND_NAMES,
    LOOKED_AT_BYTES,
    TEXT_COLUMNS,
    BadFile,
    FileFormat,
    has_lone_returns,
    open_bytes,
)
from launcher.utils.text import shell_word

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Record:
    """What one row holds, or why it cannot be read."""

    number: int
    """Its place among the rows, from 0; blank lines are none."""
    line: int
    """Its line in the file, from 1; where it begins, if it takes several. Without lines, its place from 1."""
    fields: dict[str, Any]
    problem: str = ""


def _every(number: int) -> bool:
    return True


def read_rows(
    file: Path,
    found: FileFormat,
    wanted: Callable[[int], bool] = _every,
    *,
    longest_line: int,
    text_field: str = "text",
    column: str | None = None,
    takes_nan: bool = True,
) -> Iterator[Record]:
    """Yield the rows whose number is ``wanted``; cells of a table are text.

    Args:
        file: what to read.
        found: how it is written.
        wanted: takes the number of a row; others are passed over without being parsed.
        longest_line: bytes; a longer line is a bad row, so that a file without line ends does not fill the memory.
        text_field: name of the field for text: of lines of text, and of texts in a JSON list.
        column: the only one to read, where the format stores columns apart.
        takes_nan: take NaN and Infinity for numbers, as Python writes them, though JSON has none.

    Raises:
        BadFile: the file as a whole holds no rows, or is damaged.
        OSError: it cannot be read.
    """
    if found.kind in ("parquet", "arrow"):
        yield from _columnar_rows(file, found, wanted, column)
        return
    loads = json.loads if takes_nan else _loads_strictly
    if found.lone_returns and found.kind in ("jsonl", "csv", "text"):
        raise has_lone_returns(file, found.compression)
    with open_bytes(file, found.compression) as stream:
        if found.kind == "csv":
            yield from _table_rows(stream, found.delimiter, wanted, longest_line)
        elif found.kind == "jsonl":
            yield from _lines(stream, wanted, longest_line, lambda text: _object(loads(text)))
        elif found.kind == "json":
            yield from _list_items(file, stream, wanted, text_field, loads)
        elif found.kind == "text":
            yield from _lines(stream, wanted, longest_line, lambda text: {text_field: text})
        else:
            raise BadFile(f"holds {KIND_NAMES[found.kind]}, which has no rows", "give JSON lines, CSV or Parquet")


@dataclass(frozen=True, slots=True)
class FirstRows:
    """What the beginning of a file of rows shows."""

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

    with _damage_is_bad_file(found), pa.memory_map(str(file)) as source:
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
        return _header(csv.reader(_Decoded(stream, longest_line), delimiter=found.delimiter, strict=True))


class _damage_is_bad_file:  # noqa: N801 (a context manager reads as a phrase)
    def __init__(self, found: FileFormat) -> None:
        self._name = KIND_NAMES[found.kind]

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        import pyarrow as pa

        if isinstance(error, pa.ArrowException | OSError):
            first = str(error).strip().split("\n")[0]
            raise BadFile(f"is damaged or cut off ({self._name}: {first})", "copy it again") from error


def _object(found: object) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"it is {json_type(found)}")  # noqa: TRY004 (of the file, not of the program)
    return found


def _loads_strictly(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant)


def json_type(value: object) -> str:
    """Return what a value is called in JSON, with its article."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a truth value"
    names = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


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


def _lines(
    stream: BinaryIO, wanted: Callable[[int], bool], longest: int, fields_of: Callable[[str], dict[str, Any]]
) -> Iterator[Record]:
    number = -1
    for line, position, raw in _raw_lines(stream, longest):
        if raw is not None and not raw.strip():
            continue
        number += 1
        if not wanted(number):
            continue
        if raw is None:
            yield Record(number, line, {}, f"is longer than {longest:,} bytes")
            continue
        try:
            text = raw.rstrip(b"\r\n").decode()
            if "\0" in text:
                yield Record(number, line, {}, f"has a NUL byte at position {position + raw.index(0)}")
            else:
                yield Record(number, line, fields_of(text))
        except UnicodeDecodeError as error:
            yield Record(number, line, {}, _not_utf8(raw, position, error))
        except (ValueError, RecursionError) as error:
            yield Record(number, line, {}, f"is no JSON object: {error}")


def _not_utf8(raw: bytes, position: int, error: UnicodeDecodeError) -> str:
    return f"is not UTF-8: byte 0x{raw[error.start]:02x} at position {position + error.start}"


def _list_items(
    file: Path, stream: BinaryIO, wanted: Callable[[int], bool], text_field: str, loads: Callable[[str], Any]
) -> Iterator[Record]:
    content = stream.read().removeprefix(_BOM)
    try:
        found = loads(content.decode())
    except UnicodeDecodeError as error:
        raise BadFile(_not_utf8(content, 0, error), "convert it to UTF-8") from error
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data") and content.lstrip().startswith(b"["):
            raise BadFile("holds several JSON lists, and a row is an object", "write one object a line") from error
        if str(error).startswith("Extra data"):
            fix = f"write each in one line: jq -c . {shell_word(str(file))} > {_as_lines(file)}"
            raise BadFile("holds several JSON documents, none of them in one line", fix) from error
        raise BadFile(f"is damaged JSON: {error}", "mend it") from error
    if not isinstance(found, list):
        raise BadFile("holds one JSON object and no list of rows", f"write rows: {_rows_of_object(file, found)}")
    for number, item in enumerate(found):
        if wanted(number):
            yield _item(number, item, text_field)


def _item(number: int, item: object, text_field: str) -> Record:
    if isinstance(item, dict | str):
        return Record(number, number + 1, item if isinstance(item, dict) else {text_field: item})
    return Record(number, number + 1, {}, f"is no JSON object: it is {json_type(item)}")


def _rows_of_object(file: Path, found: object) -> str:
    """Return the command that writes the rows that an object holds as JSON lines."""
    values = found if isinstance(found, dict) and not {"prompt", "messages"} & found.keys() else {}
    tables = [key for key, value in values.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    name, target = shell_word(str(file)), _as_lines(file)
    if tables:
        code = f"import json, sys; [print(json.dumps(row)) for row in json.load(open(sys.argv[1]))[{tables[0]!r}]]"
        return f"python -c {shell_word(code)} {name} > {target}"
    if values and all(isinstance(value, list) for value in values.values()):
        code = "import pandas, sys; pandas.read_json(sys.argv[1]).to_json(sys.stdout, orient='records', lines=True)"
        return f"python -c {shell_word(code)} {name} > {target}"
    code = "import json, sys; print(json.dumps(json.load(open(sys.argv[1]))))"
    return f"python -c {shell_word(code)} {name} > {target}"


def _as_lines(file: Path) -> str:
    return shell_word(str(file.with_name(f"{file.name.split('.')[0]}.rows.jsonl")))


class _Decoded:
    """Lines of a table as text; bytes that are not UTF-8 stay visible, so that only their row is refused."""

    def __init__(self, stream: BinaryIO, longest: int) -> None:
        self._lines, self._longest = _raw_lines(stream, longest), longest
        self.problem = ""
        """What is wrong with the last line that had something wrong."""

    def __iter__(self) -> Iterator[str]:
        for _, position, raw in self._lines:
            if raw is None:
                self.problem = f"is longer than {self._longest:,} bytes"
                yield "\udcff\n"
                continue
            try:
                yield raw.decode()
            except UnicodeDecodeError as error:
                self.problem = _not_utf8(raw, position, error)
                yield raw.decode(errors="surrogateescape")


def _table_rows(stream: BinaryIO, delimiter: str, wanted: Callable[[int], bool], longest: int) -> Iterator[Record]:
    decoded = _Decoded(stream, longest)
    csv.field_size_limit(longest)
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
                yield Record(number, line, {}, f"is no CSV: {error}")
            continue
        if row is None:
            return
        if row:
            number += 1
            if wanted(number):
                yield _table_record(number, line, header, row, decoded.problem)


def _header(rows: Any) -> list[str]:
    try:
        header: list[str] = next(rows, [])
    except csv.Error as error:
        raise BadFile(f"its header cannot be read: {error}", "mend its first line") from error
    twice = next((name for at, name in enumerate(header) if name in header[:at]), None)
    if twice is not None or not header:
        why = f"its header names {twice!r} twice" if header else "it has no header"
        raise BadFile(why, "give each column a name of its own in the first line")
    return header


def _table_record(number: int, line: int, header: list[str], row: list[str], problem: str) -> Record:
    if any("\udc80" <= character <= "\udcff" for cell in row for character in cell if not cell.isascii()):
        return Record(number, line, {}, problem)
    if len(row) != len(header):
        return Record(number, line, {}, f"has {len(row)} cells, and the header names {len(header)} columns")
    if any("\0" in cell for cell in row):
        return Record(number, line, {}, "has a NUL byte")
    return Record(number, line, dict(zip(header, row, strict=True)))


def _columnar_rows(
    file: Path, found: FileFormat, wanted: Callable[[int], bool], column: str | None
) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet

    number = 0
    with _damage_is_bad_file(found), pa.memory_map(str(file)) as source:
        if found.kind == "parquet":
            columns = None if column is None else [column]
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns)
        else:
            batches = _ipc_batches(_open_ipc(source))
        for batch in batches:
            for row, problem in _rows_of(batch if column is None else batch.select([column])):
                if wanted(number):
                    yield Record(number, number + 1, row, problem)
                number += 1


def _rows_of(batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each row of a batch, with what is wrong with it: text in it need not be UTF-8."""
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
