"""Micro-batches of a step or of an evaluation: which sample goes where, as tensors.

The order is a pure function of seed, step and position, the same on any number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from launcher.data.dataset import Splits
from launcher.protocol.plan import Batch

_ROUNDS = 6
_MASK_64 = (1 << 64) - 1


def sample_index(seed: int, index: int, num_sequences: int) -> int:
    """Return which of ``num_sequences`` sequences is the ``index``-th of a run.

    Args:
        seed: another seed gives another order.
        index: sequences drawn before the step + position in the global batch, from 0 without end.
        num_sequences: size of the data set; every epoch shows each sequence once, in an order of its own.
    """
    epoch, value = divmod(index, num_sequences)
    half_bits = max(1, ((num_sequences - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    while True:
        value = _permute(value, keys, half_bits)
        if value < num_sequences:
            return value


def batch_positions(rank: int, *, batch: Batch) -> list[range]:
    """Return the positions in the global batch of each micro-batch of a data-parallel rank.

    Micro-batch m of all ranks together covers the m-th segment of the global batch, so the samples of a step and
    their order do not depend on how it is divided.
    """
    starts = (
        (part * batch.data_parallel + rank) * batch.micro_batch for part in range(batch.gradient_accumulation_steps)
    )
    return [range(start, start + batch.micro_batch) for start in starts]


def _permute(value: int, keys: tuple[int, ...], half_bits: int) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half_bits | right


def _mix(value: int) -> int:
    """Scramble 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK_64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK_64
    return value ^ (value >> 31)


@functools.lru_cache(maxsize=4)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


IGNORE_INDEX = -100
"""Label that the loss ignores; the default of ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Input of one rank's forward pass; page-locked if there is a GPU to copy it to."""

    input_ids: torch.Tensor
    """int64, shape (sequences, sequence_length)."""
    labels: torch.Tensor
    """int64, the same shape: the token after each input, so nothing is shifted; -100: no label."""
    position_ids: torch.Tensor | None = None
    """int64, shape (sequences or 1, sequence_length); ``None``: 0, 1, 2, … in every row.
    Where they restart at 0 another document begins, which attends to nothing before it."""


class Loader:
    """One data-parallel rank's share of every step and every evaluation.

    Steps draw the sequences of a run one after the other, whatever the batch was before, from a point that
    :meth:`continue_at` can move.
    """

    def __init__(self, splits: Splits, batch: Batch, *, seed: int, rank: int) -> None:
        self._splits, self._batch, self._seed, self._rank = splits, batch, seed, rank
        self._from_step = self._from_sequence = 0

    def continue_at(self, step: int, *, sequences: int) -> None:
        """Let optimizer step ``step`` (0-based) begin after the first ``sequences`` of the run."""
        self._from_step, self._from_sequence = step, sequences

    def drawn(self, step: int) -> int:
        """Return the sequences of the run before optimizer step ``step`` (0-based)."""
        return self._from_sequence + (step - self._from_step) * self._batch.global_batch

    def step(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of optimizer step ``step`` (0-based).

        The sample at each position of the global batch depends on the seed, the sequences drawn before and the
        position alone.
        """
        train, first = self._splits.train, self.drawn(step)
        return [
            _tensors([train.sequence(sample_index(self._seed, first + at, train.num_sequences)) for at in places])
            for places in batch_positions(self._rank, batch=self._batch)
        ]

    def held_out(self, num_sequences: int) -> Iterator[list[MicroBatch]]:
        """Yield this rank's share of the first ``num_sequences`` held-out sequences, or of all.

        As many micro-batches come together as a step has, fewer at the end: a pipeline is filled with them.

        Every rank gets equally many batches of equal shape, because a partitioned model needs all ranks in every
        forward pass; sequences that only fill up have no labels.
        """
        available = min(num_sequences, self._splits.held_out.num_sequences)
        segment = self._batch.micro_batch * self._batch.data_parallel
        parts = list(enumerate(batch_positions(self._rank, batch=self._batch)))
        for first in range(0, available, self._batch.global_batch):
            needed = [places for part, places in parts if first + part * segment < available]
            yield [self._labelled_below(available, first, places) for places in needed]

    def _labelled_below(self, end: int, first: int, places: range) -> MicroBatch:
        """Return held-out sequences at ``places`` from ``first``, without labels from ``end`` on."""
        wanted = [first + at for at in places]
        rows = [self._splits.held_out.sequence(at if at < end else 0) for at in wanted]
        return _tensors(rows, num_labelled=sum(at < end for at in wanted))


def _tensors(rows: Sequence[np.ndarray], num_labelled: int | None = None) -> MicroBatch:
    both = torch.from_numpy(np.stack(rows))
    inputs, labels = both[:, :-1].contiguous(), both[:, 1:].contiguous()
    if num_labelled is not None:
        labels[num_labelled:] = IGNORE_INDEX
    if torch.cuda.is_available():
        inputs, labels = inputs.pin_memory(), labels.pin_memory()
    return MicroBatch(input_ids=inputs, labels=labels)
