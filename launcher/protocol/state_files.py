"""Tensor files of a checkpoint: their place, and the parts of tensors in each.

Ranks write and read these files with torch; the parent reads their headers without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TENSOR_FOLDER = "state"
"""Folder of these files in a checkpoint."""

MODEL_FOLDER = "model"
"""Folder in a checkpoint with the model's config and tokenizer, and without weights."""

_METADATA = "launcher"
_RNG = "rng"
"""First part of the names of random generators' states."""


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """Which part of a tensor an entry of a file is: a box, or a range of the flattened tensor."""

    name: str
    """Of the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    sizes: tuple[int, ...]
    """Of the entry: those of the box, or the length of the range."""
    offsets: tuple[int, ...] | None
    """Of the box; ``None`` for a range."""
    start: int = 0
    """Of the range."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def state_files(checkpoint: Path) -> list[Path]:
    """Return the tensor files of a checkpoint, one a rank; empty if it has none."""
    return sorted(file for file in (checkpoint / TENSOR_FOLDER).glob("*.safetensors") if file.is_file())


def parts_metadata(parts: Mapping[str, StoredPart]) -> dict[str, str]:
    """Return the metadata of a file with these parts, by the names of their entries."""
    found = {key: {"name": part.name, "shape": part.shape, **_place(part)} for key, part in parts.items()}
    return {_METADATA: json.dumps({"parts": found})}


def _place(part: StoredPart) -> dict[str, object]:
    return {"start": part.start} if part.offsets is None else {"offsets": part.offsets}


def read_parts(metadata: Mapping[str, str], sizes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, StoredPart]]:
    """Yield each entry's name with the part of a tensor that it is.

    Args:
        metadata: of the file.
        sizes: shape of each entry.

    Raises:
        ValueError: the file is not one of a checkpoint.
    """
    try:
        parts = json.loads(metadata[_METADATA])["parts"]
        for key, size in sizes.items():
            part, offsets, start = parts[key], None, 0
            if "start" in part:
                (_,), start = size, int(part["start"])
            else:
                offsets = tuple(map(int, part["offsets"]))
            shape = tuple(map(int, part["shape"]))
            yield key, StoredPart(name=str(part["name"]), shape=shape, sizes=size, offsets=offsets, start=start)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its header does not say which tensors it holds: {error}") from error


def whole_shapes(parts: Iterable[StoredPart]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by its name.

    Raises:
        ValueError: parts of a tensor disagree, or are not the whole: a file is missing, or there is one too many.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    found: dict[str, int] = {}
    for part in parts:
        if shapes.setdefault(part.name, part.shape) != part.shape:
            raise ValueError(f"{part.name} has shape {part.shape} in one file and {shapes[part.name]} in another")
        found[part.name] = found.get(part.name, 0) + part.numel
    for name, shape in shapes.items():
        if found[name] != math.prod(shape):
            raise ValueError(f"{name} of shape {shape} has {found[name]} of {math.prod(shape)} elements in these files")
    return shapes


def weight_names(names: Iterable[str]) -> set[str]:
    """Return the names of the model's own tensors among those of a checkpoint.

    The others are the optimizer's (``exp_avg.<parameter>``) and states of random generators.
    """
    known = set(names)
    return {name for name in known if _is_weight(name, known)}


def _is_weight(name: str, known: set[str]) -> bool:
    first, _, rest = name.partition(".")
    return first != _RNG and rest not in known
