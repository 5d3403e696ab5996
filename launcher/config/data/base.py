"""The data group: fields and checks of every data set and corpus, and synthetic tokens."""

from __future__ import annotations

import json
import math
import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from launcher.config.component import Component
from launcher.config.data.bpe import count_folder_tokens, count_tokens
from launcher.config.paths import PathText
from launcher.errors import ConfigError
from launcher.utils.build_cache import default_cache_folder
from launcher.utils.files import read_object, sha256_of


@dataclass(frozen=True, kw_only=True)
class Data(Component):
    """A source of token sequences with a training and a held-out split."""

    group: ClassVar[str] = "data"

    @property
    def known_train_sequences(self) -> int | None:
        """Training sequences; ``None`` where only a rank counts them."""
        return None

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield errors of the files of this data, without importing heavy packages."""
        yield from ()


_MOST_TOKENS_OF_A_BYTE = 11
"""Most tokens of one byte: NFKC expands a byte to at most 11, and no token is below a byte."""
_SHORTEST_SEQUENCE = 2
CHECKPOINT_TOKENIZER = "checkpoint"
"""Value of ``data.tokenizer``: the tokenizer saved in the checkpoint that a run resumes."""
STREAM_LAYOUT = "stream.json"
"""File in a folder of the token cache: the tokenised text and the tokens' positions."""


_TOKEN_CACHE_FORMAT = 2
SMALL_CHARS = 1 << 18
"""A corpus up to this size is read whole before anything starts."""


class TextChunk(NamedTuple):
    """A piece of text, small enough to tokenise at once."""

    text: str
    ends_document: bool
    """Whether a document ends here; the tokenizer's end-of-text token follows it."""


@dataclass(frozen=True, kw_only=True)
class Corpus(Data):
    """Text tokenised once into a memory-mapped cache; sequences are cut from it."""

    tokenizer: PathText = "auto"
    """``bpe`` (trained on the text), ``model``, ``checkpoint``, ``auto``, a name or a folder.
    ``model`` is the model's own, ``checkpoint`` the one of the checkpoint that a run resumes. ``auto`` is ``model``
    where the model's weights came with a tokenizer, ``checkpoint`` where a run resumes on other data than the
    checkpoint was trained on, else ``bpe``."""

    vocab_size: int = 4096
    """Size of the BPE that is trained here; other tokenizers have their own."""

    held_out: float = 0.05
    """Share of tokens kept for evaluation: the end of the stream, so the last documents."""

    cache: PathText | None = None
    """Folder for tokenised data; by default ``$XDG_CACHE_HOME/launcher/data``."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a split or vocabulary that leaves nothing."""
        if not 0 < self.held_out < 1:
            yield self.error("held_out", "must lie between 0 and 1", "set data.held_out=0.05")
        yield from self.validate_minimum(257, "vocab_size")

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield a cache that cannot be written."""
        there = self.cache_folder
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            why = f"{there} is not a folder that this user can write to"
            fix = "set data.cache or XDG_CACHE_HOME to a writable folder"
            yield ConfigError("data.cache", self.cache_folder, why=why, fix=fix)

    def validate_length(self, sequence_length: int, *, tokenizer: Path | None = None) -> Iterator[ConfigError]:
        """Yield why a small corpus has no training or held-out sequence; ranks count large ones.

        The BPE is trained as a rank would, so the number is exact. A tokenizer on this machine is loaded; one that a
        rank fetches makes at most eleven tokens of a byte.

        Args:
            sequence_length: tokens in one sequence, its last label not counted.
            tokenizer: folder of the one that the corpus does not train.
        """
        try:
            pieces = self.small_pieces()
        except ConfigError as unreadable:
            yield unreadable
            return
        if pieces is None:
            return
        texts, documents = [piece.text for piece in pieces], sum(piece.ends_document for piece in pieces)
        counted = None if tokenizer is None else count_folder_tokens(tokenizer, texts)
        most = _MOST_TOKENS_OF_A_BYTE * sum(len(text.encode()) for text in texts) + documents
        if self.trains_tokenizer:
            most = num_tokens = count_tokens(texts, vocab_size=self.vocab_size) + documents
        elif counted is not None:
            num_tokens = counted + documents
            most = num_tokens + len(texts)  # Transformers may put a space before each
        else:
            num_tokens = most
        if self.split_error(most, sequence_length) and (error := self.split_error(num_tokens, sequence_length)):
            yield error

    def split_error(self, num_tokens: int, sequence_length: int) -> ConfigError | None:
        """Return why a split of ``num_tokens`` tokens has no sequence; ``None`` if both have one."""
        needed, held_out = sequence_length + 1, round(num_tokens * self.held_out)
        train = num_tokens - held_out
        if min(train, held_out) >= needed:
            return None
        takes = f"and one sequence takes {sequence_length} + 1"
        shares = (
            (math.ceil(needed / num_tokens * 10**digits) / 10**digits for digits in (2, 3, 4)) if num_tokens else ()
        )
        fitting = [share for share in shares if needed <= round(num_tokens * share) <= num_tokens - needed]
        longest, halves = min(train, held_out) - 1, num_tokens // 2 - 1
        if fitting:
            fix = f"set data.held_out={fitting[0]:g}, or give more text"
        elif longest >= _SHORTEST_SEQUENCE:
            fix = f"give more text, or set job.sequence_length={longest}"
        elif halves >= _SHORTEST_SEQUENCE:
            fix = f"give more text, or set job.sequence_length={halves} data.held_out=0.5"
        else:
            fix = "give more text"
        if fitting and train >= needed:
            return self.error("held_out", f"leaves {held_out} of {num_tokens} tokens to evaluate, {takes}", fix)
        why = f"has {num_tokens} tokens, {train} to train on and {held_out} to evaluate, {takes}"
        return ConfigError(self.source_option, why=why, fix=fix)

    @property
    def has_cached_tokens(self) -> bool:
        """Whether tokens of this text are in the cache, under any tokenizer."""
        return any(self._is_source_of(file) for file in self.cache_folder.glob(f"*/{STREAM_LAYOUT}"))

    def _is_source_of(self, layout: Path) -> bool:
        try:
            return read_object(layout).get("source") == self.fingerprint()
        except (OSError, ValueError):
            return False

    @property
    def source_option(self) -> str:
        """The option that names the text."""
        return "data.path"

    def with_path(self, path: str | tuple[str, ...]) -> Self:
        """Return the same options with other text: what ``source_option`` takes.

        Raises:
            ConfigError: the options take no such text.
        """
        field = self.source_option.partition(".")[2]
        if field not in self.__dataclass_fields__:
            why = f"data={self.kind} has no option {self.source_option} that names other text"
            raise ConfigError("job.eval_sets", path, why=why, fix="leave it out, or set data=text")
        values: dict[str, Any] = {field: path}
        return replace(self, **values)

    def small_pieces(self, most: int = SMALL_CHARS) -> list[TextChunk] | None:
        """Return the whole text of a small local corpus; ``None`` of others.

        Args:
            most: characters of a small one.

        Raises:
            ConfigError: it cannot be read.
        """
        return None

    @property
    def text_bytes(self) -> int | None:
        """Bytes of the whole text, for progress; ``None`` where only reading it tells."""
        return None

    @property
    def trains_tokenizer(self) -> bool:
        """Whether the tokenizer is trained on the text.

        Composition replaces ``auto`` where the model has its own.
        """
        return self.tokenizer in ("auto", "bpe")

    @property
    def cache_folder(self) -> Path:
        """Where tokenised data is kept."""
        return Path(self.cache).expanduser() if self.cache else default_cache_folder("data")

    def token_cache(self, tokenizer: str) -> Path:
        """Return the folder of this text's tokens in the cache, which may not exist.

        Args:
            tokenizer: what the tokens depend on besides the text: ``trained_tokenizer``, or a hash of a given one.
        """
        key = json.dumps([_TOKEN_CACHE_FORMAT, self.fingerprint(), tokenizer])
        return self.cache_folder / sha256_of(key.encode())[:32]

    @property
    def trained_tokenizer(self) -> str:
        """Return the name of the trained BPE for ``token_cache``."""
        return f"bpe {self.vocab_size}"

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a string that changes with the text.

        It must be cheap: every rank of every run asks for it.
        """

    @abstractmethod
    def local_pieces(self) -> Iterator[TextChunk]:
        """Yield the text of local files in a fixed order, without importing ``datasets``.

        Raises:
            ConfigError: a file turns out not to be text.
        """


@dataclass(frozen=True, kw_only=True)
class Synthetic(Data):
    """Sequences from a fixed random bigram table.

    The loss floor is known, there are no files, and the vocabulary is of any size.
    """

    kind: ClassVar[str] = "synthetic"

    vocab_size: int = 256
    """Distinct tokens."""

    branching: int = 4
    """Equally likely successors of each token, so the best possible loss is ln(branching)."""

    num_sequences: int = 65536
    """Distinct training sequences before the data repeats."""

    @property
    def known_train_sequences(self) -> int:
        """All of them."""
        return self.num_sequences

    def validate(self) -> Iterator[ConfigError]:
        """Reject a table that cannot be drawn."""
        yield from self.validate_minimum(2, "vocab_size")
        yield from self.validate_minimum(1, "branching", "num_sequences")
        if self.branching > self.vocab_size:
            yield self.error("branching", f"exceeds data.vocab_size={self.vocab_size}", "set data.branching=4")
