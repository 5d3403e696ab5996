"""GPT-2 (Radford et al., 2019) at any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from launcher.config.model.base import Model
from launcher.config.model.shape import Gpt2Sizes, Shape
from launcher.errors import ConfigError

_PUBLISHED = {
    (12, 12, 768): "openai-community/gpt2",
    (24, 16, 1024): "openai-community/gpt2-medium",
    (36, 20, 1280): "openai-community/gpt2-large",
    (48, 25, 1600): "openai-community/gpt2-xl",
}
"""Hub names of the published weights by layers, heads and width."""

GPT2_VOCAB_SIZE = 50257
"""Tokens of the published vocabulary; the last one ends a text."""


@dataclass(frozen=True, kw_only=True)
class Gpt2(Model):
    """GPT-2's architecture; the published sizes are options of the group."""

    kind: ClassVar[str] = "gpt2"

    num_hidden_layers: int
    """Transformer blocks."""

    num_attention_heads: int
    """Attention heads in a block."""

    hidden_size: int
    """Size of the residual stream."""

    max_position_embeddings: int = 1024
    """Learned positions, so the longest sequence."""

    vocab_size: int = GPT2_VOCAB_SIZE
    """Rows of the embedding; the tokenizer may use fewer."""

    dropout: float = 0.0
    """Dropout everywhere GPT-2 has it. 0 keeps runs equal on any number of ranks."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject sizes that make no transformer."""
        yield from self.validate_minimum(
            1, "num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings", "vocab_size"
        )
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            better = self.hidden_size // self.num_attention_heads * self.num_attention_heads or self.num_attention_heads
            yield self.error(
                "hidden_size",
                f"is not a multiple of model.num_attention_heads={self.num_attention_heads}",
                f"set model.hidden_size={better}",
            )
        if not 0 <= self.dropout < 1:
            yield self.error("dropout", "must be at least 0 and below 1", "set model.dropout=0")
        if self.weights == "pretrained" and self._hub_name() is None:
            yield self.error("weights", "there are no pretrained weights of this size", "set model.weights=random")

    @property
    def sizes(self) -> Gpt2Sizes:
        """Everything that decides the parameters."""
        return Gpt2Sizes(
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            hidden_size=self.hidden_size,
            max_position_embeddings=self.max_position_embeddings,
            vocab_size=self.vocab_size,
        )

    def shape(self) -> Shape:
        """Return the sizes that plans calculate with."""
        return self.sizes.shape()

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide every parameter's shape."""
        return self.sizes.architecture()

    def pretrained_source(self) -> str:
        """Return the hub name of the model of this size; all sizes have the same tokenizer."""
        return self._hub_name() or _PUBLISHED[12, 12, 768]

    def _hub_name(self) -> str | None:
        if (self.max_position_embeddings, self.vocab_size) != (1024, GPT2_VOCAB_SIZE):
            return None
        return _PUBLISHED.get((self.num_hidden_layers, self.num_attention_heads, self.hidden_size))
