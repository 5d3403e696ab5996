"""Tokenised examples in memory-mapped files: their tokens, and which of them are trained.

A folder holds ``ids.bin`` (uint16 or uint32, example after example), ``trained.bin`` (a byte for each token),
and for each example ``ends.bin`` (int64, where it ends among all tokens), ``lengths.bin`` and ``first_trained.bin``
(int32). ``examples.json`` is written last. Of preferences, examples 2k and 2k + 1 are the preferred and the rejected
answer of pair k.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from launcher.config.data.order import held_out_numbers
from launcher.utils.files import read_json, write_json

LAYOUT = "examples.json"
_IDS, _TRAINED, _ENDS, _LENGTHS, _FIRST = "ids.bin", "trained.bin", "ends.bin", "lengths.bin", "first_trained.bin"
_FILES = (_IDS, _TRAINED, _ENDS, _LENGTHS, _FIRST)
_CHECKED_BYTES = 4 << 30
"""Files of more bytes are compared by size alone: reading them takes over two seconds."""
_BLOCK_BYTES = 16 << 20


BlockKey = tuple[int, int, int]
"""Source, file of it, and block of that: blocks in this order are the data set."""


@dataclass(frozen=True, kw_only=True)
class EncodedBlock:
    """Some examples of one source, one after the other."""

    key: BlockKey
    ids: np.ndarray
    """uint32, of all examples."""
    is_trained: np.ndarray
    """uint8, for each token 1 where the loss counts it."""
    lengths: np.ndarray
    """int32, tokens of each example."""


class ExampleStore:
    """The examples of a folder, mapped into memory and read one by one.

    Args:
        folder: that :func:`write_examples` filled.
    """

    def __init__(self, folder: Path) -> None:
        layout = read_json(folder / LAYOUT)
        self.name = folder.name
        """Changes with the data, the template and the tokenizer."""
        self.sources: list[int] = layout["sources"]
        """Examples of each source, whose numbers follow each other."""
        self.source_ends = list(accumulate(self.sources))
        """One past the last example of each source."""
        self.is_paired: bool = layout.get("is_paired", False)
        """Whether each two examples are the preferred and the rejected answer to one prompt."""
        self._ids = _map(folder / _IDS, layout["dtype"])
        self._trained = _map(folder / _TRAINED, "uint8")
        self.lengths: np.ndarray = _map(folder / _LENGTHS, "int32")
        """Tokens of each example."""
        self.first_trained: np.ndarray = _map(folder / _FIRST, "int32")
        """Where the first label of each example stands that counts."""
        self._ends = _map(folder / _ENDS, "int64")

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of an example, int64, and for each whether it is trained."""
        end = int(self._ends[number])
        part = slice(end - int(self.lengths[number]), end)
        return self._ids[part].astype(np.int64), self._trained[part].astype(bool)


def _map(file: Path, dtype: str) -> np.ndarray:
    if not file.stat().st_size:
        return np.empty(0, dtype)
    mapped: np.ndarray = np.memmap(file, dtype=dtype, mode="r")
    return mapped


def write_examples(
    folder: Path,
    blocks: Iterable[EncodedBlock],
    *,
    num_sources: int,
    vocab_size: int,
    heartbeat: Callable[[], None],
    is_paired: bool = False,
) -> int:
    """Write examples into an empty folder, for :class:`ExampleStore` to map.

    Args:
        folder: to fill.
        blocks: source by source.
        num_sources: of the data set, those without examples too.
        vocab_size: one more than the largest token number.
        heartbeat: called after each block.
        is_paired: whether each two examples are a pair, which is kept or left out as a whole.

    Returns:
        How many examples were left out, because none of their tokens is trained.
    """
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    counts, left_out, end = [0] * num_sources, 0, 0
    checksums = dict.fromkeys(_FILES, 0)
    files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in _FILES}

    def write(name: str, values: np.ndarray) -> None:
        raw = values.tobytes()
        files[name].write(raw)
        checksums[name] = zlib.crc32(raw, checksums[name])

    try:
        for block in blocks:
            first = _first_trained(block)
            kept = first > 0
            if is_paired:
                kept = np.repeat(kept.reshape(-1, 2).all(axis=1), 2)
            left_out += int((~kept).sum())
            tokens: Any = slice(None) if kept.all() else np.repeat(kept, block.lengths)
            write(_IDS, block.ids[tokens].astype(dtype))
            write(_TRAINED, block.is_trained[tokens])
            ends = end + np.cumsum(block.lengths[kept], dtype=np.int64)
            end = int(ends[-1]) if len(ends) else end
            write(_ENDS, ends)
            write(_LENGTHS, block.lengths[kept].astype(np.int32))
            write(_FIRST, first[kept].astype(np.int32))
            counts[block.key[0]] += int(kept.sum())
            heartbeat()
    finally:
        for file in files.values():
            file.close()
    sizes = {name: (folder / name).stat().st_size for name in _FILES}
    layout = {"dtype": dtype, "sources": counts, "is_paired": is_paired, "bytes": sizes, "crc32": checksums}
    write_json(folder / LAYOUT, layout)
    return left_out


def _first_trained(block: EncodedBlock) -> np.ndarray:
    """Return the place of each example's first label that counts; 0 without one.

    The first token of an example is no label.
    """
    ends = np.cumsum(block.lengths, dtype=np.int64)
    starts = ends - block.lengths
    trained: np.ndarray = np.append(np.flatnonzero(block.is_trained), len(block.ids))
    places = trained[np.searchsorted(trained, np.minimum(starts + 1, len(block.ids)))]
    found: np.ndarray = np.where(places < ends, places - starts, 0)
    return found


def is_intact(folder: Path, *, heartbeat: Callable[[], None]) -> bool:
    """Return whether a folder holds its files as they were written.

    They are compared by checksum, large ones by size alone.
    """
    try:
        layout = read_json(folder / LAYOUT)
        for name in _FILES:
            file = folder / name
            if (size := file.stat().st_size) != layout["bytes"][name]:
                return False
            if size <= _CHECKED_BYTES and _checksum(file, heartbeat) != layout["crc32"][name]:
                return False
        return all(isinstance(count, int) for count in layout["sources"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _checksum(file: Path, heartbeat: Callable[[], None]) -> int:
    found = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            found = zlib.crc32(block, found)
            heartbeat()
    return found


def held_out_examples(sources: Sequence[int], share: float) -> np.ndarray:
    """Return for each example whether it is held out, the same in every run.

    A source of two examples or more has at least one of each kind.

    Args:
        sources: examples of each.
        share: between 0 and 1.
    """
    found: np.ndarray = np.zeros(sum(sources), bool)
    start = 0
    for size in sources:
        found[[start + number for number in held_out_numbers(size, share)]] = True
        start += size
    return found
