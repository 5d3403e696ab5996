"""Tokenised examples in memory-mapped files: their tokens, and which of them are trained.

A folder holds ``ids.bin`` (uint16 or uint32, example after example), ``trained.bin`` (a byte for each token),
and for each example ``ends.bin`` (int64, where it ends among all tokens), ``lengths.bin`` and ``first_trained.bin``
(int32). ``examples.json`` is written last. Of preferences, examples 2k and 2k + 1 are the preferred and the rejected
answer of pair k.

With images there are ``arrays.bin`` (what the model's processor made of each example's, or nothing), ``array_ends.bin``
(int64, where that of each example ends), ``filler.bin`` (the same of a sequence with a blank image) and
``images.json`` (the files of the images as they were read).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from launcher.config.data.order import held_out_numbers
from launcher.data.image_store import ImageStamp, unpack_arrays
from launcher.utils.files import read_json, write_json

LAYOUT = "examples.json"
_IDS, _TRAINED, _ENDS, _LENGTHS, _FIRST = "ids.bin", "trained.bin", "ends.bin", "lengths.bin", "first_trained.bin"
_FILES = (_IDS, _TRAINED, _ENDS, _LENGTHS, _FIRST)
_ARRAYS, _ARRAY_ENDS, _FILLER, _IMAGES = "arrays.bin", "array_ends.bin", "filler.bin", "images.json"
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
    arrays: tuple[bytes, ...] = ()
    """What the model's processor made of the images of each example."""
    stamps: tuple[ImageStamp, ...] = ()
    """The files of their images."""


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
        self.has_images: bool = _ARRAYS in layout["bytes"]
        """Whether examples have images."""
        self._arrays = _map(folder / _ARRAYS, "uint8") if self.has_images else np.empty(0, np.uint8)
        self._array_ends = _map(folder / _ARRAY_ENDS, "int64") if self.has_images else np.empty(0, np.int64)
        self._folder = folder

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of an example, int64, and for each whether it is trained."""
        end = int(self._ends[number])
        part = slice(end - int(self.lengths[number]), end)
        return self._ids[part].astype(np.int64), self._trained[part].astype(bool)

    def array_bytes(self, number: int) -> int:
        """Return the bytes of what the processor made of an example's images; 0 without any."""
        return int(self._array_ends[number] - (self._array_ends[number - 1] if number else 0)) if self.has_images else 0

    def arrays(self, number: int) -> dict[str, np.ndarray]:
        """Return what the processor made of an example's images, by the model's names."""
        size = self.array_bytes(number)
        if not size:
            return {}
        end = int(self._array_ends[number])
        return unpack_arrays(self._arrays[end - size : end])

    def filler(self) -> dict[str, np.ndarray] | None:
        """Return the inputs of a sequence with a blank image; ``None`` where no example has images."""
        return unpack_arrays((self._folder / _FILLER).read_bytes()) if self.has_images else None


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
    filler: Callable[[], bytes] | None = None,
) -> int:
    """Write examples into an empty folder, for :class:`ExampleStore` to map.

    Args:
        folder: to fill.
        blocks: source by source.
        num_sources: of the data set, those without examples too.
        vocab_size: one more than the largest token number.
        heartbeat: called after each block.
        is_paired: whether each two examples are a pair, which is kept or left out as a whole.
        filler: makes the inputs of a sequence with a blank image; ``None`` where the model takes no images.

    Returns:
        How many examples were left out, because none of their tokens is trained.
    """
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    counts, left_out, end, array_end = [0] * num_sources, 0, 0, 0
    names = _FILES if filler is None else (*_FILES, _ARRAYS, _ARRAY_ENDS)
    checksums, stamps = dict.fromkeys(names, 0), dict[str, ImageStamp]()
    files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in names}

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
            if filler is not None:
                for number in np.flatnonzero(kept):
                    array_end += len(block.arrays[number])
                    write(_ARRAYS, np.frombuffer(block.arrays[number], np.uint8))
                    write(_ARRAY_ENDS, np.array([array_end], np.int64))
                stamps |= {stamp.path: stamp for stamp in block.stamps}
            counts[block.key[0]] += int(kept.sum())
            heartbeat()
    finally:
        for file in files.values():
            file.close()
    if filler is not None:
        if array_end:
            (folder / _FILLER).write_bytes(made := filler())
            checksums[_FILLER] = zlib.crc32(made)
            write_json(folder / _IMAGES, list(map(asdict, stamps.values())))
            checksums[_IMAGES] = zlib.crc32((folder / _IMAGES).read_bytes())
        else:
            for name in (_ARRAYS, _ARRAY_ENDS):
                (folder / name).unlink()
                del checksums[name]
    sizes = {name: (folder / name).stat().st_size for name in checksums}
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
    """Return whether a folder holds its files as they were written, of images as they are.

    They are compared by checksum, large ones by size alone; files of images by size and time, then by checksum.
    """
    try:
        layout = read_json(folder / LAYOUT)
        for name in {*_FILES, *layout["bytes"]}:
            file = folder / name
            if (size := file.stat().st_size) != layout["bytes"][name]:
                return False
            if size <= _CHECKED_BYTES and _checksum(file, heartbeat) != layout["crc32"][name]:
                return False
        if _IMAGES in layout["bytes"]:
            for entry in read_json(folder / _IMAGES):
                heartbeat()
                if not ImageStamp(**entry).is_current():
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
