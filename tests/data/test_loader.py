"""What ranks get: the same samples on any number of them, and evaluations of equal length."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from launcher.config.data.base import Synthetic
from launcher.config.model.gpt2 import Gpt2
from launcher.data.dataloader import Loader, MicroBatch
from launcher.data.dataset import Splits, open_splits
from launcher.data.rows import IGNORE_INDEX, TokenRow, row_of_window
from launcher.errors import ConfigError
from launcher.protocol.plan import Batch


@dataclass(frozen=True)
class Counting:
    """Sequence i is i, i+1, …: each sample tells its number."""

    num_sequences: int

    row_length: int = 4

    def row(self, index: int) -> TokenRow:
        return row_of_window(np.arange(index, index + 5))

    def num_tokens(self, index: int) -> int:
        return 4

    def num_labels(self, index: int) -> int:
        return 4


def splits(train: int, held_out: int) -> Splits:
    return Splits(
        train=Counting(train), held_out=Counting(held_out), tokenizer=None, vocab_size=99, max_length=4, baselines={}
    )


def samples(batch: Batch, step: int) -> list[int]:
    """Return the samples of a step in the order of their positions in the global batch."""
    shares = [Loader(splits(100, 9), batch, seed=3, rank=rank).step(step) for rank in range(batch.data_parallel)]
    return [
        row
        for part in range(batch.gradient_accumulation_steps)
        for share in shares
        for row in share[part].input_ids[:, 0].tolist()
    ]


def test_a_step_holds_the_same_samples_however_it_is_divided() -> None:
    for step in (0, 1, 99):
        expected = samples(Batch(micro_batch=12, gradient_accumulation_steps=1, data_parallel=1), step)
        assert len(set(expected)) > 10
        for micro, accumulation, ranks in ((1, 12, 1), (3, 4, 1), (3, 2, 2), (1, 3, 4), (6, 1, 2), (3, 1, 4)):
            assert (
                samples(Batch(micro_batch=micro, gradient_accumulation_steps=accumulation, data_parallel=ranks), step)
                == expected
            )


def test_a_sequence_has_its_place_in_the_run_on_any_rank_and_after_a_resume() -> None:
    expected = {}
    for step in range(4):
        (whole,) = Loader(
            splits(100, 9), Batch(micro_batch=12, gradient_accumulation_steps=1, data_parallel=1), seed=3, rank=0
        ).step(step)
        assert whole.drawn is not None
        assert (whole.step, whole.drawn.tolist()) == (step, list(range(12 * step, 12 * step + 12)))
        expected |= dict(zip(whole.drawn.tolist(), whole.input_ids[:, 0].tolist(), strict=True))
    batch = Batch(micro_batch=3, gradient_accumulation_steps=1, data_parallel=2)  # half of the batch, from step 2 on
    found = {}
    for rank in (0, 1):
        loader = Loader(splits(100, 9), batch, seed=3, rank=rank)
        loader.continue_at(2, sequences=24)
        for step in range(2, 6):
            (part,) = loader.step(step)
            assert part.drawn is not None
            assert part.step == step
            found |= dict(zip(part.drawn.tolist(), part.input_ids[:, 0].tolist(), strict=True))
    assert found == {place: number for place, number in expected.items() if place >= 24}


def test_an_epoch_passes_each_sequence_once() -> None:
    batch = Batch(micro_batch=5, gradient_accumulation_steps=2, data_parallel=2)
    seen = [sample for step in range(5) for sample in samples(batch, step)]
    assert sorted(seen) == list(range(100))


def test_labels_are_the_next_tokens() -> None:
    (batch,) = Loader(
        splits(7, 7), Batch(micro_batch=2, gradient_accumulation_steps=1, data_parallel=1), seed=0, rank=0
    ).step(0)
    assert (batch.input_ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert batch.input_ids.shape == (2, 4)
    assert torch.equal(batch.labels, batch.input_ids + 1)


@pytest.mark.parametrize("wanted", [1, 5, 6, 7, 11, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_counts_each_sequence_once_in_equally_many_batches(wanted: int, ranks: int) -> None:
    batch = Batch(micro_batch=2, gradient_accumulation_steps=4, data_parallel=ranks)
    shares: list[list[MicroBatch]] = [
        [part for together in Loader(splits(7, 11), batch, seed=0, rank=rank).held_out(wanted) for part in together]
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(part.labels.shape == (2, 4) for share in shares for part in share)
    labelled = [
        row[0].item() - 1 for share in shares for part in share for row in part.labels if (row != IGNORE_INDEX).all()
    ]
    assert sorted(labelled) == list(range(min(wanted, 11)))
    assert all(((part.labels == IGNORE_INDEX).sum(dim=1) % 4 == 0).all() for share in shares for part in share)


def test_synthetic_walks_follow_the_table() -> None:
    data = Synthetic(vocab_size=50, branching=3, num_sequences=64)
    model = Gpt2(
        name="small",
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=8,
        max_position_embeddings=64,
        vocab_size=50,
    )
    opened = open_splits(data, model, sequence_length=32, seed=1)
    assert opened.baselines == {"uniform": pytest.approx(math.log(50)), "best": pytest.approx(math.log(3))}
    assert opened.train.num_sequences == 64
    successors: dict[int, set[int]] = {}
    for part in (opened.train, opened.held_out):
        for i in range(part.num_sequences):
            ids = part.sequence(i).tolist()
            assert len(ids) == 33
            for token, following in itertools.pairwise(ids):
                successors.setdefault(token, set()).add(following)
    assert set(map(len, successors.values())) == {3}
    again = open_splits(data, model, sequence_length=32, seed=1)
    assert np.array_equal(opened.train.sequence(5), again.train.sequence(5))
    assert not np.array_equal(opened.train.sequence(5), opened.held_out.sequence(5))
    assert not np.array_equal(opened.train.sequence(5), opened.train.sequence(6))


def test_a_vocabulary_larger_than_the_models_is_refused() -> None:
    model = Gpt2(
        name="small",
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=8,
        max_position_embeddings=64,
        vocab_size=50,
    )
    with pytest.raises(ConfigError, match="51 tokens and small only 50 embedding rows"):
        open_splits(Synthetic(vocab_size=51), model, sequence_length=32, seed=1)
