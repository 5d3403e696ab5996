"""Local files: globs, what keeps them from being text, fingerprints and reading in pieces. Standard library only."""

from __future__ import annotations

import codecs
import glob
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.data.base import Piece
from launcher.errors import ConfigError

_LOOKED_AT_BYTES = 1 << 20
_HASHED_WHOLE_BYTES = 256 << 20
_PIECE_CHARS = 1 << 16


def expand(patterns: Iterable[str], *, option: str) -> tuple[list[Path], list[ConfigError]]:
    """Return the files that names and globs stand for, each once and sorted, and an error for each that has none."""
    files: set[Path] = set()
    errors = []
    for pattern in patterns:
        full = str(Path(pattern).expanduser())
        if glob.has_magic(full) and not Path(full).exists():
            found = [Path(name) for name in glob.glob(full, recursive=True) if Path(name).is_file()]  # noqa: PTH207
            files.update(found)
            if not found:
                fix = "check the pattern; ** crosses folders, and quote it in a shell"
                errors.append(ConfigError(option, pattern, why="matches no file", fix=fix))
        elif Path(full).is_file():
            files.add(Path(full))
        elif Path(full).is_dir():
            fix = f"name its files: {option}='{pattern.rstrip('/')}/**/*.txt'"
            errors.append(ConfigError(option, pattern, why="is a folder", fix=fix))
        else:
            why = f"there is no such file (seen from {Path.cwd()})"
            errors.append(ConfigError(option, pattern, why=why, fix="check the path, or give it whole"))
    return sorted(files), errors


def text_problem(file: Path, *, option: str) -> ConfigError | None:
    """Return why ``file`` is not text, judging by its size and first mebibyte; ``None`` when it looks fine."""
    try:
        with file.open("rb") as stream:
            start = stream.read(_LOOKED_AT_BYTES)
    except OSError as error:
        return ConfigError(option, file, why=f"cannot be read: {error.strerror}", fix="check its permissions")
    if not start.strip():
        return ConfigError(option, file, why="is empty", fix="give a file with text in it")
    if b"\0" in start:
        fix = "give UTF-8 text; data=hf reads parquet, JSON and CSV"
        return ConfigError(option, file, why="is not text: it has NUL bytes", fix=fix)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < _LOOKED_AT_BYTES)
    except UnicodeDecodeError as error:
        return _not_utf8(file, option, position=error.start, byte=start[error.start])
    return None


def _not_utf8(file: Path, option: str, *, position: int, byte: int) -> ConfigError:
    why = f"is not UTF-8: byte 0x{byte:02x} at position {position}"
    fix = f"convert it: iconv -f latin1 -t utf-8 '{file}' > text.txt"
    return ConfigError(option, file, why=why, fix=fix)


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
                ends = stream.read(_LOOKED_AT_BYTES)
                stream.seek(-_LOOKED_AT_BYTES, 2)
                ends += stream.read()
                content = f"{status.st_size} {status.st_mtime_ns}".encode() + hashlib.sha256(ends).digest()
        digest.update(content)
    return digest.hexdigest()


def read_pieces(file: Path, *, option: str) -> Iterator[Piece]:
    """Yield a text file as one document, cut at line ends into pieces of about 64 thousand characters.

    Raises:
        ConfigError: a byte further in than the preflight looked is not UTF-8.
    """
    rest = ""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            while block := stream.read(_PIECE_CHARS):
                text = rest + block
                cut = text.rfind("\n") + 1 or len(text)
                yield Piece(text[:cut], ends=False)
                rest = text[cut:]
    except UnicodeDecodeError as error:
        raise _not_utf8(file, option, position=error.start, byte=error.object[error.start]) from error
    yield Piece(rest, ends=True)
