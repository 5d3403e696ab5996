"""Plain text files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from launcher.data.base import Corpus


@dataclass(frozen=True, kw_only=True)
class Text(Corpus):
    """Text files, or Python's own documentation, which every CPython carries."""

    kind: ClassVar[str] = "text"
    headline: ClassVar[tuple[str, ...]] = ("path", "tokenizer", "vocab_size")

    path: tuple[str, ...] | str = "python-docs"
    """Files or globs; ``python-docs`` is ``pydoc_data.topics``, 465 kB of English."""
