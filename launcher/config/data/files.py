"""Local files: globs, fingerprints, and text in chunks."""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.config.data.base import TextChunk
from launcher.config.data.formats import (
    COMPRESSED_ENDINGS,
    EMPTY_FILE,
    FORMAT_OF,
    BadFile,
    FileFormat,
    full_ending,
    has_nul,
    kind_of_ending,
    not_utf8,
    open_bytes,
)
from launcher.config.option_text import quoted_word
from launcher.errors import ConfigError

_END_BYTES = 1 << 20
_HASHED_WHOLE_BYTES = 256 << 20
_PIECE_BYTES = 1 << 16
_MOST_FILES = 10_000
_ERRORS_SHOWN = 8


def expand(patterns: Iterable[str], *, option: str) -> tuple[list[Path], list[ConfigError]]:
    """Return the files that names and globs match, sorted, and an error per empty pattern."""
    files: set[Path] = set()
    errors = []
    for pattern in patterns:
        full = str(Path(pattern).expanduser())
        if glob.has_magic(full) and not Path(full).exists():
            found = [Path(name) for name in glob.glob(full, recursive=True) if Path(name).is_file()]  # noqa: PTH207
            files.update(found)
            if not found:
                fix = "check the pattern (** matches several folders), and quote it in a shell"
                errors.append(ConfigError(option, pattern, why="matches no file", fix=fix))
        elif Path(full).is_file():
            files.add(Path(full))
        elif Path(full).is_dir():
            errors.append(_folder_error(Path(full), pattern, option))
        else:
            why = f"there is no such file (relative to {Path.cwd()})"
            errors.append(ConfigError(option, pattern, why=why, fix="check the path, or give an absolute one"))
    return sorted(files), errors


def first_errors(errors: Iterator[ConfigError], *, option: str) -> Iterator[ConfigError]:
    """Yield the first few errors about files, and in one more how many there are besides."""
    yield from itertools.islice(errors, _ERRORS_SHOWN)
    if left := sum(1 for _ in errors):
        yield ConfigError(option, why=f"{left:,} more files are rejected", fix="correct the files above first")


def endings(folder: Path) -> Counter[str]:
    """Return the number of files by suffix in a folder, without hidden files.

    ``.jsonl.gz`` counts as one suffix.
    """
    found: Counter[str] = Counter()
    for file in itertools.islice(folder.rglob("*"), _MOST_FILES):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            found[full_ending(file)] += 1
    return found


def _folder_error(folder: Path, pattern: str, option: str) -> ConfigError:
    """Return the error for a folder in place of files, with a pattern for most of its files."""
    found = endings(folder)
    if not found:
        return ConfigError(option, pattern, why="is a folder without files", fix="give a folder with files")
    is_text = option == "data.path"
    ending = max(found, key=lambda it: (found[it], (kind_of_ending(it) == "text") == is_text, it == ".txt"))
    kind = kind_of_ending(ending)
    files = f"{pattern.rstrip('/')}/**/*{ending}"
    words = quoted_word(option, files if option == "data.path" else [files])
    if option == "data.path" and kind in FORMAT_OF:
        words = f"data=hf data.path={FORMAT_OF[kind]} {quoted_word('data.files', [files])}"
    return ConfigError(option, pattern, why="is a folder", fix=f"name its files: {words}")


def fingerprint(files: Iterable[Path]) -> str:
    """Return a hash of the files' contents, in their order.

    Of a file over 256 MiB only size, modification time and both ends count: reading it whole would take longer than
    opening its tokens.
    """
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        with file.open("rb") as stream:
            if status.st_size <= _HASHED_WHOLE_BYTES:
                content = hashlib.file_digest(stream, "sha256").digest()
            else:
                ends = stream.read(_END_BYTES)
                stream.seek(-_END_BYTES, 2)
                ends += stream.read()
                content = f"{status.st_size} {status.st_mtime_ns}".encode() + hashlib.sha256(ends).digest()
        digest.update(content)
    return digest.hexdigest()


def text_bytes(files: Iterable[Path]) -> int | None:
    """Return the bytes of some files of text; ``None`` if one is compressed."""
    found = list(files)
    if any(full_ending(file).lower().endswith(COMPRESSED_ENDINGS) for file in found):
        return None
    return sum(file.stat().st_size for file in found)


def read_pieces(file: Path, found: FileFormat) -> Iterator[TextChunk]:
    """Yield a text file as one document, in pieces of about 64 thousand characters.

    Pieces end at line ends.

    Raises:
        BadFile: a byte further in than validate_machine looked is NUL or not UTF-8, or the file is damaged or blank.
    """
    rest, position, is_empty, is_ascii = "", 0, True, True
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    with open_bytes(file, found.compression) as stream:
        while True:
            block = stream.read(_PIECE_BYTES)
            start = position - len(decoder.getstate()[0])  # of a letter whose first bytes the last block ended with
            try:
                decoded = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at, byte = start + error.start, error.object[error.start]
                content, packed = error.object, found.compression
                raise not_utf8(
                    file, position=at, byte=byte, compression=packed, content=content, is_utf8=not is_ascii
                ) from error
            if "\0" in decoded:
                raise has_nul(file, position=position + block.index(0), compression=found.compression)
            if start == 0:
                decoded = decoded.removeprefix("\ufeff")
            is_empty = is_empty and not decoded.strip()
            is_ascii = is_ascii and decoded.isascii()
            text = rest + newlines.decode(decoded, final=not block)
            position += len(block)
            if not block:
                break
            cut = text.rfind("\n") + 1 or len(text)
            if cut:
                yield TextChunk(text[:cut], ends_document=False)
            rest = text[cut:]
    if is_empty:
        raise BadFile(*EMPTY_FILE)
    yield TextChunk(text, ends_document=True)


def beginning(pieces: Iterable[TextChunk], most: int) -> list[TextChunk] | None:
    """Return all pieces of a corpus of at most ``most`` characters, ``None`` of a larger one."""
    found, left = [], most
    for piece in pieces:
        found.append(piece)
        left -= len(piece.text)
        if left < 0:
            return None
    return found
