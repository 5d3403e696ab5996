"""A model's ``config.json``: sizes, windows and states, read without Transformers.

Families whose parameter count follows from it exactly are here; that of others is counted in the headers of their
weights, where those are on this machine, and else is unknown until a rank has built the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from launcher.config.model.shape import Gpt2Sizes, LlamaSizes, Shape

if TYPE_CHECKING:
    from launcher.config.model.transformers_support import AttentionSupport


ConfigJson = Mapping[str, Any]


class Sizes(Protocol):
    """Known sizes of a model."""

    def shape(self) -> Shape:
        """Return the sizes that plans calculate with."""

    def architecture(self) -> dict[str, Any]:
        """Return the values that must be equal for weights to fit."""


def sizes_from_config(config: ConfigJson) -> Sizes | None:
    """Return the sizes in a ``config.json``; ``None`` for a family that is unknown here."""
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None or any(invalid_sizes(config)) or any(isinstance(config.get(key), list) for key in _CHECKED_SIZES):
        return None
    try:
        return family(config)
    except (KeyError, TypeError):  # an older or hand-written file that leaves out a size
        return None


def invalid_sizes(config: ConfigJson) -> Iterator[tuple[str, object]]:
    """Yield key and value of each size that is not an integer of at least 1, or a list of them."""
    for part in (config, text) if (text := _text_part(config)) is not config else (config,):
        for key in _CHECKED_SIZES:
            size = part.get(key)
            sizes = size if isinstance(size, list) and key in _SIZES_BY_LAYER else [size]
            if size is not None and not all(type(each) is int and each >= 1 for each in sizes):
                yield key, size


def shape_from_tensors(config: ConfigJson, tensors: Mapping[str, tuple[int, ...]]) -> Shape | None:
    """Return a model's sizes from its configuration and the shapes of its tensors.

    It works for any family.

    Of a model that takes images, layers and width are those of its text model, and all parameters count.

    ``None`` where the configuration names its sizes in words that are not known here.
    """
    whole, config = config, _text_part(config)
    layers, width, heads, vocab_size, context = (_positive_int(config, *names) for names in _SIZE_KEYS)
    if None in (layers, width, heads, vocab_size, context) or not tensors:
        return None
    sizes = {name: math.prod(shape) for name, shape in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    blocks = sum(size for name, size in sizes.items() if _BLOCK_TENSOR.search(name) and not _OF_IMAGES.search(name))
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    all_experts = _positive_int(config, "num_local_experts", "num_experts", "n_routed_experts")
    used = _positive_int(config, "num_experts_per_tok", "moe_topk")
    total = sum(sizes.values())
    return Shape(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=width,
        vocab_size=vocab_size,
        max_position_embeddings=context,
        num_params=total,
        active_params=total - experts + experts * used // all_experts if experts and used and all_experts else total,
        largest_param=max(sizes.values()),
        num_key_value_heads=_positive_int(config, *_KV_HEAD_KEYS) or heads,
        intermediate_size=_positive_int(config, *_INTERMEDIATE_KEYS) or 4 * width,
        block_params=blocks // layers,
        tie_word_embeddings=not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in sizes),
        family=str(whole.get("model_type")),
    )


_BLOCK_TENSOR, _OF_IMAGES = re.compile(r"\.\d+\.|^\d+\."), re.compile(r"(^|\.)(vision\w*|visual)\.")

_SIZE_KEYS = (
    ("num_hidden_layers", "n_layer", "n_layers"),
    ("hidden_size", "n_embd", "d_model"),
    ("num_attention_heads", "n_head", "n_heads"),
    ("vocab_size",),
    ("max_position_embeddings", "n_positions", "max_seq_len"),
)
"""Words of families for layers, width, heads, tokens and longest sequence."""

_KV_HEAD_KEYS, _INTERMEDIATE_KEYS = ("num_key_value_heads", "num_kv_heads"), ("intermediate_size", "n_inner", "ffn_dim")
_SIZES_BY_LAYER = (*_SIZE_KEYS[2], *_KV_HEAD_KEYS, *_INTERMEDIATE_KEYS, "head_dim")
"""Keys whose value is a list in some families, an entry for each layer."""
_CHECKED_SIZES = (*(key for keys in _SIZE_KEYS for key in keys), *_SIZES_BY_LAYER)
"""Keys whose value is a size of at least 1 in every family."""


def _positive_int(config: ConfigJson, *names: str) -> Any:
    """Return the first of these that is a positive number."""
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _gpt2(config: ConfigJson) -> Sizes | None:
    if config.get("n_inner") not in (None, 4 * config["n_embd"]) or config.get("tie_word_embeddings") is False:
        return None  # Gpt2Sizes stands for the published layout
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    layers, heads, width, positions, vocab_size = (_positive_int(config, name) for name in names)
    if None in (layers, heads, width, positions, vocab_size):
        return None
    return Gpt2Sizes(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=width,
        max_position_embeddings=positions,
        vocab_size=vocab_size,
    )


def _llama(config: ConfigJson, **features: bool) -> LlamaSizes:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    return LlamaSizes(
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        hidden_size=width,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        family=config["model_type"],
        **features,
    )


def _plain_llama(config: ConfigJson) -> Sizes:
    bias = config.get("attention_bias", False)
    return _llama(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.get("mlp_bias", False))


def _qwen3(config: ConfigJson) -> Sizes:
    bias = config.get("attention_bias", False)
    if "head_dim" not in config:  # its default is not width / heads
        config = {**config, "head_dim": 128}
    return _llama(config, qkv_bias=bias, output_bias=bias, qk_norm=True)


_FAMILIES: dict[str, Callable[[ConfigJson], Sizes | None]] = {
    "gpt2": _gpt2,
    "llama": _plain_llama,
    "mistral": _llama,
    "qwen2": lambda config: _llama(config, qkv_bias=True),
    "qwen3": _qwen3,
}

_FULL_ATTENTION_TYPES = frozenset({"full_attention", "attention"})
"""Kinds of layers that attend to all earlier tokens; the second is the name in older files."""
STATEFUL_LAYER_TYPES = frozenset({"linear_attention", "conv", "mamba"})
"""Kinds of layers that attend to none, and carry a state from token to token."""
_WINDOW_KEYS: Mapping[str, str] = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Layer kinds with windowed attention, and the ``config.json`` key of the window's length."""


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def attention_windows(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the keys that limit attention to a window, each with the window's length in tokens."""
    config = _text_part(config)
    kinds = config.get("layer_types")
    for kind, key in _WINDOW_KEYS.items():
        is_off = config.get(f"use_{key}") is False or (isinstance(kinds, list) and kind not in kinds)
        size = config.get(key)
        if isinstance(size, int) and not is_off:
            yield key, size


def non_attention_layers(config: Mapping[str, Any]) -> list[str]:
    """Return the kinds of layers that mix tokens by something else than attention."""
    kinds = _text_part(config).get("layer_types")
    if not isinstance(kinds, list):
        return []
    return sorted({str(kind) for kind in kinds} - {*_FULL_ATTENTION_TYPES, *_WINDOW_KEYS})


def stateful_layers(config: Mapping[str, Any], marks: AttentionSupport | None) -> str | None:
    """Return which layers carry a recurrent state, in words; ``None`` if none is known to."""
    states = sorted(set(non_attention_layers(config)) & STATEFUL_LAYER_TYPES)
    if states:
        return f"layers ({', '.join(states)}) that carry a state from token to token"
    return "layers that carry a state from token to token" if marks is not None and marks.is_stateful else None


def sequence_sharding_problem(config: Mapping[str, Any], marks: AttentionSupport | None, *, length: int) -> str | None:
    """Return why ranks cannot split a model's sequences of ``length`` tokens, or ``None``.

    Attention is all that sees tokens of other ranks, by a function that Transformers registers, and it is causal over
    the whole sequence. Convolutions, states and windows would give other numbers, and no error.

    Args:
        config: what ``config.json`` holds.
        marks: of the class; ``None`` where they are not known.
        length: tokens in a sequence.
    """
    family = config.get("model_type")
    others = non_attention_layers(config)
    if others or (marks is not None and marks.is_stateful):
        kinds = f" ({', '.join(others)})" if others else ""
        return (
            f"{family} has layers{kinds} that mix tokens by more than attention, and would mix only those of one rank"
        )
    if marks is not None and not marks.attention_backend:
        return f"{family} computes attention in its own code, which sees only the tokens of one rank"
    for key, size in attention_windows(config):
        if size < length:
            return f"{family} has layers that see {size} tokens ({key}), and sequences have {length}"
    return None


def dropout_rates(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the ``config.json`` keys that set dropout rates of a causal language model."""
    return {
        key: value
        for key, value in _text_part(config).items()
        if key.endswith(("dropout", "pdrop", "layerdrop"))
        and not key.startswith(("classifier_", "summary_"))
        and isinstance(value, int | float)
        and value > 0
    }
