"""Text of tokens, without a loss: bytes that make no character never take those beside them along.

Tokenizers of the SentencePiece kind (Llama 2, Mistral, Gemma, Phi-3) write a character that their vocabulary lacks as
tokens ``<0xF0>``, ``<0x9F>``, … The decoder of the tokenizers library looks at each run of such tokens as a whole: one
byte that makes no character, or the half of one at the end, turns the run's every character into U+FFFD.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

REPLACEMENT = "\ufffd"
"""What decoders put for bytes that make no character, or none yet."""
_MANY = 1000
"""Tokens that take so long that other threads should run meanwhile: ``decode`` keeps Python's lock."""


def decoder_of(inner: tokenizers.Tokenizer) -> Callable[[Sequence[int]], str]:
    """Return what turns tokens into text, special tokens left out."""

    def decode(ids: Sequence[int]) -> str:
        if len(ids) > _MANY:
            return str(inner.decode_batch([list(ids)], skip_special_tokens=True)[0])
        return str(inner.decode(list(ids), skip_special_tokens=True))

    if not has_decoder(inner, "ByteFallback"):
        return decode
    special = {number for number, added in inner.get_added_tokens_decoder().items() if added.special}

    def decode_with_bytes(ids: Sequence[int]) -> str:
        text = decode(ids)
        if REPLACEMENT not in text:
            return text
        written = (inner.id_to_token(number) for number in ids if number not in special)
        return str(inner.decoder.decode(list(_apart(token for token in written if token is not None))))

    return decode_with_bytes


def has_decoder(inner: tokenizers.Tokenizer, kind: str) -> bool:
    """Return whether a decoder of this kind is the tokenizer's, or a part of it."""
    return inner.decoder is not None and _uses(json.loads(inner.decoder.__getstate__()), kind)


def fallback_byte(token: str) -> int | None:
    """Return the byte that ``<0xNN>`` stands for, ``None`` for any other token."""
    if len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def _apart(tokens: Iterator[str]) -> Iterator[str]:
    """Yield tokens, with an empty one between bytes that make characters and bytes that make none."""
    run: list[str] = []
    for token in tokens:
        if fallback_byte(token) is not None:
            run.append(token)
            continue
        yield from _run_apart(run)
        run = []
        yield token
    yield from _run_apart(run)


def _run_apart(run: list[str]) -> Iterator[str]:
    raw = bytes(fallback_byte(token) or 0 for token in run)
    at, was_valid = 0, True
    while at < len(raw):
        size = _size_of_character(raw, at)
        if at and bool(size) is not was_valid:
            yield ""
        yield from run[at : at + max(1, size)]
        at, was_valid = at + max(1, size), bool(size)


def _size_of_character(raw: bytes, at: int) -> int:
    """Return how many bytes the character that begins here has; 0 where none does."""
    first = raw[at]
    size = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
    try:
        raw[at : at + size].decode()
    except UnicodeDecodeError:
        return 0
    return size


def _uses(tree: Any, kind: str) -> bool:
    if isinstance(tree, dict):
        return tree.get("type") == kind or any(_uses(part, kind) for part in tree.values())
    return isinstance(tree, list) and any(_uses(part, kind) for part in tree)
