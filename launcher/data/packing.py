"""Examples packed whole into rows of one length, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_WINDOW = 8192
"""Examples that are packed together."""


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Which examples stand in which row."""

    examples: np.ndarray
    """int64: numbers of the examples, row after row."""
    starts: np.ndarray
    """int64, one more than there are rows: where each begins in ``examples``."""

    def __len__(self) -> int:
        return len(self.starts) - 1


def one_a_row(examples: np.ndarray) -> PackedRows:
    """Return rows of one example each."""
    return PackedRows(examples=examples, starts=np.arange(len(examples) + 1, dtype=np.int64))


def pack(lengths: np.ndarray, *, capacity: int, seed: int) -> PackedRows:
    """Pack examples into as few rows as best fit finds, in windows of shuffled examples.

    In a window the longest come first, and each goes where the least room is left that still holds it. Nothing is cut.

    Args:
        lengths: tokens of each example, at most ``capacity``.
        capacity: tokens of a row.
        seed: which examples come together.
    """
    raw = np.random.Philox(key=seed & ((1 << 64) - 1)).random_raw(len(lengths))
    shuffled = np.argsort(raw, kind="stable")  # only raw outputs are used, which numpy keeps between versions
    rows: list[list[int]] = []
    for first in range(0, len(shuffled), _WINDOW):
        window = shuffled[first : first + _WINDOW]
        window = window[np.argsort(-lengths[window], kind="stable")]
        rows += _best_fit(window.tolist(), lengths[window].tolist(), capacity)
    return PackedRows(
        examples=np.array([number for row in rows for number in row], np.int64),
        starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
    )


def _best_fit(numbers: list[int], lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0  # bit r: some row has room for r tokens
    for number, length in zip(numbers, lengths, strict=True):
        assert 0 < length <= capacity, f"an example of {length} tokens in rows of {capacity}"
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            rows[row].append(number)
        else:
            row, room = len(rows), capacity
            rows.append([number])
        left = room - length
        if left:
            if not with_room.setdefault(left, []):
                rooms |= 1 << left
            with_room[left].append(row)
    return rows
