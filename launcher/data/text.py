"""Plain text files."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launcher.data import files
from launcher.data.base import Corpus, Piece
from launcher.errors import ConfigError

_PYTHON_DOCS = "python-docs"


@dataclass(frozen=True, kw_only=True)
class Text(Corpus):
    """Text files, or Python's own documentation, which every CPython carries."""

    kind: ClassVar[str] = "text"
    headline: ClassVar[tuple[str, ...]] = ("path", "tokenizer", "vocab_size")

    path: tuple[str, ...] | str = _PYTHON_DOCS
    """Files or globs, one document a file; ``python-docs`` is ``pydoc_data.topics``, 465 kB of English."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse an empty list of files besides what every corpus refuses."""
        yield from super().problems()
        if not self.path:
            yield ConfigError("data.path", "[]", why="names no file", fix=f"set data.path={_PYTHON_DOCS}")

    def preflight(self) -> Iterator[ConfigError]:
        """Yield every file that is missing, empty or not text."""
        yield from super().preflight()
        if self.path == _PYTHON_DOCS:
            if importlib.util.find_spec("pydoc_data") is None:
                fix = "install Python's standard library whole, or set data.path to text files"
                yield self.refuse("path", "this Python lacks the module pydoc_data", fix)
            return
        found, errors = self._files()
        yield from errors
        for file in found:
            if problem := files.text_problem(file, option="data.path"):
                yield problem

    def fingerprint(self) -> str:
        """Return a hash of the contents."""
        if self.path == _PYTHON_DOCS:
            return hashlib.sha256("\0".join(_python_docs()).encode()).hexdigest()
        return files.fingerprint(self._files()[0])

    def pieces(self) -> Iterator[Piece]:
        """Yield Python's topics by name, or the files by path."""
        if self.path == _PYTHON_DOCS:
            yield from (Piece(text, ends=True) for text in _python_docs())
            return
        for file in self._files()[0]:
            yield from files.read_pieces(file, option="data.path")

    def _files(self) -> tuple[list[Path], list[ConfigError]]:
        return files.expand([self.path] if isinstance(self.path, str) else self.path, option="data.path")


def _python_docs() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
