"""What a ``config.json`` says about a model's sizes, read without Transformers.

Only families whose parameter count is known exactly are here; any other loads just as well, its sizes are merely
unknown until a rank has built it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from launcher.models.base import Shape
from launcher.models.gpt2 import Gpt2
from launcher.models.llama import LlamaSizes

Config = Mapping[str, Any]


class Sizes(Protocol):
    """What is known of a model."""

    def shape(self) -> Shape:
        """Return the sizes the planner reckons with."""

    def architecture(self) -> dict[str, Any]:
        """Return what must be equal for weights to fit."""


def sizes_of(config: Config) -> Sizes | None:
    """Return the sizes that the content of a ``config.json`` gives, ``None`` for a family that is not known here."""
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return None
    try:
        return family(config)
    except (KeyError, TypeError):  # an older or hand-written file that leaves out a size
        return None


def _gpt2(config: Config) -> Sizes | None:
    if config.get("n_inner") not in (None, 4 * config["n_embd"]) or config.get("tie_word_embeddings") is False:
        return None  # Gpt2 stands for the published layout
    return Gpt2(
        name="gpt2",
        layers=config["n_layer"],
        heads=config["n_head"],
        width=config["n_embd"],
        context=config["n_positions"],
        vocab_size=config["vocab_size"],
    )


def _llama(config: Config, **features: bool) -> LlamaSizes:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return LlamaSizes(
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        width=width,
        mlp_width=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        context=config["max_position_embeddings"],
        tied=config.get("tie_word_embeddings", False),
        family=config["model_type"],
        **features,
    )


def _plain_llama(config: Config) -> Sizes:
    bias = config.get("attention_bias", False)
    return _llama(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.get("mlp_bias", False))


def _qwen3(config: Config) -> Sizes:
    bias = config.get("attention_bias", False)
    if "head_dim" not in config:  # its default is not width / heads
        config = {**config, "head_dim": 128}
    return _llama(config, qkv_bias=bias, output_bias=bias, qk_norm=True)


_FAMILIES: dict[str, Callable[[Config], Sizes | None]] = {
    "gpt2": _gpt2,
    "llama": _plain_llama,
    "mistral": _llama,
    "qwen2": lambda config: _llama(config, qkv_bias=True),
    "qwen3": _qwen3,
}
