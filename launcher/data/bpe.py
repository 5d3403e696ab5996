"""A byte-level BPE trained on the corpus itself (Sennrich et al., 2016, arXiv:1508.07909; bytes as in GPT-2)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from launcher.data.base import Piece
from launcher.models.tokenizer import Tokenizer

END = "<|endoftext|>"
_PARALLEL = "TOKENIZERS_PARALLELISM"
_TRAINED_ON_CHARS = 64 << 20
"""Merges hardly change beyond this much text, and training would take minutes."""


def train_bpe(pieces: Iterable[Piece], *, vocab_size: int) -> Tokenizer:
    """Return a tokenizer of at most ``vocab_size`` tokens; the same text gives the same one, token for token.

    Args:
        pieces: the text; of a large corpus the first 64 million characters count.
        vocab_size: the 256 bytes, the end-of-text token and the merges; fewer where the text offers fewer.
    """
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_beginning(pieces), trainer)
    return Tokenizer(inner=inner, end_id=inner.token_to_id(END))


def read_bpe(file: Path) -> Tokenizer:
    """Return a tokenizer that ``to_json`` wrote."""
    from tokenizers import Tokenizer as Inner

    inner = Inner.from_file(str(file))
    return Tokenizer(inner=inner, end_id=inner.token_to_id(END))


def count_tokens(pieces: Sequence[Piece], *, vocab_size: int) -> int:
    """Return how many tokens the BPE trained on ``pieces`` makes of them, without ends of documents.

    It leaves no threads behind, which a process that forks later would warn about.
    """
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"
    try:
        tokenizer = train_bpe(pieces, vocab_size=vocab_size)
        return sum(len(tokenizer.encode(piece.text)) for piece in pieces)
    finally:
        if before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = before


def _beginning(pieces: Iterable[Piece]) -> Iterator[str]:
    left = _TRAINED_ON_CHARS
    for piece in pieces:
        yield piece.text
        left -= len(piece.text)
        if left <= 0:
            return
