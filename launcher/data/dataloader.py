"""Micro-batches of a step or of an evaluation: which sample goes where, as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from launcher.config.data.order import padded_length
from launcher.data.dataset import Splits
from launcher.data.rows import IGNORE_INDEX, ExampleRows, PairRows, Sequences, TokenRow
from launcher.models.processor import PER_TOKEN, join_arrays, pad_per_token
from launcher.protocol.plan import Batch


def batch_positions(rank: int, *, batch: Batch) -> list[range]:
    """Return the positions in the global batch of each micro-batch of a data-parallel rank.

    Micro-batch m of all ranks together covers the m-th segment of the global batch, so the samples of a step and
    their order do not depend on how it is divided.
    """
    starts = (
        (part * batch.data_parallel + rank) * batch.micro_batch for part in range(batch.gradient_accumulation_steps)
    )
    return [range(start, start + batch.micro_batch) for start in starts]


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
    is_paired: bool = False
    """Whether rows n to 2n - 1 are the rejected answers to the prompts of rows 0 to n - 1."""
    reference: torch.Tensor | None = None
    """fp32, shape (sequences,), of pairs: log-probability of each answer in the reference."""
    sources: torch.Tensor | None = None
    """int64, of each row, or of each pair: the number of its source in a mixture."""
    arrays: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Inputs of images, by the names of the model's ``forward``; empty where no row has images."""
    drawn: torch.Tensor | None = None
    """int64, of each row, or of each pair: its place among the sequences that a run trains on."""
    step: int = 0
    """Optimizer step that it is for, from 0."""


class Loader:
    """One data-parallel rank's share of every step and every evaluation.

    Steps draw the sequences of a run one after the other, whatever the batch was before, from a point that
    :meth:`continue_at` can move.
    """

    def __init__(self, splits: Splits, batch: Batch, *, seed: int, rank: int) -> None:
        self._splits, self._batch, self._seed, self._rank = splits, batch, seed, rank
        self._from_step = self._from_sequence = 0
        self._references: dict[int, np.ndarray] = {}

    def use_references(self, *, train: np.ndarray, held_out: np.ndarray) -> None:
        """Give batches of pairs what the reference model says of both answers, (pairs, 2)."""
        self._references = {id(self._splits.train): train, id(self._splits.held_out): held_out}

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
            replace(
                self._batch_of(train, [self._number_at(first + at) for at in places]),
                drawn=torch.tensor([first + at for at in places]),
                step=step,
            )
            for places in batch_positions(self._rank, batch=self._batch)
        ]

    def _batch_of(self, sequences: Sequences, numbers: Sequence[int], *, num_labelled: int | None = None) -> MicroBatch:
        """Return sequences as one micro-batch; those after ``num_labelled`` have no labels."""
        fixed, sources = sequences.row_length, self._sources(sequences, numbers)
        if not isinstance(sequences, PairRows):
            rows = [sequences.row(number) for number in numbers]
            if isinstance(sequences, ExampleRows) and not any(row.arrays for row in rows):
                filler = sequences.filler
                if filler is not None:  # every rank passes its images through the model, or the others would wait
                    rows.append(filler)
                    sources = None if sources is None else torch.cat([sources, sources.new_zeros(1)])
            return replace(_tensors(rows, fixed=fixed, num_labelled=num_labelled), sources=sources)
        pairs = [sequences.pair(number) for number in numbers]
        batch = _tensors([pair[side] for side in (0, 1) for pair in pairs], fixed=fixed)
        if num_labelled is not None:
            batch.labels[num_labelled : len(pairs)] = IGNORE_INDEX
            batch.labels[len(pairs) + num_labelled :] = IGNORE_INDEX
        known = self._references.get(id(sequences))
        reference = None if known is None else torch.from_numpy(known[list(numbers)].T.reshape(-1)).float()
        return replace(batch, is_paired=True, reference=reference, sources=sources)

    def _sources(self, sequences: Sequences, numbers: Sequence[int]) -> torch.Tensor | None:
        splits = self._splits
        names = splits.train_sources if sequences is splits.train else splits.held_out_sources
        if not names or not isinstance(sequences, ExampleRows | PairRows):
            return None
        return torch.tensor([sequences.source(number) for number in numbers])

    def _number_at(self, position: int) -> int:
        return self._splits.train_order.index(self._seed, position)

    def padding(self, step: int) -> float:
        """Return the share of optimizer step ``step`` (0-based) that is padding, over all ranks."""
        train, first = self._splits.train, self.drawn(step)
        real = whole = 0
        for rank in range(self._batch.data_parallel):
            for places in batch_positions(rank, batch=self._batch):
                numbers = [self._number_at(first + at) for at in places]
                lengths = [length for number in numbers for length in _lengths(train, number)]
                real += sum(lengths)
                whole += len(lengths) * (train.row_length or padded_length(lengths))
        return 1 - real / whole

    def held_out(self, num_sequences: int) -> Iterator[list[MicroBatch]]:
        """Yield this rank's share of the first ``num_sequences`` held-out sequences, or of all.

        As many micro-batches come together as a step has, fewer at the end: a pipeline is filled with them.

        Every rank gets equally many batches, because a partitioned model needs all ranks in every forward pass;
        sequences that only fill up have no labels.
        """
        return self.in_order(self._splits.held_out, num_sequences)

    def in_order(self, sequences: Sequences, num_sequences: int) -> Iterator[list[MicroBatch]]:
        """Yield this rank's share of the first ``num_sequences``, as :meth:`held_out` does."""
        available = min(num_sequences, sequences.num_sequences)
        for parts in self.positions(available):
            yield [
                self._batch_of(
                    sequences,
                    [at if at < available else 0 for at in places],
                    num_labelled=sum(at < available for at in places),
                )
                for places in parts
            ]

    def positions(self, available: int) -> Iterator[list[range]]:
        """Yield the sequences of each batch of :meth:`in_order`, also those that only fill up."""
        segment = self._batch.micro_batch * self._batch.data_parallel
        parts = list(enumerate(batch_positions(self._rank, batch=self._batch)))
        for first in range(0, available, self._batch.global_batch):
            needed = [places for part, places in parts if first + part * segment < available]
            yield [range(first + places.start, first + places.stop) for places in needed]


def _lengths(sequences: Sequences, number: int) -> list[int]:
    """Return the tokens of each row of a sequence."""
    return sequences.lengths(number) if isinstance(sequences, PairRows) else [sequences.num_tokens(number)]


def _tensors(rows: Sequence[TokenRow], *, fixed: int | None, num_labelled: int | None = None) -> MicroBatch:
    """Return rows as one micro-batch, padded at their ends.

    A causal model never sees the padding, which has no labels.

    Args:
        rows: of at least one token each.
        fixed: length of the micro-batch; by default what the longest row needs.
        num_labelled: rows after so many have no labels.
    """
    length = fixed or padded_length([len(row.input_ids) for row in rows])
    shape = (len(rows), length)
    inputs, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE_INDEX)
    positions = None if all(row.position_ids is None for row in rows) else torch.arange(length).repeat(len(rows), 1)
    for number, row in enumerate(rows):
        size = len(row.input_ids)
        inputs[number, :size] = torch.from_numpy(row.input_ids)
        if num_labelled is None or number < num_labelled:
            labels[number, :size] = torch.from_numpy(row.labels)
        if positions is not None and row.position_ids is not None:
            positions[number, :size] = torch.from_numpy(row.position_ids)
            positions[number, size:] -= size  # padding is a document of its own
    arrays = _image_tensors(rows, length=length)
    if torch.cuda.is_available():
        inputs, labels = inputs.pin_memory(), labels.pin_memory()
        positions = None if positions is None else positions.pin_memory()
        arrays = {name: tensor.pin_memory() for name, tensor in arrays.items()}
    return MicroBatch(input_ids=inputs, labels=labels, position_ids=positions, arrays=arrays)


def _image_tensors(rows: Sequence[TokenRow], *, length: int) -> dict[str, torch.Tensor]:
    """Return the inputs of the images of all rows, row after row."""
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row.arrays):
        if name in PER_TOKEN:
            joined = pad_per_token([row.arrays.get(name) for row in rows], length=length)
        else:
            joined = join_arrays([row.arrays[name] for row in rows if name in row.arrays])
        found[name] = torch.from_numpy(np.ascontiguousarray(joined))
    return found
