"""Llama (Touvron et al., 2023, arXiv:2302.13971): sizes of the family and its close relatives, and a model of any."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.errors import ConfigError
from launcher.models.base import Model, Shape

if TYPE_CHECKING:
    from transformers import LlamaConfig


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


@dataclass(frozen=True, kw_only=True)
class Llama(Model):
    """Llama's architecture at any size, with random weights or those of a folder."""

    kind: ClassVar[str] = "llama"

    layers: int
    """Transformer blocks."""

    heads: int
    """Attention heads of queries in a block."""

    kv_heads: int
    """Heads of keys and values in a block, shared by groups of query heads."""

    width: int
    """Size of the residual stream."""

    mlp_width: int
    """Size of the hidden layer of a block's gated MLP."""

    context: int = 2048
    """Longest sequence."""

    vocab_size: int = 32000
    """Rows of the embedding; the tokenizer may use fewer."""

    tied: bool = False
    """Use the token embedding as output projection too."""

    rope_theta: float = 10_000.0
    """Base of the wavelengths of rotary positions (arXiv:2104.09864)."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse sizes that make no transformer."""
        sizes = ("layers", "heads", "kv_heads", "width", "mlp_width", "context", "vocab_size")
        yield from self.below(1, *sizes)
        if any(getattr(self, name) < 1 for name in sizes):
            return
        if self.heads % self.kv_heads:
            why = f"model.heads={self.heads} is not a multiple of it"
            yield self.refuse("kv_heads", why, f"set model.kv_heads={self.heads}")
        if self.width % (2 * self.heads):
            better = max(1, self.width // (2 * self.heads)) * 2 * self.heads
            why = f"each of {self.heads} heads takes an even share: rotary positions turn pairs"
            yield self.refuse("width", why, f"set model.width={better}")
        if self.weights == "pretrained":
            yield self.refuse("weights", "this architecture is of no published model", "set model=hf and its name")

    @property
    def sizes(self) -> LlamaSizes:
        """Everything that decides the parameters."""
        return LlamaSizes(
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            width=self.width,
            mlp_width=self.mlp_width,
            vocab_size=self.vocab_size,
            context=self.context,
            tied=self.tied,
        )

    def shape(self) -> Shape:
        """Return the sizes the planner reckons with."""
        return self.sizes.shape()

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide every parameter's shape."""
        return self.sizes.architecture()

    def transformers_config(self) -> LlamaConfig:
        """Return the configuration, without special tokens: its vocabulary is anybody's."""
        from transformers import LlamaConfig

        return LlamaConfig(
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            bos_token_id=None,
            eos_token_id=None,
        )

    def pretrained_folder(self, *, with_weights: bool, beat: Callable[[], None]) -> Path:
        """Refuse: there is none.

        Raises:
            ConfigError: always; a folder of one's own goes into ``model.weights``.
        """
        why = "this architecture is of no published model, so it has no tokenizer of its own"
        raise ConfigError("data.tokenizer", "model", why=why, fix="set data.tokenizer=bpe")

    def published_source(self) -> Path:
        """Refuse, as ``pretrained_folder`` does."""
        return self.pretrained_folder(with_weights=False, beat=lambda: None)
