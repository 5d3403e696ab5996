"""One small tokenizer for everything: text to token numbers and back, without padding, templates or special cases."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ConfigError
from launcher.models.detokenize import decoder_of

if TYPE_CHECKING:
    import tokenizers

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
    *("chat_template*", "additional_chat_templates/*.jinja", "generation_config.json"),
)
"""Of a model folder: what ``save_pretrained`` of a tokenizer writes, and which tokens end an answer."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A ``tokenizers.Tokenizer`` and the token that ends a document."""

    inner: tokenizers.Tokenizer
    end_id: int | None
    """Put after each document; ``None`` where the vocabulary has no such token."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included: one more than the largest token number that can occur."""
        return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text`` alone: nothing is put before or after."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, on all cores the process may use."""
        return [encoded.ids for encoded in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special tokens are left out."""
        return decoder_of(self.inner)(ids)

    def to_json(self) -> str:
        """Return everything that decides how text becomes tokens."""
        text: str = self.inner.to_str()
        return text


def load_tokenizer(folder: Path, *, option: str) -> Tokenizer:
    """Return the tokenizer of a model folder. Imports Transformers.

    Args:
        folder: what ``save_pretrained`` of a tokenizer writes, alone or among a model's files.
        option: the option that chose it, for messages.

    Raises:
        ConfigError: there is none, or it is not a fast one.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().split("\n")[0]
        fix = "set data.tokenizer=bpe to train one on the text"
        raise ConfigError(option, folder, why=f"no tokenizer can be loaded: {first}", fix=fix) from error
    if not loaded.is_fast:
        fix = "set data.tokenizer=bpe to train one on the text"
        raise ConfigError(option, folder, why="has only a slow tokenizer written in Python", fix=fix)
    inner = loaded.backend_tokenizer
    inner.no_truncation()
    inner.no_padding()
    return Tokenizer(inner=inner, end_id=loaded.eos_token_id)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer of a model folder, its chat templates and its generation config into another folder."""
    for pattern in _FILES:
        for file in source.glob(pattern):
            if file.is_file():
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
