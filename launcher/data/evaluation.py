"""Whole texts as windows that predict every token once, and the bytes that tokens stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from launcher.config.data.auto import AutoData
from launcher.config.data.base import Corpus
from launcher.config.job.eval_sets import examples_in_set
from launcher.data.dataset import TokenStream, open_stream
from launcher.data.rows import IGNORE_INDEX, TokenRow
from launcher.data.token_cache import token_folder
from launcher.errors import ConfigError
from launcher.models.tokenizer import REPLACEMENT, fallback_byte, has_decoder

if TYPE_CHECKING:
    from launcher.config.model.base import Model
    from launcher.models.tokenizer import FastTokenizer


@dataclass(frozen=True, kw_only=True)
class TextWindows:
    """Windows over a whole text in which every token is a label exactly once.

    The text is preceded by the end-of-text token where the tokenizer has one, as every later document is, so that the
    first token has a context too; without such a token it has none and is not counted.

    With ``stride == length`` windows do not overlap: a token's context begins with its window. With a smaller stride
    each window begins ``stride`` tokens after the one before, and only its tokens that no window before had count
    (the sliding windows of Transformers' guide "Perplexity of fixed-length models"), so every token but those of the
    first window has at least ``length - stride`` tokens of context, at ``length / stride`` times the work.
    """

    stream: TokenStream
    prefix: int | None
    """Token before the first one."""
    length: int
    """Tokens a model sees at once."""
    stride: int

    @property
    def row_length(self) -> int:
        """Tokens of every row with padding."""
        return self.length

    @property
    def num_counted(self) -> int:
        """How many tokens count in all windows."""
        return len(self.stream) - (self.prefix is None)

    @property
    def num_sequences(self) -> int:
        """How many windows there are."""
        return 1 + max(0, -(-(self.num_counted - self.length) // self.stride))

    def num_tokens(self, index: int) -> int:
        """Return the tokens of window ``index``; only the last may have fewer than ``length``."""
        return min(self.length, self.num_counted - index * self.stride)

    def num_labels(self, index: int) -> int:
        """Return how many tokens count in window ``index``."""
        return self.num_tokens(index) - (self.length - self.stride if index else 0)

    def row(self, index: int) -> TokenRow:
        """Return window ``index``; labels are -100 where a token counts in another window."""
        own = 0 if self.prefix is None else 1
        start = index * self.stride
        tokens = self.stream.read(max(0, start - own), min(start - own + self.length + 1, len(self.stream)))
        if start < own:
            tokens = np.concatenate([np.array([self.prefix], np.int64), tokens])
        labels = tokens[1:].copy()
        labels[: self.length - self.stride if index else 0] = IGNORE_INDEX
        return TokenRow(input_ids=tokens[:-1], labels=labels)


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A named text, open."""

    name: str
    windows: TextWindows


def open_eval_sets(
    data: Corpus,
    model: Model,
    sets: Mapping[str, str | tuple[str, ...]],
    *,
    tokenizer: FastTokenizer,
    length: int,
    stride: int,
    heartbeat: Callable[[], None],
) -> list[EvalSet]:
    """Open the texts of ``job.eval_sets``, tokenised as the run's data is.

    Args:
        data: of the run; each set has its options.
        model: of the run.
        sets: paths by name.
        tokenizer: of the run's data.
        length: tokens in one window.
        stride: tokens between the starts of two windows.
        heartbeat: called meanwhile.

    Raises:
        ConfigError: a set has no token to predict.
    """
    found = []
    for name, path in sets.items():
        text = data.with_path(path)
        if isinstance(text, AutoData) and not text.is_stream:
            raise examples_in_set(name, path)
        folder, _ = token_folder(text, model, tokenizer=tokenizer, heartbeat=heartbeat)
        windows = TextWindows(stream=open_stream(folder), prefix=tokenizer.end_id, length=length, stride=stride)
        if windows.num_counted < 1:
            raise ConfigError(f"job.eval_sets.{name}", path, why="has no token to predict", fix="give more text")
        found.append(EvalSet(name=name, windows=windows))
    return found


def token_bytes(tokenizer: FastTokenizer) -> np.ndarray:
    """Return how many bytes of UTF-8 text each token stands for, int64 (vocab_size,).

    A byte-level token has a character for each byte. Of other tokens it is what they add to the text of a token before
    them. Special tokens, such as the end of a document, have none.
    """
    inner = tokenizer.inner
    names = {number: token for token, number in inner.get_vocab(with_added_tokens=True).items()}
    added = inner.get_added_tokens_decoder()
    sizes: np.ndarray = np.zeros(tokenizer.vocab_size, np.int64)
    is_byte_level = has_decoder(inner, "ByteLevel")
    others = []
    for number, token in names.items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(added[number].content.encode())
        elif is_byte_level:
            sizes[number] = len(token)
        elif fallback_byte(token) is not None:
            sizes[number] = 1
        else:
            others.append(number)
    if others:
        sizes[others] = _added_bytes(tokenizer, others)
    return sizes


def _added_bytes(tokenizer: FastTokenizer, numbers: Sequence[int]) -> list[int]:
    """Return the bytes that each token adds behind another one."""
    decode = tokenizer.inner.decode_batch
    before, anchor = next(
        (text, number) for number in numbers if (text := decode([[number]])[0]).strip() and REPLACEMENT not in text
    )
    texts = decode([[anchor, number] for number in numbers])
    return [len(text.encode()) - len(before.encode()) for text in texts]
