"""Rendered examples to arrays of tokens and masks, many at once.

Offsets follow from the tokens: where the bytes of an example's tokens, one after the other, are the bytes of its text,
a token stands behind the bytes of those before it. An example of which that is not true (a normalizer changed it, say)
is encoded with the tokenizer's own offsets.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from launcher.config.data.examples import ExampleEncoder, RenderedExample, encode_texts
from launcher.data.example_store import BlockKey, EncodedBlock
from launcher.data.word_cache import WordCache, can_cut
from launcher.models.tokenizer import byte_of_character, fallback_byte, has_decoder

if TYPE_CHECKING:
    import tokenizers

_NO_TEXT = b"\xff"
"""Bytes that no text holds: UTF-8 has no such byte."""
_PROBE = "Größe 🙂 of a\n  text"


class BlockEncoder:
    """Turns rendered examples into blocks, as :class:`ExampleEncoder` encodes them.

    Args:
        tokenizer: which neither truncates nor pads.
        end_id: token that ends an example whose text has no special tokens; ``None`` where there is none.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, end_id: int | None) -> None:
        self._tokenizer, self._end_id = tokenizer, end_id
        self._words = WordCache(tokenizer) if can_cut(tokenizer) else None
        self._bytes = token_bytes(tokenizer)
        self._sizes: np.ndarray = np.array([len(each) for each in self._bytes], np.int64)
        self._before, self._after = _special_tokens_around(tokenizer)
        probe = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        self._keeps_bytes = self._holds(probe, _PROBE.encode())

    @functools.cached_property
    def _with_offsets(self) -> ExampleEncoder:
        return ExampleEncoder(self._tokenizer, end_id=self._end_id)

    def encode(self, key: BlockKey, examples: Sequence[RenderedExample]) -> EncodedBlock:
        """Return the block of some examples."""
        if self._keeps_bytes:
            encoded = [self._marked(one, ids) for one, ids in zip(examples, self._ids(examples), strict=True)]
        else:
            exact = self._with_offsets.encode_batch(examples)
            encoded = [(np.array(one.ids, np.uint32), np.array(one.is_trained, np.uint8)) for one in exact]
        return EncodedBlock(
            key=key,
            ids=np.concatenate([*(ids for ids, _ in encoded), np.empty(0, np.uint32)]),
            is_trained=np.concatenate([*(mask for _, mask in encoded), np.empty(0, np.uint8)]),
            lengths=np.array([len(ids) for ids, _ in encoded], np.int32),
        )

    def _ids(self, examples: Sequence[RenderedExample]) -> list[np.ndarray]:
        """Return the tokens of each example, with those that the tokenizer puts around it."""
        if self._words is None:
            return [np.array(ids, np.uint32) for ids in encode_texts(self._tokenizer, examples)]
        found = self._words.encode_batch([example.text for example in examples])
        if not len(self._before) and not len(self._after):
            return found
        return [
            ids if example.has_special_tokens else np.concatenate([self._before, ids, self._after])
            for example, ids in zip(examples, found, strict=True)
        ]

    def _marked(self, example: RenderedExample, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return an example's tokens and mask; an end that the tokenizer does not write is added."""
        parts = [segment.text.encode() for segment in example.segments]
        special = not example.has_special_tokens
        before, after = (len(self._before), len(self._after)) if special else (0, 0)
        content = ids[before : len(ids) - after]
        if not self._holds(content.tolist(), b"".join(parts)):
            exact = self._with_offsets.encode(example)
            return np.array(exact.ids, np.uint32), np.array(exact.is_trained, np.uint8)
        ends = np.cumsum(self._sizes[content])
        mask: np.ndarray = np.zeros(len(ids), np.uint8)
        start = 0
        for segment, part in zip(example.segments, parts, strict=True):
            stop = start + len(part)
            if segment.is_trained and part:
                first, last = ends.searchsorted(start, side="right"), ends.searchsorted(stop, side="left")
                mask[before + first : before + last + 1] = 1
            start = stop
        if special and self._end_id is not None:
            if not len(ids) or ids[-1] != self._end_id:
                ids, mask = np.append(ids, np.uint32(self._end_id)), np.append(mask, np.uint8(0))
            mask[-1] = example.ends_trained
        return ids, mask

    def _holds(self, ids: Sequence[int], text: bytes) -> bool:
        """Return whether the bytes of some tokens are those of a text."""
        return b"".join(map(self._bytes.__getitem__, ids)) == text


def token_bytes(tokenizer: tokenizers.Tokenizer) -> list[bytes]:
    """Return the bytes of text that each token stands for; unknown ones are ``_NO_TEXT``."""
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    found = [_NO_TEXT] * (max(vocabulary.values(), default=-1) + 1)
    is_byte_level = has_decoder(tokenizer, "ByteLevel")
    byte_of = {ord(character): byte for character, byte in byte_of_character().items()}
    for token, number in vocabulary.items():
        if not is_byte_level:
            byte = fallback_byte(token)
            found[number] = token.replace("▁", " ").encode() if byte is None else bytes((byte,))
        elif max(written := token.translate(byte_of), default="") <= "\xff":
            found[number] = written.encode("latin-1")
    for number, added in tokenizer.get_added_tokens_decoder().items():
        found[number] = added.content.encode()
    return found


def _special_tokens_around(tokenizer: tokenizers.Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that are put before and after a text."""
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    before = next((at for at in range(len(ids)) if ids[at : at + len(alone)] == alone), 0)
    return np.array(ids[:before], np.uint32), np.array(ids[before + len(alone) :], np.uint32)
