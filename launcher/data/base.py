"""What every data configuration has in common."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from launcher.build_once import default_cache
from launcher.component import Component
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Data(Component):
    """A source of token sequences with a training and a held-out split."""

    group: ClassVar[str] = "data"

    def preflight(self) -> Iterator[ConfigError]:
        """Yield what the file system says against this data, without importing heavy packages."""
        yield from ()


class Piece(NamedTuple):
    """A stretch of text, small enough to tokenise at once."""

    text: str
    ends: bool
    """Whether a document ends here; the tokenizer's end-of-text token follows it."""


@dataclass(frozen=True, kw_only=True)
class Corpus(Data):
    """Text that is tokenised once into a memory-mapped cache and cut into sequences of any length from there."""

    tokenizer: str = "bpe"
    """``bpe`` trains a byte-level BPE on the text, ``model`` takes the model's own, else a name or local folder."""

    vocab_size: int = 4096
    """Size of the BPE that is trained here; other tokenizers bring their own."""

    held_out: float = 0.05
    """Share of the tokens kept out of training for evaluation: the end of the stream, so the last documents."""

    cache: str | None = None
    """Folder for tokenised data; by default ``$XDG_CACHE_HOME/launcher/data``."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse a split or vocabulary that leaves nothing."""
        if not 0 < self.held_out < 1:
            yield self.refuse("held_out", "must lie between 0 and 1", "set data.held_out=0.05")
        yield from self.below(257, "vocab_size")

    def preflight(self) -> Iterator[ConfigError]:
        """Yield a cache that cannot be written and a tokenizer folder that is not there."""
        there = self.cache_folder
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = f"{there} is not a folder that this user can write"
            fix = "set data.cache to one, or XDG_CACHE_HOME"
            yield ConfigError("data.cache", self.cache_folder, why=why, fix=fix)
        if self.tokenizer.startswith(("/", "./", "../", "~")) and not Path(self.tokenizer).expanduser().is_dir():
            fix = "give a folder that save_pretrained wrote, or data.tokenizer=bpe"
            yield self.refuse("tokenizer", "there is no such folder", fix)

    @property
    def cache_folder(self) -> Path:
        """Where tokenised data is kept."""
        return Path(self.cache).expanduser() if self.cache else default_cache("data")

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a string that changes when the text does. Cheap: every rank of every run asks for it."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Yield the text in a fixed order. Rank side.

        Raises:
            ConfigError: a source turns out not to be text.
            EnvironmentProblem: a source cannot be reached.
        """
