"""Where the layers of a family look, by its ``config.json`` and the marks of its class: read without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.models.installed import AttentionMarks

_FULL = frozenset({"full_attention", "attention"})
"""Kinds of layers that attend to all earlier tokens; the second is the name in older files."""
STATES = frozenset({"linear_attention", "conv", "mamba"})
"""Kinds of layers that attend to none, and carry a state from token to token."""
_WINDOWS: Mapping[str, str] = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds of layers that attend to some tokens only, and the key of ``config.json`` that says to how many."""


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part = config.get("text_config")
    return part if isinstance(part, Mapping) else config


def windows(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the keys that keep layers from seeing all earlier tokens, each with how many they see."""
    config = _text_part(config)
    kinds = config.get("layer_types")
    for kind, key in _WINDOWS.items():
        is_off = config.get(f"use_{key}") is False or (isinstance(kinds, list) and kind not in kinds)
        size = config.get(key)
        if isinstance(size, int) and not is_off:
            yield key, size


def other_layers(config: Mapping[str, Any]) -> list[str]:
    """Return the kinds of layers that mix tokens by something else than attention."""
    kinds = _text_part(config).get("layer_types")
    if not isinstance(kinds, list):
        return []
    return sorted({str(kind) for kind in kinds} - {*_FULL, *_WINDOWS})


def carried_state(config: Mapping[str, Any], marks: AttentionMarks | None) -> str | None:
    """Return which layers carry a state from token to token, in words, ``None`` where none is known to."""
    states = sorted(set(other_layers(config)) & STATES)
    if states:
        return f"layers ({', '.join(states)}) that carry a state from token to token"
    return "layers that carry a state from token to token" if marks is not None and marks.is_stateful else None


def cut_problem(config: Mapping[str, Any], marks: AttentionMarks | None, *, length: int) -> str | None:
    """Return why ranks cannot share sequences of ``length`` tokens of a model, ``None`` where they can.

    Attention is all that sees tokens of other ranks, by a function that Transformers registers, and it is causal over
    the whole sequence. Convolutions, states and windows would give other numbers, and no error.

    Args:
        config: what ``config.json`` holds.
        marks: of the class; ``None`` where they are not known.
        length: tokens in a sequence.
    """
    family = config.get("model_type")
    others = other_layers(config)
    if others or (marks is not None and marks.is_stateful):
        kinds = f" ({', '.join(others)})" if others else ""
        return f"{family} has layers{kinds} that join tokens by more than attention, and would join those of one rank"
    if marks is not None and not marks.attention_backend:
        return f"{family} computes attention in its own code, which sees the tokens of one rank alone"
    for key, size in windows(config):
        if size < length:
            return f"{family} has layers that see {size} tokens ({key}), and sequences have {length}"
    return None


def dropouts(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the keys of ``config.json`` by which layers of a causal language model drop values in training."""
    return {
        key: value
        for key, value in _text_part(config).items()
        if key.endswith(("dropout", "pdrop", "layerdrop"))
        and not key.startswith(("classifier_", "summary_"))
        and isinstance(value, int | float)
        and value > 0
    }
