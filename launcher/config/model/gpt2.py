"""GPT-2 (Radford et al., 2019) at any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.config.model.base import Model
from launcher.config.model.shape import Shape
from launcher.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GPT2Config

_PUBLISHED = {
    (12, 12, 768): "openai-community/gpt2",
    (24, 16, 1024): "openai-community/gpt2-medium",
    (36, 20, 1280): "openai-community/gpt2-large",
    (48, 25, 1600): "openai-community/gpt2-xl",
}
"""Hub names of the published weights by layers, heads and width."""

_VOCAB_SIZE = 50257


@dataclass(frozen=True, kw_only=True)
class Gpt2(Model):
    """GPT-2's architecture; the published sizes are options of the group."""

    kind: ClassVar[str] = "gpt2"

    layers: int
    """Transformer blocks."""

    heads: int
    """Attention heads in a block."""

    hidden_size: int
    """Size of the residual stream."""

    max_position_embeddings: int = 1024
    """Learned positions, so the longest sequence."""

    vocab_size: int = _VOCAB_SIZE
    """Rows of the embedding; the tokenizer may use fewer."""

    dropout: float = 0.0
    """Dropout everywhere GPT-2 has it. 0 keeps runs equal on any number of ranks."""

    def validate(self) -> Iterator[ConfigError]:
        """Refuse sizes that make no transformer."""
        yield from self.validate_minimum(1, "layers", "heads", "hidden_size", "max_position_embeddings", "vocab_size")
        if self.heads > 0 and self.hidden_size % self.heads:
            better = self.hidden_size // self.heads * self.heads or self.heads
            yield self.error(
                "hidden_size", f"is not a multiple of model.heads={self.heads}", f"set model.hidden_size={better}"
            )
        if not 0 <= self.dropout < 1:
            yield self.error("dropout", "must be at least 0 and below 1", "set model.dropout=0")
        if self.weights == "pretrained" and self._hub_name() is None:
            yield self.error("weights", "no weights of this size were ever published", "set model.weights=random")

    def shape(self) -> Shape:
        """Return the sizes; the output projection is the token embedding, counted once."""
        width = self.hidden_size
        block = 12 * width * width + 13 * width  # qkv + projection + 4x MLP, their biases, two norms
        embeddings = (self.vocab_size + self.max_position_embeddings) * width
        return Shape(
            layers=self.layers,
            heads=self.heads,
            hidden_size=width,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            num_params=embeddings + self.layers * block + 2 * width,
            largest_param=max(self.vocab_size * width, 4 * width * width),
            kv_heads=self.heads,
            intermediate_size=4 * width,
            block_params=block,
            tied=True,
            family="gpt2",
        )

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide every parameter's shape."""
        names = ("layers", "heads", "hidden_size", "max_position_embeddings", "vocab_size")
        return {"family": self.kind, **{name: getattr(self, name) for name in names}}

    def transformers_config(self) -> GPT2Config:
        """Return the configuration; GPT-2's end-of-text token exists only in its own vocabulary."""
        from transformers import GPT2Config

        end = _VOCAB_SIZE - 1 if self.vocab_size >= _VOCAB_SIZE else None
        return GPT2Config(
            n_layer=self.layers,
            n_head=self.heads,
            n_embd=self.hidden_size,
            n_positions=self.max_position_embeddings,
            vocab_size=self.vocab_size,
            resid_pdrop=self.dropout,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            bos_token_id=end,
            eos_token_id=end,
        )

    def pretrained_folder(self, *, with_weights: bool, heartbeat: Callable[[], None]) -> Path:
        """Return the folder of the published model of this size, fetched from the hub where need be."""
        from launcher.utils.hub import fetch_model

        heartbeat()
        name = self.published_source()
        option, instead = ("model.weights", "random") if with_weights else ("data.tokenizer", "bpe")
        return fetch_model(name, with_weights=with_weights, option=option, instead=f"set {option}={instead}")

    def published_source(self) -> str:
        """Return the hub name of the published model of this size; every size has the same tokenizer."""
        return self._hub_name() or _PUBLISHED[12, 12, 768]

    def _hub_name(self) -> str | None:
        if (self.max_position_embeddings, self.vocab_size) != (1024, _VOCAB_SIZE):
            return None
        return _PUBLISHED.get((self.layers, self.heads, self.hidden_size))
