"""Rows of tokens with their labels: windows of a stream, or one or several examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from launcher.data.example_store import ExampleStore
from launcher.data.packing import PackedRows

IGNORE_INDEX = -100
"""Label that the loss ignores; the default of ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One sequence; its arrays are int64 of one length."""

    input_ids: np.ndarray
    labels: np.ndarray
    """The token after each input; -100 where it does not count."""
    position_ids: np.ndarray | None = None
    """Where they restart at 0 another document begins; ``None``: the row is one document."""


def row_of_window(tokens: np.ndarray) -> TokenRow:
    """Return a row of all but the last of some tokens, all of whose labels count."""
    return TokenRow(input_ids=tokens[:-1], labels=tokens[1:])


class Sequences(Protocol):
    """Numbered rows of tokens."""

    @property
    def num_sequences(self) -> int:
        """How many there are."""

    @property
    def row_length(self) -> int | None:
        """Tokens of every row with padding; ``None``: as many as the longest of a batch has."""

    def row(self, index: int) -> TokenRow:
        """Return sequence ``index``."""

    def num_tokens(self, index: int) -> int:
        """Return the tokens of sequence ``index``, without reading them."""

    def num_labels(self, index: int) -> int:
        """Return how many labels of sequence ``index`` count."""


def piece_tokens(store: ExampleStore, numbers: np.ndarray, *, max_tokens: int) -> np.ndarray:
    """Return how many places examples or pieces take, as :class:`ExampleRows` numbers them."""
    pieces, examples = np.divmod(numbers, len(store))
    left = store.lengths[examples].astype(np.int64) - pieces * (max_tokens - 1)
    found: np.ndarray = np.minimum(left, max_tokens) - 1
    return found


class ExampleRows:
    """Rows of whole examples.

    An example of n tokens takes n - 1 places: its last token is a label alone. Of N examples, number k * N + n is the
    k-th piece of example n: documents are cut so that the last token of a piece is the first of the next.

    Args:
        store: of the examples.
        rows: which examples, or pieces, stand in which row.
        packed: whether rows hold several examples, so that positions tell them apart.
        max_tokens: of an example or piece; more are cut off its end.
        row_length: of every row, with padding; ``None`` if batches are as long as their longest row.
    """

    def __init__(
        self, store: ExampleStore, rows: PackedRows, *, packed: bool, max_tokens: int, row_length: int | None
    ) -> None:
        self._store, self._rows, self._packed = store, rows, packed
        self._max_tokens, self.row_length = max_tokens, row_length

    @property
    def num_sequences(self) -> int:
        """How many there are."""
        return len(self._rows)

    @property
    def num_examples(self) -> int:
        """How many there are in all rows."""
        return len(self._rows.examples)

    def examples(self, index: int) -> np.ndarray:
        """Return the numbers of the examples in row ``index``."""
        found: np.ndarray = self._rows.examples[self._rows.starts[index] : self._rows.starts[index + 1]]
        return found

    def num_tokens(self, index: int) -> int:
        """Return the tokens of sequence ``index``, without reading them."""
        return int(piece_tokens(self._store, self.examples(index), max_tokens=self._max_tokens).sum())

    def num_labels(self, index: int) -> int:
        """Return how many labels of sequence ``index`` count."""
        return int((self.row(index).labels != IGNORE_INDEX).sum())

    def row(self, index: int) -> TokenRow:
        """Return sequence ``index``."""
        inputs, labels, positions = [], [], []
        for number in self.examples(index).tolist():
            piece, example = divmod(number, len(self._store))
            start = piece * (self._max_tokens - 1)
            ids, is_trained = (part[start : start + self._max_tokens] for part in self._store.read(example))
            inputs.append(ids[:-1])
            labels.append(np.where(is_trained[1:], ids[1:], IGNORE_INDEX))
            positions.append(np.arange(len(ids) - 1))
        return TokenRow(
            input_ids=np.concatenate(inputs),
            labels=np.concatenate(labels),
            position_ids=np.concatenate(positions) if self._packed else None,
        )
