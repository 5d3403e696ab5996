"""One small tokenizer for everything: text to token numbers and back, without padding, templates or special cases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ConfigError
from launcher.models.detokenize import decoder_of
from launcher.paths import exists

if TYPE_CHECKING:
    import tokenizers

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
    *("chat_template*", "additional_chat_templates/*.jinja", "generation_config.json"),
)
"""Of a model folder: what ``save_pretrained`` of a tokenizer writes, and which tokens end an answer."""

_VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""Files of which a tokenizer needs one."""
_INSTEAD = {"data.tokenizer": "data.tokenizer=bpe to train one on the text", "job.tokenizer": "job.tokenizer=bytes"}


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


def instead_of(option: str) -> str:
    """Return what to set where a model has no tokenizer of its own."""
    return _INSTEAD[option]


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder that this process can look into holds the vocabulary of a tokenizer."""
    return any(exists(folder / name) for name in _VOCABULARIES)


def tokenizer_size(folder: Path) -> int | None:
    """Return one more than the largest token number of a folder's tokenizer; ``None`` where only a rank can count.

    Raises:
        OSError: ``tokenizer.json`` cannot be read.
        ValueError: it is damaged; the message names it.
    """
    file = folder / _VOCABULARIES[0]
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        vocabulary, added = tree["model"]["vocab"], tree.get("added_tokens") or []
        numbers = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return max((*numbers, *(token["id"] for token in added)), default=-1) + 1
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{file.name} holds no vocabulary of a tokenizer") from None


def tokenizer_problems(option: str, value: object, folder: Path, *, num_rows: int | None) -> Iterator[ConfigError]:
    """Yield why the tokenizer of ``folder`` cannot be used, as far as its files say without loading it.

    Args:
        option: the option that chose it.
        value: of that option.
        folder: a model folder, or one that a tokenizer was saved into.
        num_rows: of the model's embedding, one a token; ``None`` where they are not known.
    """
    instead = f"set {option}=FOLDER to one that holds the tokenizer of these weights, or {_INSTEAD[option]}"
    if not has_tokenizer(folder):
        why = f"{folder} holds no tokenizer (none of {', '.join(_VOCABULARIES)})"
        yield ConfigError(option, value, why=why, fix=instead)
        return
    try:
        size = tokenizer_size(folder)
    except (OSError, ValueError) as error:
        yield ConfigError(option, value, why=f"the tokenizer in {folder} cannot be read: {error}", fix=instead)
        return
    if size is not None and num_rows is not None and size > num_rows:
        why = f"the tokenizer in {folder} has {size} tokens, and the model {num_rows} rows of embedding, one a token"
        yield ConfigError(option, value, why=why, fix=instead)


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
    except Exception as error:  # damaged files raise whatever the library of their format raises
        first = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        if not has_tokenizer(folder):
            first = f"{folder} holds none of {', '.join(_VOCABULARIES)}"
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
