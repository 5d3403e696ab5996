"""What a ``config.json`` says about a model's sizes, read without Transformers.

Families whose parameter count follows from it exactly are here; that of others is counted in the headers of their
weights, where those are on this machine, and else is unknown until a rank has built the model.
"""

from __future__ import annotations

import math
import re
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


def measured_shape(config: Config, tensors: Mapping[str, tuple[int, ...]]) -> Shape | None:
    """Return the sizes of a model of any family from its configuration and the shapes of its stored tensors.

    ``None`` where the configuration names its sizes in words that are not known here.
    """
    layers, width, heads, vocab_size, context = (_number(config, *names) for names in _NAMES)
    if None in (layers, width, heads, vocab_size, context) or not tensors:
        return None
    sizes = {name: math.prod(shape) for name, shape in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    blocks = sum(size for name, size in sizes.items() if _IN_BLOCK.search(name))
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    all_experts = _number(config, "num_local_experts", "num_experts", "n_routed_experts")
    used = _number(config, "num_experts_per_tok", "moe_topk")
    total = sum(sizes.values())
    return Shape(
        layers=layers,
        heads=heads,
        width=width,
        vocab_size=vocab_size,
        context=context,
        num_params=total,
        active_params=total - experts + experts * used // all_experts if experts and used and all_experts else total,
        largest_param=max(sizes.values()),
        kv_heads=_number(config, "num_key_value_heads", "num_kv_heads") or heads,
        mlp_width=_number(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * width,
        block_params=blocks // layers,
        tied=not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in sizes),
        family=str(config.get("model_type")),
    )


_IN_BLOCK = re.compile(r"\.\d+\.|^\d+\.")
_NAMES = (
    ("num_hidden_layers", "n_layer", "n_layers"),
    ("hidden_size", "n_embd", "d_model"),
    ("num_attention_heads", "n_head", "n_heads"),
    ("vocab_size",),
    ("max_position_embeddings", "n_positions", "max_seq_len"),
)
"""Words of families for layers, width, heads, tokens and longest sequence."""


def _number(config: Config, *names: str) -> Any:
    """Return the first of these that is a positive number."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


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
