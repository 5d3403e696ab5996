"""Headers of safetensors files: read and checked, or made to write one, without the library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of an element by the name of its format: every format that safetensors 0.8 can read."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor to be written."""

    name: str
    dtype: str
    """As the format calls it: ``F32``, ``BF16``, …"""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return self.numel * _BITS[self.dtype] // 8


def header_bytes(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """Return the beginning of a safetensors file; the values follow in the order of the entries."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        stop = position + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns values
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file that is complete."""

    shapes: dict[str, tuple[int, ...]]
    """Of its tensors, by name."""
    metadata: Mapping[str, str]
    """Further text."""


def read_header(file: Path) -> SafetensorsHeader:
    """Return the header of a safetensors file, after a check that the file is complete.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is cut short or is not safetensors.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if first == b"version ":
            raise ValueError(
                f"{file.name} is a Git LFS pointer, not the file itself: run git lfs pull in its repository"
            )
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{file.name} is not a safetensors file, or is cut short within its header")
        try:
            header = json.loads(stream.read(length).decode(), object_pairs_hook=_without_twins)
        except (ValueError, RecursionError):
            raise ValueError(f"{file.name} is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        why = "its header is not a JSON object"
        raise ValueError(f"{file.name} is not a safetensors file: {why}")  # noqa: TRY004
    metadata = header.pop("__metadata__", None)
    is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not is_text:
        raise ValueError(f"{file.name} has a damaged header: its __metadata__ is not a mapping of text")
    spans = []
    for name, entry in header.items():
        try:
            shape, (start, end), dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
            is_whole = isinstance(dtype, str) and all(
                type(number) is int and number >= 0 for number in (*shape, start, end)
            )
        except (TypeError, KeyError, ValueError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"{file.name} has a damaged header: {name} has no dtype, shape and offsets")
        bits = _BITS.get(dtype)
        if bits is None:
            why = f"{name} is of format {dtype!r}, not one of {', '.join(_BITS)}"
            raise ValueError(f"{file.name} is damaged, or of a newer safetensors: {why}")
        if math.prod(shape) * bits != 8 * (end - start):
            raise ValueError(f"{file.name} has a damaged header: {name} is {dtype} {shape} in {end - start} bytes")
        spans.append((start, end, name))
    place = 0
    for start, end, name in sorted(spans):
        if start != place:
            raise ValueError(f"{file.name} has a damaged header: {name} begins at byte {start}, not {place}")
        place = end
    if size != 8 + length + place:
        raise ValueError(f"{file.name} has {size} bytes, and its header describes {8 + length + place}")
    return SafetensorsHeader({name: tuple(entry["shape"]) for name, entry in header.items()}, metadata or {})


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; reject duplicate keys, as the safetensors library does."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a name occurs twice")
    return tree
