"""Made-up tokens with structure a model can learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from launcher.data.base import Data
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Synthetic(Data):
    """Sequences from a fixed random bigram table: a loss floor that is known, no files, any vocabulary."""

    kind: ClassVar[str] = "synthetic"

    vocab_size: int = 256
    """Distinct tokens."""

    branching: int = 4
    """Equally likely successors of each token, so the best possible loss is ln(branching)."""

    num_sequences: int = 65536
    """Distinct training sequences before the data repeats."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse a table that cannot be drawn."""
        yield from self.below(2, "vocab_size")
        yield from self.below(1, "branching", "num_sequences")
        if self.branching > self.vocab_size:
            yield self.refuse("branching", f"exceeds data.vocab_size={self.vocab_size}", "set data.branching=4")
