"""Tensors of a checkpoint: each rank writes its parts, any rank reads any part.

One form for every strategy: a tensor has its name and shape in the whole model (moments: ``exp_avg.<parameter>``), and
parts in any number of safetensors files, one a rank. The header of a file says which part of which tensor each entry
is, so ranks write independently of each other, and a reader needs no index. Imports torch: for ranks only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from launcher.checkpoint.file_writer import FileWriter
from launcher.checkpoint.locks import ReadLock
from launcher.checkpoint.manifest import WrittenFile
from launcher.checkpoint.regions import (
    Box,
    FlatRange,
    Region,
    Shape,
    boxes_of,
    fits,
    flat_start,
    intersect,
    slices,
    whole,
)
from launcher.protocol.state_files import TENSOR_FOLDER, StoredPart, parts_metadata, read_parts, whole_shapes
from launcher.utils.progress import OnProgress, no_progress
from launcher.utils.safetensors_header import TensorEntry, header_bytes

_MOST_MAPPED_BYTES = 64 << 20
_PIECE_BYTES = 16 << 20
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of formats in safetensors files."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of a tensor that this rank writes."""

    name: str
    """Of the whole tensor."""
    shape: Shape
    """Of the whole tensor."""
    region: Region
    """Which part of it."""
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Returns the values, in the shape of the box or in one dimension, on any device.
    Called once, when they are written."""

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return self.region.numel * int(self.dtype.itemsize)


def shard_file_name(rank: int) -> str:
    """Return the path of a rank's file below its checkpoint."""
    return f"{TENSOR_FOLDER}/rank_{rank:05d}.safetensors"


def write_shards(
    file: Path, shards: Sequence[Shard], *, between_blocks: Callable[[], None] = lambda: None
) -> WrittenFile:
    """Write one rank's shards, one in memory at a time, and sync the file.

    Args:
        file: replaced if it is there.
        shards: of distinct parts.
        between_blocks: called after each block of 4 MiB.

    Returns:
        Its size and checksum.

    Raises:
        OSError: the disk is full or gone.
    """
    with FileWriter(file, between_blocks=between_blocks) as out:
        out.write(np.frombuffer(_header(shards), dtype=np.uint8))
        for shard in shards:
            values = shard.read().detach().to("cpu").contiguous()
            assert (values.dtype, values.numel()) == (shard.dtype, shard.region.numel), shard.name
            if values.numel():
                out.write(values.view(-1).view(torch.uint8).numpy())  # no copy
        return out.finish()


def _header(shards: Sequence[Shard]) -> bytes:
    """Return the header of a rank's file."""
    entries: list[TensorEntry] = []
    parts: dict[str, StoredPart] = {}
    for number, shard in enumerate(shards):
        assert fits(shard.region, shard.shape), shard
        region = shard.region
        sizes = region.sizes if isinstance(region, Box) else (region.numel,)
        offsets, start = (region.offsets, 0) if isinstance(region, Box) else (None, region.start)
        entries.append(TensorEntry(name=f"{number}", dtype=DTYPE_NAMES[shard.dtype], shape=sizes))
        parts[f"{number}"] = StoredPart(name=shard.name, shape=shard.shape, sizes=sizes, offsets=offsets, start=start)
    return header_bytes(entries, parts_metadata(parts))


class Values(Protocol):
    """Values of a part of a tensor: a tensor, or what reads one from a file."""

    def __getitem__(self, index: Any, /) -> Any:
        """Return the values at slices, one a dimension."""


@dataclass(frozen=True)
class _Part:
    region: Region
    values: Values
    """In the shape of the box, or with one dimension."""
    dtype: torch.dtype
    file: Path
    """Where they come from, for messages."""


@dataclass
class _Entry:
    shape: Shape
    parts: list[_Part] = field(default_factory=list)


class _MappedFile:
    """A file that is unmapped now and then: what was touched of a mapping counts as memory."""

    def __init__(self, file: Path) -> None:
        self._file, self._read_bytes = file, 0
        self._opened: Any = None

    def open(self) -> Any:
        """Return its reader."""
        if self._opened is None:
            self._opened = safe_open(str(self._file), framework="pt")
        return self._opened

    def count(self, num_bytes: int) -> None:
        """Unmap the file once much of it was read."""
        self._read_bytes += num_bytes
        if self._read_bytes > _MOST_MAPPED_BYTES:
            self._opened, self._read_bytes = None, 0


@dataclass(frozen=True)
class _EntryValues:
    """The values of an entry of a file, read when they are needed."""

    file: _MappedFile
    key: str

    def __getitem__(self, index: Any) -> Tensor:
        found: Tensor = self.file.open().get_slice(self.key)[index]
        self.file.count(found.nbytes)
        return found


class StoredState:
    """The tensors of a checkpoint, whatever ranks and strategies wrote them.

    No run removes the checkpoint while this exists.

    Args:
        files: that ranks wrote; other parts can be added.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, or the parts of a tensor are not the whole; the message names it.
    """

    def __init__(self, files: Iterable[Path] = ()) -> None:
        files = list(files)
        self.on_progress: OnProgress = no_progress
        """Called after each piece with the bytes read and those expected."""
        self._expected_bytes = self._read_bytes = 0
        self._lock = ReadLock(files[0].parent, say=lambda line: None) if files else None
        self._entries: dict[str, _Entry] = {}
        self._shapes: dict[str, Shape] = {}
        whole_shapes(part for file in files for part in self._added(file))

    def _added(self, file: Path) -> Iterator[StoredPart]:
        """Open a file and yield the parts that it stores."""
        try:
            mapped = _MappedFile(file)
            opened = mapped.open()
            entries = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            sizes = {key: tuple(entry.get_shape()) for key, entry in entries.items()}
            for key, part in read_parts(opened.metadata() or {}, sizes):
                box = None if part.offsets is None else Box(part.offsets, part.sizes)
                region = box or FlatRange(part.start, part.start + part.numel)
                dtype = safetensors_dtype(entries[key].get_dtype())
                self.add(part.name, part.shape, region, _EntryValues(mapped, key), dtype=dtype, file=file)
                yield part
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{file} is not a file of a checkpoint: {error}") from error

    def add(self, name: str, shape: Shape, region: Region, values: Values, *, dtype: torch.dtype, file: Path) -> None:
        """Add a part of a tensor.

        Args:
            name: of the whole tensor.
            shape: of the whole tensor.
            region: which part it is.
            values: read when they are needed.
            dtype: their format.
            file: where they come from.

        Raises:
            ValueError: the tensor has no such part, or another shape elsewhere.
        """
        if not fits(region, shape):
            raise ValueError(f"{name} of shape {shape} has no part {region}")
        entry = self._entries.setdefault(name, _Entry(shape))
        if entry.shape != shape:
            raise ValueError(f"{name} has shape {shape} in one file and {entry.shape} in another")
        entry.parts.append(_Part(region, values, dtype, file))
        self._shapes[name] = shape

    def add_from(self, other: StoredState, name: str, *, renamed: str) -> None:
        """Add a tensor of another state under a new name."""
        entry = other._entries[name]
        self._entries[renamed], self._shapes[renamed] = entry, entry.shape

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Whole shape of each tensor by its name."""
        return self._shapes

    def expect(self, regions: Iterable[tuple[str, Region]]) -> None:
        """Add the parts of tensors that will be read to what :attr:`on_progress` gets.

        Raises:
            KeyError: there is no such tensor.
        """
        self._expected_bytes += sum(region.numel * self.dtype(name).itemsize for name, region in regions)

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """Return a part of a tensor, or all of it, on the CPU in the format in which it is stored.

        It may share memory with what stores it: copy it before you change it.

        Args:
            name: of the tensor.
            region: a box, returned in its shape; or a range, returned with one dimension.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the file cannot be read.
        """
        entry = self._entries[name]
        region = region if region is not None else whole(entry.shape)
        same = next((part for part in entry.parts if part.region == region), None)
        if same is not None and isinstance(region, Box):
            found = _values(same, region, region, entry.shape)  # the usual case, without a second copy in memory
            self._advance(found)
            return found
        out = torch.empty(region.sizes if isinstance(region, Box) else region.numel, dtype=self.dtype(name))
        self.read_into(out, name, region)
        return out

    def read_into(self, target: Tensor, name: str, region: Region) -> None:
        """Copy a part of a tensor into ``target``.

        Of files of this program's checkpoints little is in memory at a time.

        Args:
            target: in the shape of a box, or with the one dimension of a range; on any device, in any format.
            name: of the tensor.
            region: which part of it.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the file cannot be read.
        """
        entry = self._entries[name]
        filled = 0
        for wanted in boxes_of(region, entry.shape):
            room = target
            if isinstance(region, FlatRange):
                start = flat_start(wanted, entry.shape) - region.start
                room = target[start : start + wanted.numel].view(wanted.sizes)
            for part in entry.parts:
                for stored in boxes_of(part.region, entry.shape):
                    if (box := intersect(stored, wanted)) is None:
                        continue
                    for piece in _pieces(box, part):
                        values = _values(part, stored, piece, entry.shape)
                        room[slices(piece, wanted.offsets)].copy_(values)
                        self._advance(values)
                    filled += box.numel
        if filled != region.numel:
            raise ValueError(f"{name}: the files have {filled} of {region.numel} elements")

    def _advance(self, values: Tensor) -> None:
        self._read_bytes += values.nbytes
        self.on_progress(self._read_bytes, self._expected_bytes)

    def dtype(self, name: str) -> torch.dtype:
        """Return the format in which a tensor is stored."""
        return self._entries[name].parts[0].dtype


def safetensors_dtype(name: str) -> torch.dtype:
    """Return the format that safetensors files call ``name``.

    Raises:
        ValueError: it is none that a checkpoint holds.
    """
    for dtype, known in DTYPE_NAMES.items():
        if known == name:
            return dtype
    raise ValueError(f"values of format {name} are not read from checkpoints")


def _pieces(box: Box, part: _Part) -> Iterator[Box]:
    """Yield boxes that together are ``box``, each small if the part is read from a mapped file.

    Other values are in memory, or are loaded whole for every box.
    """
    row_bytes = math.prod(box.sizes[1:]) * part.dtype.itemsize
    if not box.sizes or box.sizes[0] * row_bytes <= _PIECE_BYTES or not isinstance(part.values, _EntryValues):
        yield box
    elif row_bytes > _PIECE_BYTES:
        for row in range(box.offsets[0], box.offsets[0] + box.sizes[0]):
            for piece in _pieces(Box(box.offsets[1:], box.sizes[1:]), part):
                yield Box((row, *piece.offsets), (1, *piece.sizes))
    else:
        num_rows = _PIECE_BYTES // row_bytes
        for first in range(0, box.sizes[0], num_rows):
            sizes = (min(num_rows, box.sizes[0] - first), *box.sizes[1:])
            yield Box((box.offsets[0] + first, *box.offsets[1:]), sizes)


def _values(part: _Part, stored: Box, box: Box, shape: Shape) -> Tensor:
    """Return the values of ``box``, which lies in the box ``stored`` of a part, in its shape."""
    try:
        if isinstance(part.region, Box):
            found: Tensor = part.values[slices(box, part.region.offsets) or ...]
            return found
        if not shape:
            scalar: Tensor = part.values[0:1]
            return scalar.view(())
        row = math.prod(stored.sizes[1:])
        first = flat_start(stored, shape) - part.region.start + (box.offsets[0] - stored.offsets[0]) * row
        rows: Tensor = part.values[first : first + box.sizes[0] * row]
        inner = slices(Box(box.offsets[1:], box.sizes[1:]), stored.offsets[1:])
        return rows.view(box.sizes[0], *stored.sizes[1:])[(slice(None), *inner)]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{part.file} cannot be read: {error}") from error
