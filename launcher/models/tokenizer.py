"""Tokenizers without padding or templates, and decoding that keeps invalid bytes apart.

The decoder is exact: bytes that form no character never change the text of the tokens beside them.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.data.chat_template import ChatTemplate
from launcher.config.model.base import TOKENIZER_FILES, VOCABULARY_FILES, has_tokenizer
from launcher.errors import ConfigError
from launcher.utils.files import exists

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast


REPLACEMENT = "\ufffd"
"""Character of decoders for bytes that do not form a character, or not yet."""
_MANY = 1000
"""Tokens from which other threads should run meanwhile: ``decode`` holds the GIL."""


def decoder_of(inner: tokenizers.Tokenizer) -> Callable[[Sequence[int]], str]:
    """Return a function from tokens to text, without special tokens."""

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
    """Return the byte of the token ``<0xNN>``, ``None`` for any other token."""
    if len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


@functools.cache
def byte_of_character() -> Mapping[str, int]:
    """Return the byte of each character by which GPT-2's tokenizer writes bytes."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


def _apart(tokens: Iterator[str]) -> Iterator[str]:
    """Yield tokens, with an empty one between bytes that form characters and those that do not."""
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


@dataclass(frozen=True, kw_only=True)
class FastTokenizer:
    """A ``tokenizers.Tokenizer`` and the token that ends a document."""

    inner: tokenizers.Tokenizer
    end_id: int | None
    """Put after each document; ``None`` where the vocabulary has no such token."""
    chat_template: ChatTemplate | None = None
    """With which conversations became text, where it is not the tokenizer's own default."""

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens with added ones: the largest token id plus one."""
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


def load_tokenizer(folder: Path, *, option: str, config_option: str | None = None) -> FastTokenizer:
    """Return the tokenizer of a model folder. Imports Transformers.

    Args:
        folder: what ``save_pretrained`` of a tokenizer writes, alone or among a model's files.
        option: the option that chose it, for messages.
        config_option: the option that names the folder, for messages about its config.json; ``option`` by default.

    Raises:
        ConfigError: there is none, or it is not a fast one.
    """
    fix = "set data.tokenizer=bpe to train one on the text"
    loaded = load_transformers_tokenizer(folder, option=option, config_option=config_option or option, fix=fix)
    return FastTokenizer(inner=loaded.backend_tokenizer, end_id=loaded.eos_token_id)


def load_transformers_tokenizer(folder: Path, *, option: str, config_option: str, fix: str) -> PreTrainedTokenizerFast:
    """Return a folder's tokenizer as Transformers loads it, without truncation and padding.

    Args:
        folder: what ``save_pretrained`` of a tokenizer writes, alone or among a model's files.
        option: the option that chose it, for messages.
        config_option: the option that names the folder; named when its config.json is at fault.
        fix: what to do instead.

    Raises:
        ConfigError: there is no fast tokenizer, or Transformers cannot read config.json, which it reads first.
    """
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged files raise whatever the library of their format raises
        _raise_for_config(folder, config_option)
        first = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        if not has_tokenizer(folder):
            first = f"{folder} holds none of {', '.join(VOCABULARY_FILES)}"
        raise ConfigError(option, folder, why=f"no tokenizer can be loaded: {first}", fix=fix) from error
    if not loaded.is_fast:
        raise ConfigError(option, folder, why="has only a slow tokenizer written in Python", fix=fix)
    inner = loaded.backend_tokenizer
    inner.no_truncation()
    inner.no_padding()
    return loaded


def _raise_for_config(folder: Path, option: str) -> None:
    """Raise a ConfigError if Transformers cannot read the folder's config.json.

    It names the tokenizer's class.
    """
    from transformers import AutoConfig

    if not exists(folder / "config.json"):
        return
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a broken file raises whatever the class's own checks raise
        raise config_json_error(option, folder, folder, error) from error


def config_json_error(option: str, value: object, folder: Path, error: Exception) -> ConfigError:
    """Return the error for a folder whose config.json Transformers cannot read."""
    said = " ".join(line.strip() for line in f"{type(error).__name__}: {error}".strip().splitlines()[:2])
    fix = "correct it, or choose a model whose code is part of the installed Transformers"
    return ConfigError(option, value, why=f"Transformers cannot read {folder}/config.json: {said}", fix=fix)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a model folder's tokenizer, chat templates and generation config to another one."""
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
