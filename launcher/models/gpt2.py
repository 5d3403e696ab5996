"""GPT-2 (Radford et al., 2019) at any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from launcher.errors import ConfigError
from launcher.models.base import Model, Shape


@dataclass(frozen=True, kw_only=True)
class Gpt2(Model):
    """GPT-2's architecture; the published sizes are options of the group."""

    kind: ClassVar[str] = "gpt2"

    layers: int
    """Transformer blocks."""

    heads: int
    """Attention heads in a block."""

    width: int
    """Size of the residual stream."""

    context: int = 1024
    """Learned positions, so the longest sequence."""

    vocab_size: int = 50257
    """Rows of the embedding; the tokenizer may use fewer."""

    dropout: float = 0.0
    """Dropout everywhere GPT-2 has it. 0 keeps runs equal on any number of ranks."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse sizes that make no transformer."""
        yield from self.below(1, "layers", "heads", "width", "context", "vocab_size")
        if self.heads > 0 and self.width % self.heads:
            better = self.width // self.heads * self.heads or self.heads
            yield self.refuse("width", f"is not a multiple of model.heads={self.heads}", f"set model.width={better}")
        if not 0 <= self.dropout < 1:
            yield self.refuse("dropout", "must be at least 0 and below 1", "set model.dropout=0")

    def shape(self) -> Shape:
        """Return the sizes; the output projection is the token embedding, counted once."""
        width = self.width
        block = 12 * width * width + 13 * width  # qkv + projection + 4x MLP, their biases, two norms
        embeddings = (self.vocab_size + self.context) * width
        return Shape(
            layers=self.layers,
            heads=self.heads,
            width=width,
            vocab_size=self.vocab_size,
            context=self.context,
            num_params=embeddings + self.layers * block + 2 * width,
            largest_param=max(self.vocab_size * width, 4 * width * width),
        )

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide every parameter's shape."""
        names = ("layers", "heads", "width", "context", "vocab_size")
        return {"family": self.kind, **{name: getattr(self, name) for name in names}}
