"""Training and held-out sequences of a data set, opened on a rank."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from launcher.config.data.auto import AutoData
from launcher.config.data.base import STREAM_LAYOUT, Corpus, Data, Synthetic
from launcher.config.data.order import SampleOrder, Shuffled
from launcher.config.model.base import Model
from launcher.config.model.image_text import read_image_text
from launcher.config.run import Run
from launcher.config.supported_models import packing_error
from launcher.data.example_encoding import example_folders
from launcher.data.example_rows import RowSettings, open_rows
from launcher.data.rows import ExampleRows, PairRows, Sequences, TokenRow, row_of_window
from launcher.data.token_cache import given_folder, token_folder
from launcher.errors import ConfigError
from launcher.models.pretrained import transformers_config
from launcher.models.tokenizer import FastTokenizer
from launcher.utils.files import read_json


class TokenStream:
    """Tokens of a whole corpus in the segments that a file holds them in."""

    def __init__(self, segments: Sequence[np.ndarray]) -> None:
        self._segments = segments
        self._starts = [0, *itertools.accumulate(len(segment) for segment in segments)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens ``start`` to ``stop`` as int64."""
        parts = []
        number = bisect_right(self._starts, start) - 1
        while start < stop:
            segment, offset = self._segments[number], start - self._starts[number]
            part = segment[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
            number += 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def open_stream(folder: Path) -> TokenStream:
    """Map the tokens of a cache folder without reading them.

    The folder's ``stream.json`` says where in the Arrow file the tokens lie, so that opening needs neither
    ``datasets`` nor pyarrow, which take longer to import than everything else here.
    """
    layout = read_json(folder / STREAM_LAYOUT)
    dtype = np.dtype(layout["dtype"])
    whole = np.memmap(folder / layout["file"], mode="r", dtype=np.uint8)
    return TokenStream([whole[start : start + size * dtype.itemsize].view(dtype) for start, size in layout["segments"]])


@dataclass(frozen=True, kw_only=True)
class TokenWindows:
    """Sequences cut from a span of a stream, each starting where the one before ended."""

    stream: TokenStream
    first: int
    """First token of the span."""
    last: int
    """One past its last token."""
    length: int
    """Tokens a model sees of each sequence; one more is read, as the last label."""

    @property
    def num_sequences(self) -> int:
        """How many whole sequences the span holds."""
        return max(0, (self.last - self.first - 1) // self.length)

    @property
    def row_length(self) -> int:
        """Tokens of every row."""
        return self.length

    def num_tokens(self, index: int) -> int:
        """Return the tokens of sequence ``index``."""
        return self.length

    def num_labels(self, index: int) -> int:
        """Return how many labels of sequence ``index`` count: all."""
        return self.length

    def sequence(self, index: int) -> np.ndarray:
        """Return the tokens of sequence ``index`` and the one after, int64 of shape (length + 1,)."""
        start = self.first + index * self.length
        return self.stream.read(start, start + self.length + 1)

    def row(self, index: int) -> TokenRow:
        """Return sequence ``index``."""
        return row_of_window(self.sequence(index))


_MOST_HELD_OUT = 1024


class BigramSequences:
    """Random walks in a table where every token has ``branching`` equally likely successors.

    Only raw outputs of Philox (Salmon et al., 2011) are used, which numpy keeps stable between versions.
    """

    def __init__(self, data: Synthetic, *, sequence_length: int, seed: int, split: str) -> None:
        self._data, self._length, self._seed, self._split = data, sequence_length, seed, split
        shuffled = np.argsort(self._raw("table", 0, data.vocab_size), kind="stable")
        self._first_successors: list[int] = shuffled.tolist()  # each token once: all are equally common

    @property
    def num_sequences(self) -> int:
        """How many there are before the data repeats."""
        return self._data.num_sequences if self._split == "train" else min(self._data.num_sequences, _MOST_HELD_OUT)

    @property
    def row_length(self) -> int:
        """Tokens of every row."""
        return self._length

    def num_tokens(self, index: int) -> int:
        """Return the tokens of sequence ``index``."""
        return self._length

    def num_labels(self, index: int) -> int:
        """Return how many labels of sequence ``index`` count: all."""
        return self._length

    def row(self, index: int) -> TokenRow:
        """Return sequence ``index``."""
        return row_of_window(self.sequence(index))

    def sequence(self, index: int) -> np.ndarray:
        """Return sequence ``index`` as int64 of shape (sequence_length + 1,)."""
        vocab_size, firsts = self._data.vocab_size, self._first_successors
        start, *choices = self._raw(self._split, index, self._length + 1).tolist()
        tokens = [start % vocab_size]
        for choice in choices:
            tokens.append((firsts[tokens[-1]] + choice % self._data.branching) % vocab_size)
        walk: np.ndarray = np.array(tokens, np.int64)
        return walk

    def _raw(self, purpose: str, index: int, size: int) -> np.ndarray:
        key = hashlib.blake2b(f"{purpose} {self._seed} {index}".encode(), digest_size=16).digest()
        raw: np.ndarray = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)
        return raw


def uniform_loss(vocab_size: int) -> float:
    """Return the loss in nats a token of a model that finds every token equally likely."""
    return math.log(vocab_size)


def unigram_loss(train: np.ndarray, held_out: np.ndarray, *, vocab_size: int) -> float:
    """Return the held-out loss (nats a token) of the training text's unigram frequencies.

    They are add-one smoothed.

    Args:
        train: token numbers to count.
        held_out: token numbers to predict.
        vocab_size: one more than the largest token number.
    """
    counts = np.bincount(train, minlength=vocab_size) + 1
    log_shares = np.log(counts / counts.sum())
    return float(-log_shares[held_out].mean())


_COUNTED_TOKENS = 20_000_000
"""Most tokens of each split that the unigram baseline counts; more hardly change it."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Training and held-out sequences of a run."""

    train: Sequences
    held_out: Sequences
    tokenizer: FastTokenizer | None
    """``None`` if tokens do not stand for text."""
    vocab_size: int
    """Tokens that can occur; the model's embedding may have more rows."""
    max_length: int
    """Longest sequence of the model, in tokens."""
    baselines: Mapping[str, float]
    """Losses to compare with, in nats a token or a pair, by name."""
    summary: str = ""
    """How examples are laid out in rows; empty where rows are windows of a stream."""
    whole: TokenStream | None = None
    """All tokens of a text, in their order."""
    order: SampleOrder | None = None
    """Of the training sequences; ``None``: each once an epoch, shuffled."""
    train_sources: tuple[str, ...] = ()
    """Names of the sources of a mixture; empty if there is only one, or one stream of all."""
    held_out_sources: tuple[str, ...] = ()
    """The same of what is held out."""

    @property
    def is_paired(self) -> bool:
        """Whether the sequences are preferences."""
        return isinstance(self.train, PairRows)

    @functools.cached_property
    def train_order(self) -> SampleOrder:
        """The order of the training sequences."""
        return self.order or Shuffled(self.train.num_sequences)


def open_run_splits(run: Run, data: Data | None = None, *, heartbeat: Callable[[], None] = lambda: None) -> Splits:
    """Open the data of a run on every rank, as its strategy and kernels take it.

    Args:
        run: whose job has batches.
        data: to open instead of the run's.
        heartbeat: called at least every few seconds of work.

    Raises:
        ConfigError: the parts do not fit together, with the numbers.
        EnvironmentProblem: something must be fetched and cannot be, or the cache cannot be written.
    """
    data = run.data if data is None else data
    if isinstance(data, AutoData):
        for error in run.batched_job.validate_shapes(run, data, data.shapes):
            raise error
    return open_splits(
        data,
        run.model,
        sequence_length=run.batched_job.sequence_length,
        seed=run.job.seed,
        packs=packing_error(run.model, run.attention) is None,
        equal_shapes=run.parallel.needs_equal_shapes,
        heartbeat=heartbeat,
    )


def open_splits(
    data: Data,
    model: Model,
    *,
    sequence_length: int,
    seed: int,
    packs: bool = True,
    equal_shapes: bool = False,
    heartbeat: Callable[[], None] = lambda: None,
) -> Splits:
    """Open ``data`` for ``model`` on every rank; the first on each machine does one-time work.

    Args:
        data: what to open.
        model: must take sequences of that length and all tokens that occur.
        sequence_length: tokens in one sequence, its last label not counted.
        seed: draws synthetic data, and packs examples; text does not depend on it.
        packs: whether model and kernel keep examples of one row apart.
        equal_shapes: whether all batches must have ``sequence_length`` tokens a row.
        heartbeat: called at least every few seconds of work, so that it does not look like a stall.

    Raises:
        ConfigError: the parts do not fit together, with the numbers.
        EnvironmentProblem: something must be fetched and cannot be, or the cache cannot be written.
    """
    vocab_size, max_length = _limits(model)
    if sequence_length > max_length:
        why, fix = f"{model.name} takes at most {max_length} tokens", f"set job.sequence_length={max_length}"
        raise ConfigError("job.sequence_length", sequence_length, why=why, fix=fix)
    if isinstance(data, Synthetic):
        splits = _open_synthetic(data, max_length=max_length, sequence_length=sequence_length, seed=seed)
    elif isinstance(data, AutoData) and not data.is_stream:
        settings = RowSettings(
            sequence_length=sequence_length,
            packed=packs if data.packing is None else data.packing,
            on_long=data.on_long,
            held_out=data.held_out,
            seed=seed,
        )
        splits = _open_examples(
            data, model, settings, max_length=max_length, equal_shapes=equal_shapes, heartbeat=heartbeat
        )
    else:
        assert isinstance(data, Corpus), f"no way to open {type(data).__name__}"
        splits = _open_corpus(data, model, max_length=max_length, sequence_length=sequence_length, heartbeat=heartbeat)
    if splits.vocab_size > vocab_size:
        option, value = ("data.tokenizer", getattr(data, "tokenizer", "bpe"))
        why = f"it has {splits.vocab_size} tokens and {model.name} only {vocab_size} embedding rows"
        raise ConfigError(option, value, why=why, fix="set data.tokenizer=model, or bpe with a smaller data.vocab_size")
    return splits


def _limits(model: Model) -> tuple[int, int]:
    if shape := model.shape():
        return shape.vocab_size, shape.max_position_embeddings
    config = transformers_config(model).get_text_config()
    return config.vocab_size, getattr(config, "max_position_embeddings", None) or 1 << 62  # some have no limit


def _open_corpus(
    data: Corpus, model: Model, *, max_length: int, sequence_length: int, heartbeat: Callable[[], None]
) -> Splits:
    folder, tokenizer = token_folder(data, model, heartbeat=heartbeat)
    stream = open_stream(folder)
    cut = len(stream) - round(len(stream) * data.held_out)
    train = TokenWindows(stream=stream, first=0, last=cut, length=sequence_length)
    held_out = TokenWindows(stream=stream, first=cut, last=len(stream), length=sequence_length)
    if error := data.split_error(len(stream), sequence_length):
        raise error
    heartbeat()
    known, asked = (stream.read(part.first, min(part.last, part.first + _COUNTED_TOKENS)) for part in (train, held_out))
    vocab_size = tokenizer.vocab_size
    return Splits(
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        max_length=max_length,
        whole=stream,
        baselines={
            "uniform": uniform_loss(vocab_size),
            "unigram": unigram_loss(known, asked, vocab_size=vocab_size),
        },
    )


def _open_examples(
    data: AutoData,
    model: Model,
    settings: RowSettings,
    *,
    max_length: int,
    equal_shapes: bool,
    heartbeat: Callable[[], None],
) -> Splits:
    folders = example_folders(data, model, heartbeat=heartbeat)
    opened = open_rows(
        folders.train,
        replace(settings, splits_documents=folders.splits_documents),
        weights=data.weights or None,
        equal_shapes=equal_shapes,
        heartbeat=heartbeat,
        evaluation=folders.evaluation,
        evaluation_splits=folders.evaluation_splits,
    )
    if isinstance(opened.train, ExampleRows) and opened.train.filler is not None:
        _check_processor(data, model, heartbeat=heartbeat)
    vocab_size, is_paired = folders.tokenizer.vocab_size, isinstance(opened.train, PairRows)
    return Splits(
        train=opened.train,
        held_out=opened.held_out,
        tokenizer=folders.tokenizer,
        vocab_size=vocab_size,
        max_length=max_length,
        baselines={"reference": math.log(2)} if is_paired else {"uniform": uniform_loss(vocab_size)},
        summary=opened.summary,
        order=opened.order,
        train_sources=data.source_names("path"),
        held_out_sources=data.held_out_source_names,
    )


def _check_processor(data: AutoData, model: Model, *, heartbeat: Callable[[], None]) -> None:
    """Raise unless images were preprocessed for this model.

    Raises:
        ConfigError: they were by the files of another one.
    """
    facts, used = model.image_text(), read_image_text(given_folder(data, model, heartbeat=heartbeat))
    if facts is None or used is None or (facts.family, facts.token_id) != (used.family, used.token_id):
        why = f"its folder preprocesses images for another model than {model.name}"
        raise ConfigError("data.tokenizer", data.tokenizer, why=why, fix="set data.tokenizer=model")


def _open_synthetic(data: Synthetic, *, max_length: int, sequence_length: int, seed: int) -> Splits:
    train = BigramSequences(data, sequence_length=sequence_length, seed=seed, split="train")
    return Splits(
        train=train,
        held_out=BigramSequences(data, sequence_length=sequence_length, seed=seed, split="held-out"),
        tokenizer=None,
        vocab_size=data.vocab_size,
        max_length=max_length,
        baselines={"uniform": uniform_loss(data.vocab_size), "best": float(np.log(data.branching))},
    )
