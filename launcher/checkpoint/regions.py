"""Which elements of a whole tensor a rank holds, or a file stores. Torch-free.

FSDP2, tensor slices and whole tensors are boxes; DeepSpeed's ZeRO cuts parameters as if they were flat, so its parts
are ranges of the flattened tensor. Whatever reads a checkpoint asks for either, whichever was written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A block of a tensor: ``sizes`` elements from ``offsets`` on, in each dimension."""

    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class FlatRange:
    """Elements ``start`` to ``stop`` (exclusive) of the flattened tensor, row by row."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


Region = Box | FlatRange


def whole(shape: Shape) -> Box:
    """Return the box that is all of a tensor."""
    return Box((0,) * len(shape), shape)


def fits(region: Region, shape: Shape) -> bool:
    """Whether a region lies within a tensor."""
    if isinstance(region, FlatRange):
        return 0 <= region.start <= region.stop <= math.prod(shape)
    if not len(region.offsets) == len(region.sizes) == len(shape):
        return False
    pairs = zip(region.offsets, region.sizes, shape, strict=True)
    return all(min(offset, size) >= 0 and offset + size <= length for offset, size, length in pairs)


def intersect(one: Box, other: Box) -> Box | None:
    """Return what two boxes of one tensor share; ``None`` if that is nothing."""
    starts = tuple(map(max, one.offsets, other.offsets))
    stops = tuple(
        min(a + n, b + m) for a, n, b, m in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return None
    return Box(starts, tuple(stop - start for start, stop in zip(starts, stops, strict=True)))


def slices(box: Box, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
    """Return the indices of a box in a tensor that begins at ``origin`` of the whole one."""
    origin = origin if origin is not None else (0,) * len(box.offsets)
    return tuple(
        slice(offset - first, offset - first + size)
        for offset, size, first in zip(box.offsets, box.sizes, origin, strict=True)
    )


def boxes_of(region: Region, shape: Shape) -> Iterator[Box]:
    """Yield boxes that together are ``region``, in the order of the flattened tensor.

    A range is part of a row, whole rows, part of a row, and so on in each dimension: at most two boxes for each
    dimension, and one more.
    """
    if isinstance(region, Box):
        if region.numel:
            yield region
    elif region.numel:
        yield from _boxes_of_range(region.start, region.stop, shape)


def _boxes_of_range(start: int, stop: int, shape: Shape) -> Iterator[Box]:
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(last, start - last * row, stop - last * row, shape)
        return
    if start < first * row:
        yield from _in_row(first - 1, start - (first - 1) * row, row, shape)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * row < stop:
        yield from _in_row(last, 0, stop - last * row, shape)


def _in_row(number: int, start: int, stop: int, shape: Shape) -> Iterator[Box]:
    """Yield the boxes of a range within row ``number``."""
    for box in _boxes_of_range(start, stop, shape[1:]):
        yield Box((number, *box.offsets), (1, *box.sizes))


def flat_start(box: Box, shape: Shape) -> int:
    """Return the index of a box's first element in the flattened tensor."""
    start = 0
    for offset, length in zip(box.offsets, shape, strict=True):
        start = start * length + offset
    return start
