"""A corpus as one long line of tokens, memory-mapped, and windows of it as training sequences."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from launcher.files import read_json


class Sequences(Protocol):
    """Numbered sequences of equal length."""

    @property
    def num_sequences(self) -> int:
        """How many there are."""

    def sequence(self, index: int) -> np.ndarray:
        """Return sequence ``index`` as int64 of shape (sequence_length + 1,): inputs [:-1], labels [1:]."""


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
    layout = read_json(folder / "stream.json")
    dtype = np.dtype(layout["dtype"])
    whole = np.memmap(folder / layout["file"], mode="r", dtype=np.uint8)
    return TokenStream([whole[start : start + size * dtype.itemsize].view(dtype) for start, size in layout["segments"]])


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Sequences cut from a stretch of a stream, each starting where the one before ended."""

    stream: TokenStream
    first: int
    """First token of the stretch."""
    last: int
    """One past its last token."""
    length: int
    """Tokens a model sees of each sequence; one more is read, as the last label."""

    @property
    def num_sequences(self) -> int:
        """How many whole sequences the stretch holds."""
        return max(0, (self.last - self.first - 1) // self.length)

    def sequence(self, index: int) -> np.ndarray:
        """Return sequence ``index`` as int64 of shape (length + 1,)."""
        start = self.first + index * self.length
        return self.stream.read(start, start + self.length + 1)
