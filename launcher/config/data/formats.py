"""File formats by first bytes and ending, and how to open them.

Imports pyarrow for zstd alone.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from launcher.utils.text import shell_word

Kind = Literal["text", "jsonl", "json", "csv", "parquet", "arrow", "markup"]
Compression = Literal["", "gzip", "bz2", "xz", "zstd"]

KIND_NAMES: dict[Kind, str] = {
    "text": "plain text",
    "jsonl": "JSON lines",
    "json": "one JSON document",
    "csv": "a table (CSV)",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "markup": "HTML or XML",
}

FORMAT_OF: dict[Kind, str] = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow"}
"""Name of a format in ``data=hf``, as ``data.path``."""

LOOKED_AT_BYTES = 1 << 20
"""Bytes of the unpacked content that are checked.
Enough to detect a format, few enough for thousands of files."""
EMPTY_FILE = ("is empty", "give a file with text in it")
_ROWS_TRIED = 20
_MANY_FILES = 64
_FEWEST_BYTES = 1 << 14
_STRAY_BYTES = 8
"""More, and more than one byte in fifty, are no accident: the file is not text."""
_DELIMITERS = (",", "\t", ";", "|")
TEXT_COLUMNS = frozenset(
    ("text", "content", "prompt", "sentence", "document", "body", "message", "question", "answer", "instruction")
)
"""Names that make the first line of a file without a telling ending the header of a table."""

_ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".html": "markup",
    ".htm": "markup",
    ".xhtml": "markup",
    ".xml": "markup",
}
COMPRESSED_ENDINGS = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd")
_COMPRESSED: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_UNPACKERS: dict[Compression, str] = {"gzip": "gzip -dc", "bz2": "bzip2 -dc", "xz": "xz -dc", "zstd": "zstd -dc"}
_PICKLES = (b"\2", b"\3", b"\4", b"\5")
_BINARY = (
    (b"\x04\x22\x4d\x18", "lz4-compressed", "unpack it: lz4 -dc {file} > {unpacked}"),
    (b"PK\x03\x04", "a zip archive (or an Office document)", "unpack it: python -m zipfile -e {file} {unpacked}"),
    (b"PK\x05\x06", "an empty zip archive", "give a file with text in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it: 7z x {file}"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it: unrar x {file}"),
    (b"%PDF-", "a PDF document", "extract its text: pdftotext {file} {text}"),
    (b"{\\rtf", "an RTF document", "save it as plain text"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as plain text, or a table as CSV"),
    (b"SQLite format 3\0", "an SQLite database", "export a table: sqlite3 -csv -header {file} 'select * from TABLE'"),
    (b"\x89HDF", "HDF5", "export its rows as JSON lines or Parquet"),
    (b"Obj\x01", "Avro", "export its rows as JSON lines or Parquet"),
    (b"\x93NUMPY", "a NumPy array", "give the text itself: numbers of tokens are not read"),
    *((b"\x80" + version, "a pickle, which can run code", "export its rows as JSON lines") for version in _PICKLES),
    *((magic, "weights of a model (GGUF)", "give text") for magic in (b"GGUF\2\0", b"GGUF\3\0")),
    *((magic, "a picture", "give text") for magic in (b"\x89PNG", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")),
    (b"\x7fELF", "a program", "give text"),
)
_CONTROL_BYTES = bytes(code for code in range(32) if code not in b"\t\n\v\f\r\b\x1b")
"""Bytes that text does not hold and binary files do."""
_REPLACEMENT = "\ufffd"
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # first: UTF-16's is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class BadFile(Exception):
    """A file that the program cannot read; ``why`` and ``fix`` are the halves of one message."""

    def __init__(self, why: str, fix: str) -> None:
        self.why, self.fix = why, fix
        super().__init__(f"{why}; {fix}")


@dataclass(frozen=True, slots=True)
class FileFormat:
    """How a file is written."""

    kind: Kind
    compression: Compression = ""
    delimiter: str = ","
    """Between the cells of a table."""
    lone_returns: bool = False
    """Its lines end in a carriage return and no newline."""
    whole: bool = False
    """The part that was looked at is all there is."""


def inspect_file(
    file: Path, *, plain: str, as_text: bool = False, by_row: bool = False, look_bytes: int = LOOKED_AT_BYTES
) -> FileFormat:
    """Return how ``file`` is written, judging by its beginning and its ending.

    Args:
        file: what to look at.
        plain: the option that makes the caller accept any text, for messages.
        as_text: that option is set: any UTF-8 text is plain text.
        by_row: stray bytes that are no text are left to the reader, which refuses their rows alone.
        look_bytes: of the unpacked content that are looked at.

    Raises:
        BadFile: it is empty, damaged, or neither UTF-8 text nor a format that the program reads.
    """
    try:
        with file.open("rb") as stream:
            compression = _compression(stream.read(8))
        with open_bytes(file, compression) as stream:
            start = stream.read(look_bytes)
    except OSError as error:
        raise BadFile(f"cannot be read: {error.strerror}", "check its permissions") from error
    whole, ending = len(start) < look_bytes, _ending(file)
    columnar = _columnar(start, ending)
    if columnar and compression:
        why = f"is {KIND_NAMES[columnar]} inside {compression}"
        raise BadFile(why, f"unpack it (it is compressed inside): {_unpack(file, compression)}")
    if columnar:
        return FileFormat(columnar)
    _raise_if_binary(file, start, compression)
    text = _decoded(file, start, compression, whole=whole, by_row=by_row)
    kind = "text" if as_text else _kind_of(text, ending, whole=whole)
    if kind == "text" and ending in ("jsonl", "json", "parquet", "arrow") and not as_text:
        name = _without_compression(file).suffix
        raise BadFile(
            f"ends in {name} and holds no {KIND_NAMES[ending]}", f"correct it, or set {plain} to train on it as text"
        )
    return FileFormat(
        kind,
        compression,
        delimiter=_delimiter(text),
        lone_returns="\r" in text.strip() and "\n" not in text,
        whole=whole,
    )


def look_bytes_of_each(num_files: int) -> int:
    """Return how much of each of many files is looked at, so that all together take seconds."""
    return max(_FEWEST_BYTES, LOOKED_AT_BYTES // max(1, num_files // _MANY_FILES))


def open_bytes(file: Path, compression: Compression) -> BinaryIO:
    """Open ``file`` for reading, unpacked as it is read; damage raises :exc:`BadFile`."""
    if not compression:
        return file.open("rb")
    openers: dict[str, Callable[[Path], Any]] = {
        "gzip": gzip.GzipFile,
        "bz2": bz2.BZ2File,
        "xz": lzma.LZMAFile,
        "zstd": _open_zstd,
    }
    return io.BufferedReader(_Unpacked(file, openers[compression](file), compression), 1 << 18)


def _open_zstd(file: Path) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a compressed file; every library's damage error becomes one error."""

    def __init__(self, file: Path, inner: Any, compression: Compression) -> None:
        self._file, self._inner, self._compression = file, inner, compression

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._inner.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            tool = _UNPACKERS[self._compression].split()[0]
            fix = f"copy it again, until this ends without an error: {tool} -t {_quoted(self._file)}"
            raise BadFile(f"is damaged or cut off ({self._compression}: {error})", fix) from error
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        self._inner.close()
        super().close()


def not_utf8(
    file: Path, *, position: int, byte: int, compression: Compression, content: bytes, is_utf8: bool = False
) -> BadFile:
    """Return the error for a byte that is not UTF-8, with a command that keeps what it can.

    Args:
        file: that holds it.
        position: of the byte, in the unpacked content.
        byte: its value.
        compression: of the file.
        content: a part of the unpacked content that holds the byte.
        is_utf8: text before this part has letters beyond ASCII that are valid UTF-8.
    """
    why = f"is not UTF-8: byte 0x{byte:02x} at position {position}"
    num_control = len(content) - len(content.translate(None, _CONTROL_BYTES))
    if num_control > max(_STRAY_BYTES, len(content) // 50):
        what = "ORC" if content.startswith(b"ORC") else "a binary file"
        return BadFile(f"is {what}, not text: it {why}", "export its text, or its rows as JSON lines or Parquet")
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(content)
    num_broken, num_letters = text.count(_REPLACEMENT), sum(not letter.isascii() for letter in text)
    if is_utf8 or num_letters > 2 * num_broken:
        command = _through(file, "iconv -c -f utf-8 -t utf-8", compression)
        return BadFile(why, f"remove these bytes, since the rest is valid: {command}")
    return BadFile(why, f"convert it: {_through(file, 'iconv -f latin1 -t utf-8', compression)}")


def has_nul(file: Path, *, position: int, compression: Compression) -> BadFile:
    """Return the error for a NUL byte in text."""
    why = f"has NUL bytes, the first at position {position}"
    command = "tr -d '\\000'"
    return BadFile(why, f"remove them: {_through(file, command, compression)}")


def has_lone_returns(file: Path, compression: Compression) -> BadFile:
    """Return the error for lines that no newline ends."""
    command = "tr '\\r' '\\n'"
    why = "its lines end in a carriage return without a newline"
    return BadFile(why, f"convert it: {_through(file, command, compression)}")


def _compression(head: bytes) -> Compression:
    if head.startswith(b"BZh") and head[4:7] == b"1AY":
        return "bz2"
    if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:
        return "zstd"  # a frame that unpackers skip: seekable files begin with one
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), "")


def _columnar(start: bytes, ending: Kind) -> Kind | None:
    if start.startswith(b"PAR1"):
        return "parquet"
    is_stream = ending == "arrow" and start.startswith(b"\xff\xff\xff\xff")
    return "arrow" if is_stream or start.startswith(b"ARROW1") else None


def _raise_if_binary(file: Path, start: bytes, compression: Compression) -> None:
    if compression and (inner := _compression(start[:8])):
        target = _quoted(_unpacked_name(_unpacked_name(file)))
        fix = f"unpack both: {_UNPACKERS[compression]} {_quoted(file)} | {_UNPACKERS[inner]} > {target}"
        raise BadFile(f"is {inner} inside {compression}", fix)
    plain = _unpacked_name(file) if compression else file
    unpacked, text = _quoted(_unpacked_name(plain, any_ending=True)), _quoted(plain.with_suffix(".txt"))
    for magic, what, fix in _BINARY:
        if start.startswith(magic):
            advice, colon, command = fix.format(file=_quoted(plain), unpacked=unpacked, text=text).partition(": ")
            if compression and "{file}" in fix:
                command = f"{_unpack(file, compression)} && {command}"
            raise BadFile(f"is {what}{f' inside {compression}' if compression else ''}", f"{advice}{colon}{command}")
    if start[257:262] == b"ustar":
        raise BadFile("is a tar archive", f"unpack it: tar -xf {_quoted(file)}")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100 << 20:
        raise BadFile("holds the weights of a model (safetensors)", "give text")


def _decoded(file: Path, start: bytes, compression: Compression, *, whole: bool, by_row: bool) -> str:
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if start.startswith(mark)), _wide_encoding(start))
    if encoding:
        command = f"iconv -f {encoding} -t utf-8"
        raise BadFile(f"is {encoding.upper()}, not UTF-8", f"convert it: {_through(file, command, compression)}")
    nuls = start.count(0)
    if nuls > max(_STRAY_BYTES, len(start) // 50):
        raise BadFile(f"is not text: it has NUL bytes ({nuls:,} of {len(start):,})", "give UTF-8 text")
    decoder = codecs.getincrementaldecoder("utf-8")
    try:
        text = decoder().decode(start, final=whole)
    except UnicodeDecodeError as error:
        text = decoder("replace").decode(start, final=whole)
        if not by_row or text.count(_REPLACEMENT) > max(_STRAY_BYTES, len(text) // 50):
            at = error.start
            raise not_utf8(file, position=at, byte=start[at], compression=compression, content=start) from error
    if nuls and not by_row:
        raise has_nul(file, position=start.index(0), compression=compression)
    text = text.removeprefix("\ufeff")
    if whole and not text.strip():
        raise BadFile(*EMPTY_FILE)
    return text


def _wide_encoding(start: bytes) -> str:
    """Return the encoding of UTF-16 text without a byte order mark.

    In its ASCII characters, every other byte is NUL.
    """
    even, odd, pairs = start[:4096:2].count(0), start[1:4096:2].count(0), len(start[:4096]) // 2
    if pairs < 4 or max(even, odd) < 0.6 * pairs or min(even, odd) > 0.02 * pairs:
        return ""
    return "utf-16le" if odd > even else "utf-16be"


def _kind_of(text: str, ending: Kind, *, whole: bool) -> Kind:
    if text.lstrip().startswith(("{", "[")) and (found := _json_kind(text, ending, whole=whole)):
        return found
    if ending == "jsonl" and any(map(_is_object, _lines(text, whole=whole))):
        return "jsonl"  # whose first line is bad: reading it names the line
    if ending == "markup" or re.match(r"\s*<(!doctype|html|\?xml)\b", text[:200], re.IGNORECASE):
        return "markup"
    return "csv" if ending == "csv" or _is_table(text) else "text"


def _json_kind(text: str, ending: Kind, *, whole: bool) -> Kind | None:
    """Return the JSON kind of text that starts with a bracket; ``None`` if it is not JSON."""
    lines = _lines(text, whole=whole)
    objects = sum(map(_is_object, lines))
    if objects == len(lines) == 1 and ending == "json" and not _is_row(json.loads(lines[0])):
        return "json"
    if objects and 2 * objects >= len(lines):
        return "jsonl"
    body = text.lstrip()
    try:
        first, end = json.JSONDecoder().raw_decode(body)
    except (ValueError, RecursionError):  # cut off, or damaged
        if not re.match(r'(\[\s*)?\{\s*"(\\.|[^"\\])*"\s*:', body):
            return None
        return "jsonl" if body.startswith("{") and "\n" not in body.rstrip() else "json"
    rest = body[end:].lstrip()
    return "json" if first and (not rest or rest[0] == body[0]) else None


def _lines(text: str, *, whole: bool) -> list[str]:
    """Return the first lines that are not blank, without one that was cut off."""
    lines = [line for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    return (lines if whole else lines[:-1])[:_ROWS_TRIED]


def _is_row(found: dict[str, Any]) -> bool:
    """Return whether a file's only object is a row, not a container (``{"data": […]}``)."""
    return "messages" in found or any(isinstance(value, str) for value in found.values())


def _is_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_table(text: str) -> bool:
    """Return whether text is a table: a header of names, and rows of equal length.

    For files whose suffix does not say it.
    """
    delimiter = _delimiter(text)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header, *others = itertools.islice(filter(None, rows), _ROWS_TRIED)
    except (csv.Error, ValueError):
        return False
    names = [name.lower() for name in header]
    return (
        len(names) > 1
        and bool(TEXT_COLUMNS.intersection(names))
        and len(set(names)) == len(names)
        and all(re.fullmatch(r"[\w.-]+( [\w.-]+)?", name) for name in names)
        and len(others) > 1
        and all(len(row) == len(names) for row in others)
    )


def _delimiter(text: str) -> str:
    header = re.sub(r'"[^"]*"', "", re.split(r"[\r\n]", text, maxsplit=1)[0])
    return max(_DELIMITERS, key=header.count)


def full_ending(file: Path) -> str:
    """Return the ending of a file's name, with that of its compression (``.jsonl.gz``)."""
    plain = _without_compression(file)
    return plain.suffix + (file.suffix if plain != file else "")


def kind_of_ending(ending: str) -> Kind:
    """Return the kind of file that a suffix names; ``text`` if none."""
    return _ending(Path(f"x{ending}"))


def _ending(file: Path) -> Kind:
    return _ENDINGS.get(_without_compression(file).suffix.lower(), "text")


def _without_compression(file: Path) -> Path:
    return file.with_suffix("") if file.suffix.lower() in COMPRESSED_ENDINGS else file


def _unpacked_name(file: Path, *, any_ending: bool = False) -> Path:
    """Return the name of what a file unpacks to: never its own."""
    if any_ending and file.suffix:
        return file.with_suffix("")
    plain = _without_compression(file)
    return plain if plain != file else file.with_name(f"{file.name}.unpacked")


def _unpack(file: Path, compression: Compression) -> str:
    """Return the command line that unpacks a compressed file in its folder."""
    return f"{_UNPACKERS[compression]} {_quoted(file)} > {_quoted(_unpacked_name(file))}"


def _quoted(file: Path) -> str:
    return shell_word(str(file))


def _through(file: Path, command: str, compression: Compression) -> str:
    """Return the command line that pipes the unpacked content through ``command`` into a file."""
    plain = _without_compression(file)
    target = shell_word(str(plain.with_name(f"{plain.stem}.utf8{plain.suffix}")))
    if compression:
        return f"{_UNPACKERS[compression]} {_quoted(file)} | {command} > {target}"
    return f"{command} < {_quoted(file)} > {target}"
