"""Rows of tokens with their labels: windows of a stream, or one or several examples."""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from launcher.data.example_store import ExampleStore
from launcher.data.packing import PackedRows, one_a_row

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
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Inputs of the row's images, by the model's names; empty without images."""


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


def source_of(store: ExampleStore, number: int) -> int:
    """Return the source of an example or piece, as :class:`ExampleRows` numbers them."""
    return bisect_right(store.source_ends, number % len(store))


def both_of(pairs: np.ndarray) -> np.ndarray:
    """Return the numbers of both examples of each pair, the preferred one first."""
    found: np.ndarray = np.stack([2 * pairs, 2 * pairs + 1], axis=-1).reshape(-1)
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

    def source(self, index: int) -> int:
        """Return the number of the source that sequence ``index`` comes from."""
        return source_of(self._store, int(self._rows.examples[self._rows.starts[index]]))

    def num_labels(self, index: int) -> int:
        """Return how many labels of sequence ``index`` count."""
        return int((self.row(index).labels != IGNORE_INDEX).sum())

    def row(self, index: int) -> TokenRow:
        """Return sequence ``index``."""
        inputs, labels, positions = [], [], []
        arrays: Mapping[str, np.ndarray] = {}
        for number in self.examples(index).tolist():
            piece, example = divmod(number, len(self._store))
            start = piece * (self._max_tokens - 1)
            ids, is_trained = (part[start : start + self._max_tokens] for part in self._store.read(example))
            inputs.append(ids[:-1])
            labels.append(np.where(is_trained[1:], ids[1:], IGNORE_INDEX))
            positions.append(np.arange(len(ids) - 1))
            if self._store.has_images:
                assert not self._packed, "rows with images are not packed"
                arrays = self._store.arrays(example)
        return TokenRow(
            input_ids=np.concatenate(inputs),
            labels=np.concatenate(labels),
            position_ids=np.concatenate(positions) if self._packed else None,
            arrays=arrays,
        )

    @functools.cached_property
    def filler(self) -> TokenRow | None:
        """A row with a blank image and no labels; ``None`` where no row has images."""
        arrays = self._store.filler()
        if arrays is None:
            return None
        ids = arrays.pop("input_ids").copy()
        return TokenRow(input_ids=ids, labels=np.full(len(ids), IGNORE_INDEX), arrays=arrays)


class PairRows:
    """Preferences: a sequence is two rows, the preferred and the rejected answer to a prompt.

    Args:
        store: of examples 2k and 2k + 1 of pair k.
        pairs: numbers of the pairs that are used.
        max_tokens: of an example; more are cut off its end.
        row_length: of every row, with padding; ``None`` if batches are as long as their longest row.
    """

    def __init__(self, store: ExampleStore, pairs: np.ndarray, *, max_tokens: int, row_length: int | None) -> None:
        self._store, self._pairs, self._max_tokens = store, pairs, max_tokens
        rows = one_a_row(np.arange(len(store)))
        self._rows = ExampleRows(store, rows, packed=False, max_tokens=max_tokens, row_length=row_length)
        self.row_length = row_length

    @property
    def num_sequences(self) -> int:
        """How many pairs there are."""
        return len(self._pairs)

    @property
    def num_examples(self) -> int:
        """How many answers there are."""
        return 2 * len(self._pairs)

    def number(self, index: int) -> int:
        """Return the number of pair ``index`` among all pairs of the data."""
        return int(self._pairs[index])

    def lengths(self, index: int) -> list[int]:
        """Return the tokens of both rows of pair ``index``, without reading them."""
        numbers = both_of(self._pairs[index : index + 1])
        found: list[int] = piece_tokens(self._store, numbers, max_tokens=self._max_tokens).tolist()
        return found

    @property
    def fingerprint(self) -> str:
        """Return a string that changes with the tokens of the pairs."""
        key = f"{self._store.name} {self._max_tokens} ".encode() + self._pairs.astype(np.int64).tobytes()
        return hashlib.sha256(key).hexdigest()

    def num_tokens(self, index: int) -> int:
        """Return the tokens of the longer row of pair ``index``, which decides its padding."""
        return max(self.lengths(index))

    def source(self, index: int) -> int:
        """Return the number of the source that pair ``index`` comes from."""
        return source_of(self._store, 2 * int(self._pairs[index]))

    def num_labels(self, index: int) -> int:
        """Return how many labels of pair ``index`` count."""
        return sum(int((row.labels != IGNORE_INDEX).sum()) for row in self.pair(index))

    def row(self, index: int) -> TokenRow:
        """Return the preferred answer of pair ``index``."""
        return self.pair(index)[0]

    def pair(self, index: int) -> tuple[TokenRow, TokenRow]:
        """Return the preferred and the rejected answer of pair ``index``."""
        chosen, rejected = both_of(self._pairs[index : index + 1]).tolist()
        return self._rows.row(chosen), self._rows.row(rejected)
