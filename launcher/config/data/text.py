"""Text files as training data."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from launcher.config.data import files
from launcher.config.data.base import SMALL_CHARS, Corpus, TextChunk
from launcher.config.data.formats import (
    KIND_NAMES,
    LOOKED_AT_BYTES,
    BadFile,
    FileFormat,
    Kind,
    inspect_file,
    look_bytes_of_each,
)
from launcher.config.data.hf import COLUMNAR, HfData, rows_command
from launcher.config.paths import PathText
from launcher.errors import ConfigError
from launcher.utils.schema import defaults

PYTHON_DOCS = "python-docs"
_AS_IT_STANDS = ", or data.format=text to train on it as it is"


@dataclass(frozen=True, kw_only=True)
class Text(Corpus):
    """Text files, or Python's own documentation, which every CPython carries."""

    kind: ClassVar[str] = "text"
    summary_fields: ClassVar[tuple[str, ...]] = ("path", "tokenizer")

    path: tuple[PathText, ...] | PathText = PYTHON_DOCS
    """Files or globs, one document per file; gzip, bz2, xz and zstd are unpacked.
    ``python-docs`` is ``pydoc_data.topics``, 465 kB of English."""

    format: Literal["auto", "text"] = "auto"
    """``auto`` rejects rows and markup (JSON, CSV, HTML); ``text`` takes any UTF-8 text.
    ``auto`` decides by content and suffix."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject an empty list of files besides what every corpus refuses."""
        yield from super().validate()
        if not self.path:
            yield ConfigError("data.path", "[]", why="names no file", fix=f"set data.path={PYTHON_DOCS}")

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield every file that is missing, empty or not text."""
        yield from super().validate_machine()
        if self.path == PYTHON_DOCS:
            yield from validate_python_docs(PYTHON_DOCS)
            return
        found, errors = self._files()
        yield from errors
        yield from files.first_errors(self._validate_files(found), option="data.path")

    def _validate_files(self, found: Sequence[Path]) -> Iterator[ConfigError]:
        """Yield files that cannot be read or are not plain text, grouped by format."""
        others: dict[Kind, list[Path]] = {}
        look_bytes = look_bytes_of_each(len(found))
        for file in found:
            try:
                kind = self._inspect(file, look_bytes=look_bytes).kind
            except BadFile as bad:
                yield ConfigError("data.path", file, why=bad.why, fix=bad.fix)
                continue
            if kind != "text":
                others.setdefault(kind, []).append(file)
        given = [self.path] if isinstance(self.path, str) else list(self.path)
        for kind, files_of_kind in others.items():
            names = given if len(files_of_kind) == len(found) else list(map(str, files_of_kind))
            yield self._kind_error(kind, files_of_kind, names)

    def _kind_error(self, kind: Kind, files_of_kind: Sequence[Path], names: list[str]) -> ConfigError:
        first = files_of_kind[0]
        why = f"holds {KIND_NAMES[kind]}, not plain text"
        if len(files_of_kind) > 1:
            why += f", and so do {len(files_of_kind) - 1:,} more"
        if kind == "markup":
            fix = "extract its text, or set data.format=text to train on the tags too"
            return ConfigError("data.path", first, why=why, fix=fix)
        try:
            fix = f"set {rows_command(first, self._inspect(first), names)}"
            if self.vocab_size != defaults(HfData)["vocab_size"]:
                fix += f" data.vocab_size={self.vocab_size}"
        except BadFile as bad:
            fix = bad.fix + ("" if kind in COLUMNAR else _AS_IT_STANDS)
            return ConfigError("data.path", first, why=bad.why, fix=fix)
        return ConfigError("data.path", first, why=why, fix=fix + ("" if kind in COLUMNAR else _AS_IT_STANDS))

    def _inspect(self, file: Path, *, look_bytes: int = LOOKED_AT_BYTES) -> FileFormat:
        return inspect_file(file, plain="data.format=text", as_text=self.format == "text", look_bytes=look_bytes)

    def fingerprint(self) -> str:
        """Return a hash of the contents."""
        if self.path == PYTHON_DOCS:
            return hashlib.sha256("\0".join(python_docs()).encode()).hexdigest()
        return files.fingerprint(self._files()[0])

    def local_pieces(self) -> Iterator[TextChunk]:
        """Yield Python's topics by name, or the files by path."""
        if self.path == PYTHON_DOCS:
            yield from (TextChunk(text, ends_document=True) for text in python_docs())
            return
        for file in self._files()[0]:
            try:
                found = self._inspect(file)
                if found.kind != "text" and self.format == "auto":
                    raise self._kind_error(found.kind, [file], [str(file)])
                yield from files.read_pieces(file, found)
            except BadFile as bad:
                raise ConfigError("data.path", file, why=bad.why, fix=bad.fix) from bad

    def small_pieces(self, most: int = SMALL_CHARS) -> list[TextChunk] | None:
        """Return the whole text of a small corpus."""
        if self.path == PYTHON_DOCS:
            return files.beginning(self.local_pieces(), most) if most > SMALL_CHARS else None
        found = self._files()[0]
        if not found or sum(file.stat().st_size for file in found) > most:
            return None
        return files.beginning(self.local_pieces(), most)

    @property
    def text_bytes(self) -> int | None:
        """Bytes of the files; ``None`` of built-in text, and of compressed files."""
        return None if self.path == PYTHON_DOCS else files.text_bytes(self._files()[0])

    def _files(self) -> tuple[list[Path], list[ConfigError]]:
        return files.expand([self.path] if isinstance(self.path, str) else self.path, option="data.path")


def validate_python_docs(value: str) -> Iterator[ConfigError]:
    """Yield why Python's documentation is not here."""
    if importlib.util.find_spec("pydoc_data") is None:
        fix = "install Python's standard library whole, or set data.path to text files"
        yield ConfigError("data.path", value, why="this Python lacks the module pydoc_data", fix=fix)


def python_docs() -> list[str]:
    """Return the topics of Python's documentation, by name."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
