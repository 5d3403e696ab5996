"""What every data configuration has in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.component import Component
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Data(Component):
    """A source of token sequences with a training and a held-out split."""

    group: ClassVar[str] = "data"

    def preflight(self) -> Iterator[ConfigError]:
        """Yield what the file system says against this data, without importing heavy packages."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class Corpus(Data):
    """Text that is tokenised and packed once into a memory-mapped cache."""

    tokenizer: str = "bpe"
    """``bpe`` trains a byte-level BPE on the text, ``model`` takes the model's own, else a name or local folder."""

    vocab_size: int = 4096
    """Size of the BPE that is trained here; other tokenizers bring their own."""

    held_out: float = 0.05
    """Share of the tokens kept out of training for evaluation, cut from the end of each document group."""

    cache: str | None = None
    """Folder for tokenised data; by default ``$XDG_CACHE_HOME/launcher/data``."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse a split or vocabulary that leaves nothing."""
        if not 0 < self.held_out < 1:
            yield self.refuse("held_out", "must lie between 0 and 1", "set data.held_out=0.05")
        yield from self.below(257, "vocab_size")
