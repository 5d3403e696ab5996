"""Sizes of a model: what plans, memory estimates and checks calculate with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that plans, memory estimates and checks calculate with."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    """Longest sequence the model takes, in tokens."""
    num_params: int
    """Parameters, with tied ones counted once."""
    largest_param: int
    """Elements of the largest single parameter."""
    num_key_value_heads: int
    """Heads of keys and values in a block, at most ``num_attention_heads``."""
    intermediate_size: int
    """Size of the hidden layer of a block's MLP."""
    block_params: int
    """Parameters of one block."""
    tie_word_embeddings: bool
    """The output projection is the token embedding."""
    family: str
    """Name of the architecture in Transformers (``gpt2``, ``llama``)."""
    active_params: int | None = None
    """Parameters that one token uses, where a router leaves experts out; ``None`` means all."""

    def flops_per_token(self, sequence_length: int) -> float:
        """Return forward-plus-backward FLOPs a token: 6N + 12·L·width·sequence.

        From PaLM (arXiv:2204.02311, app. B).
        """
        return (
            6.0 * (self.active_params or self.num_params)
            + 12.0 * self.num_hidden_layers * self.hidden_size * sequence_length
        )


@dataclass(frozen=True, kw_only=True)
class Gpt2Sizes:
    """Sizes that decide GPT-2's parameters: learned positions, 4x MLPs, tied embeddings."""

    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    max_position_embeddings: int
    vocab_size: int

    def shape(self) -> Shape:
        """Return the sizes; the output projection is the token embedding, counted once."""
        width = self.hidden_size
        block = 12 * width * width + 13 * width  # qkv + projection + 4x MLP, their biases, two norms
        embeddings = (self.vocab_size + self.max_position_embeddings) * width
        return Shape(
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            hidden_size=width,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            num_params=embeddings + self.num_hidden_layers * block + 2 * width,
            largest_param=max(self.vocab_size * width, 4 * width * width),
            num_key_value_heads=self.num_attention_heads,
            intermediate_size=4 * width,
            block_params=block,
            tie_word_embeddings=True,
            family="gpt2",
        )

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide every parameter's shape."""
        return {"family": "gpt2", **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class LlamaSizes:
    """Sizes that decide the parameters of a decoder of the Llama family.

    It has gated MLPs, RMS norms and grouped-query attention.
    """

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """Heads of keys and values, shared by groups of query heads."""
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    """The output projection is the token embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """An RMS norm of ``head_dim`` on queries and another on keys (Qwen 3)."""
    family: str = "llama"
    """Name of the architecture in Transformers."""

    def shape(self) -> Shape:
        """Return the sizes that plans calculate with."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (queries + 2 * keys) + queries * self.hidden_size
        biases = (
            self.qkv_bias * (queries + 2 * keys)
            + self.output_bias * self.hidden_size
            + self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        )
        block = (
            attention
            + 3 * self.hidden_size * self.intermediate_size
            + biases
            + 2 * self.hidden_size
            + self.qk_norm * 2 * self.head_dim
        )
        embeddings = self.vocab_size * self.hidden_size
        return Shape(
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            num_params=embeddings * (1 if self.tie_word_embeddings else 2)
            + self.num_hidden_layers * block
            + self.hidden_size,
            largest_param=max(embeddings, self.hidden_size * self.intermediate_size, self.hidden_size * queries),
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            block_params=block,
            tie_word_embeddings=self.tie_word_embeddings,
            family=self.family,
        )

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide every parameter's shape."""
        return dataclasses.asdict(self)
