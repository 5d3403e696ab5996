"""Open a data configuration on a rank: a training and a held-out split, and what there is to know about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from launcher.data.base import Corpus, Data
from launcher.data.baselines import uniform_loss, unigram_loss
from launcher.data.bigrams import Bigrams
from launcher.data.stream import Sequences, Windows, open_stream
from launcher.data.synthetic import Synthetic
from launcher.data.tokens import token_folder
from launcher.errors import ConfigError
from launcher.models.base import Model
from launcher.models.tokenizer import Tokenizer

_COUNTED_TOKENS = 20_000_000
"""The unigram baseline counts no more tokens than this of each split: beyond, frequencies hardly move."""


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What a run learns from and what it is judged by."""

    train: Sequences
    held_out: Sequences
    tokenizer: Tokenizer | None
    """``None`` where tokens stand for no text."""
    vocab_size: int
    """Tokens that can occur; the model's embedding may have more rows."""
    context: int
    """Longest sequence of the model, in tokens."""
    baselines: Mapping[str, float]
    """Losses to compare with, in nats a token, by name."""


def open_splits(
    data: Data, model: Model, *, sequence_length: int, seed: int, beat: Callable[[], None] = lambda: None
) -> Splits:
    """Open ``data`` for ``model``; every rank calls this, and the first on each machine does what is done once.

    Args:
        data: what to open.
        model: must take sequences of that length and all tokens that occur.
        sequence_length: tokens in one sequence, its last label not counted.
        seed: draws synthetic data; text does not depend on it.
        beat: called at least every few seconds of work, so that it does not look like a stall.

    Raises:
        ConfigError: the parts do not fit together, with the numbers.
        EnvironmentProblem: something must be fetched and cannot be, or the cache cannot be written.
    """
    vocab_size, context = _limits(model)
    if sequence_length > context:
        why, fix = f"{model.name} takes at most {context} tokens", f"set job.sequence_length={context}"
        raise ConfigError("job.sequence_length", sequence_length, why=why, fix=fix)
    if isinstance(data, Synthetic):
        splits = _open_synthetic(data, context=context, sequence_length=sequence_length, seed=seed)
    else:
        assert isinstance(data, Corpus), f"no way to open {type(data).__name__}"
        splits = _open_corpus(data, model, context=context, sequence_length=sequence_length, beat=beat)
    if splits.vocab_size > vocab_size:
        option, value = ("data.tokenizer", getattr(data, "tokenizer", "bpe"))
        why = f"it has {splits.vocab_size} tokens and {model.name} only {vocab_size} rows of embedding"
        raise ConfigError(option, value, why=why, fix="set data.tokenizer=model, or bpe with a smaller data.vocab_size")
    return splits


def _limits(model: Model) -> tuple[int, int]:
    if shape := model.shape():
        return shape.vocab_size, shape.context
    config = model.transformers_config().get_text_config()
    return config.vocab_size, getattr(config, "max_position_embeddings", None) or 1 << 62  # some have no limit


def _open_corpus(data: Corpus, model: Model, *, context: int, sequence_length: int, beat: Callable[[], None]) -> Splits:
    folder, tokenizer = token_folder(data, model, beat=beat)
    stream = open_stream(folder)
    cut = len(stream) - round(len(stream) * data.held_out)
    train = Windows(stream=stream, first=0, last=cut, length=sequence_length)
    held_out = Windows(stream=stream, first=cut, last=len(stream), length=sequence_length)
    if problem := data.split_problem(len(stream), sequence_length):
        raise problem
    beat()
    known, asked = (stream.read(part.first, min(part.last, part.first + _COUNTED_TOKENS)) for part in (train, held_out))
    vocab_size = tokenizer.vocab_size
    return Splits(
        train=train,
        held_out=held_out,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        context=context,
        baselines={
            "uniform": uniform_loss(vocab_size),
            "unigram": unigram_loss(known, asked, vocab_size=vocab_size),
        },
    )


def _open_synthetic(data: Synthetic, *, context: int, sequence_length: int, seed: int) -> Splits:
    train = Bigrams(data, sequence_length=sequence_length, seed=seed, split="train")
    return Splits(
        train=train,
        held_out=Bigrams(data, sequence_length=sequence_length, seed=seed, split="held-out"),
        tokenizer=None,
        vocab_size=data.vocab_size,
        context=context,
        baselines={"uniform": uniform_loss(data.vocab_size), "best": float(np.log(data.branching))},
    )
