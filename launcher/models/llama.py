"""Sizes of the Llama family (Touvron et al., 2023, arXiv:2302.13971) and its close relatives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from launcher.models.base import Shape


@dataclass(frozen=True, kw_only=True)
class LlamaSizes:
    """Everything that decides the parameters of a decoder with gated MLPs, RMS norms and grouped-query attention."""

    layers: int
    heads: int
    kv_heads: int
    """Heads of keys and values, shared by groups of query heads."""
    head_dim: int
    width: int
    mlp_width: int
    vocab_size: int
    context: int
    tied: bool
    """The output projection is the token embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """An RMS norm of ``head_dim`` on queries and another on keys (Qwen 3)."""
    family: str = "llama"
    """Name of the architecture in Transformers."""

    def shape(self) -> Shape:
        """Return the sizes the planner reckons with."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.width * (queries + 2 * keys) + queries * self.width
        biases = (
            self.qkv_bias * (queries + 2 * keys)
            + self.output_bias * self.width
            + self.mlp_bias * (2 * self.mlp_width + self.width)
        )
        block = attention + 3 * self.width * self.mlp_width + biases + 2 * self.width + self.qk_norm * 2 * self.head_dim
        embeddings = self.vocab_size * self.width
        return Shape(
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            vocab_size=self.vocab_size,
            context=self.context,
            num_params=embeddings * (1 if self.tied else 2) + self.layers * block + self.width,
            largest_param=max(embeddings, self.width * self.mlp_width, self.width * queries),
            kv_heads=self.kv_heads,
            mlp_width=self.mlp_width,
            block_params=block,
            tied=self.tied,
            family=self.family,
        )

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide every parameter's shape."""
        return dataclasses.asdict(self)
