"""Sequences as tensors: the micro-batches of a step, and those of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from launcher.batch import Batch
from launcher.data.open import Splits
from launcher.data.order import positions, sample_index

IGNORED = -100
"""Label that counts in no loss: ``torch.nn.functional.cross_entropy`` leaves it out by default."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """What one forward pass of one rank works on; page-locked where there is a GPU to copy it to."""

    input_ids: torch.Tensor
    """int64, shape (sequences, sequence_length)."""
    labels: torch.Tensor
    """int64, the same shape: the token that follows each input, so nothing is left to shift; -100 is no label."""
    position_ids: torch.Tensor | None = None
    """int64, shape (1, sequence_length): where the tokens stand in their sequences, if not at their beginning."""


class Loader:
    """One data-parallel rank's share of every step and every evaluation."""

    def __init__(self, splits: Splits, batch: Batch, *, seed: int, rank: int) -> None:
        self._splits, self._batch, self._seed, self._rank = splits, batch, seed, rank

    def step(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of optimiser step ``step`` (0-based).

        The sample at each position of the global batch depends on the seed, the step and the position alone.
        """
        train, first = self._splits.train, step * self._batch.global_
        return [
            _tensors([train.sequence(sample_index(self._seed, first + at, train.num_sequences)) for at in places])
            for places in positions(self._rank, batch=self._batch)
        ]

    def held_out(self, num_sequences: int) -> Iterator[list[MicroBatch]]:
        """Yield this rank's share of the first ``num_sequences`` held-out sequences, or of all where there are fewer.

        As many micro-batches come together as a step has, fewer at the end: a pipeline is filled with them.

        Every rank gets equally many batches of equal shape, because a partitioned model needs all ranks in every
        forward pass; sequences that only fill up have no labels.
        """
        available = min(num_sequences, self._splits.held_out.num_sequences)
        stretch = self._batch.micro * self._batch.data_parallel
        parts = list(enumerate(positions(self._rank, batch=self._batch)))
        for first in range(0, available, self._batch.global_):
            needed = [places for part, places in parts if first + part * stretch < available]
            yield [self._labelled_below(available, first, places) for places in needed]

    def _labelled_below(self, end: int, first: int, places: range) -> MicroBatch:
        """Return the held-out sequences at ``places`` behind ``first``, without labels from ``end`` on."""
        wanted = [first + at for at in places]
        rows = [self._splits.held_out.sequence(at if at < end else 0) for at in wanted]
        return _tensors(rows, num_labelled=sum(at < end for at in wanted))


def _tensors(rows: Sequence[np.ndarray], num_labelled: int | None = None) -> MicroBatch:
    both = torch.from_numpy(np.stack(rows))
    inputs, labels = both[:, :-1].contiguous(), both[:, 1:].contiguous()
    if num_labelled is not None:
        labels[num_labelled:] = IGNORED
    if torch.cuda.is_available():
        inputs, labels = inputs.pin_memory(), labels.pin_memory()
    return MicroBatch(input_ids=inputs, labels=labels)
