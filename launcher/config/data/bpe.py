"""The byte-level BPE that a corpus trains (arXiv:1508.07909), with GPT-2's bytes.

It is on the ground floor because a plan counts the tokens of a small corpus. Imports ``tokenizers`` alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"
"""The token after each document."""

_TOKENIZERS_PARALLELISM = "TOKENIZERS_PARALLELISM"

_TRAINED_ON_CHARS = 64 << 20
"""Merges hardly change beyond this much text, and training would take minutes."""


def train_byte_level_bpe(texts: Iterable[str], *, vocab_size: int) -> tokenizers.Tokenizer:
    """Train a tokenizer of at most ``vocab_size`` tokens; equal texts give equal tokenizers.

    Args:
        texts: the corpus in parts; of a large one the first 64 million characters count.
        vocab_size: the 256 bytes, the end-of-text token and the merges; fewer where the text offers fewer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_beginning(texts), trainer)
    return tokenizer


def count_tokens(texts: Sequence[str], *, vocab_size: int) -> int:
    """Return the number of tokens of ``texts`` under a BPE trained on them.

    Ends of documents are not counted.

    It leaves no threads behind, which a process that forks later would warn about.
    """
    with without_threads():
        tokenizer = train_byte_level_bpe(texts, vocab_size=vocab_size)
        return sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)


@contextlib.contextmanager
def without_threads() -> Iterator[None]:
    """Let ``tokenizers`` start no threads: a process that forks later would warn."""
    before = os.environ.get(_TOKENIZERS_PARALLELISM)
    os.environ[_TOKENIZERS_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TOKENIZERS_PARALLELISM]
        else:
            os.environ[_TOKENIZERS_PARALLELISM] = before


def trained_vocabulary(texts: Sequence[str], *, vocab_size: int) -> dict[str, int]:
    """Return the vocabulary, token to id, of a BPE trained on ``texts``.

    No threads are left running.
    """
    with without_threads():
        vocabulary: dict[str, int] = train_byte_level_bpe(texts, vocab_size=vocab_size).get_vocab()
        return vocabulary


def folder_vocabulary(folder: Path) -> dict[str, int] | None:
    """Return the vocabulary in a folder's ``tokenizer.json``; ``None`` if it cannot be loaded."""
    from tokenizers import Tokenizer

    try:
        vocabulary: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    except Exception:  # noqa: BLE001 (the library raises nothing narrower; ranks name what is wrong)
        return None
    return vocabulary


def folder_tokenizer(folder: Path) -> tokenizers.Tokenizer | None:
    """Return the tokenizer of a folder; ``None`` if only a rank can load it.

    It neither truncates nor pads.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # noqa: BLE001 (the library raises nothing narrower; ranks name what is wrong)
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def count_folder_tokens(folder: Path, texts: Sequence[str]) -> int | None:
    """Return the number of tokens of the texts under a folder's tokenizer.

    ``None`` where only a rank can count them.

    Nothing is put before or after. It leaves no threads behind, as ``count_tokens``.
    """
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        return None
    with without_threads():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
        except Exception:  # noqa: BLE001 (the library raises nothing narrower; ranks name what is wrong)
            return None


def _beginning(texts: Iterable[str]) -> Iterator[str]:
    left = _TRAINED_ON_CHARS
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return
