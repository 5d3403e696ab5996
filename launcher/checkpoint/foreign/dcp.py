"""Read folders of ``torch.distributed.checkpoint``, as torchtitan and FSDP write them.

``.metadata`` is a pickle of a few dataclasses; no other class, and none of their methods, is used to read it. Each part
of a tensor is a file of ``torch.save`` within a ``.distcp`` file, and is read when it is needed. In the other form of
such folders parts are in safetensors files.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from launcher.checkpoint.foreign.tensors import ForeignTensors, add_step, clean_name
from launcher.checkpoint.foreign.torch_pickle import (
    explain_damage,
    inside,
    load_torch_bytes,
    stored_tensor,
)
from launcher.checkpoint.regions import Box
from launcher.checkpoint.tensors import StoredState, safetensors_dtype
from launcher.protocol.foreign_files import ForeignFiles

_MAX_METADATA_BYTES = 1 << 30
_STATE = re.compile(r"state\.(?P<parameter>.+)\.(?P<kind>exp_avg|exp_avg_sq|step)")
_OPTIMIZERS = ("optimizer", "optim", "optimizers")
_MODELS = ("model", "state_dict", "module")
_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    "torch.serialization": ("_get_layout",),
}
"""Modules and names that ``.metadata`` may mention; they become :class:`_Description`."""


class _Description:
    """Attributes of an object in ``.metadata``, without the methods of its class."""

    def __init__(self, *arguments: Any) -> None:
        del arguments

    def __setstate__(self, state: Any) -> None:
        """Keep attributes, or the tuple that stands for them."""
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _MetadataUnpickler(pickle.Unpickler):
    """Makes new classes, because a pickle can set attributes of those that it names."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._known: dict[tuple[str, str], Any] = {
            (module, name): type(name, (_Description,), {"__setstate__": _Description.__setstate__})
            for module, names in _DESCRIPTIONS.items()
            for name in names
        }
        self._known |= {("torch", "Size"): torch.Size, ("collections", "OrderedDict"): dict}

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that stands for one that describes checkpoints, or a format of tensors.

        Raises:
            pickle.UnpicklingError: the pickle names anything else.
        """
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        try:
            return self._known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"Unsupported GLOBAL {module}.{name}") from None


@dataclass(frozen=True)
class _Place:
    """Bytes of a ``.distcp`` file."""

    file: str
    offset: int
    length: int
    transforms: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A tensor, or an object of plain values."""

    path: tuple[str, ...]
    """Keys that lead to it in the dictionary that was saved."""
    shape: tuple[int, ...] | None
    """``None`` for an object."""
    dtype: torch.dtype | None
    parts: tuple[tuple[Box, _Place], ...]
    """Of an object: one, of no size."""


def read_metadata(file: Path) -> dict[str, _Entry]:
    """Return what a folder holds, by name.

    Raises:
        BadCheckpoint: it is damaged, or names classes that describe no checkpoint.
    """
    with explain_damage(file):
        if file.stat().st_size > _MAX_METADATA_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        found = _MetadataUnpickler(file.read_bytes()).load()
        places = {
            (str(index.fqn), None if vars(index).get("offset") is None else _numbers(index.offset)): _place(info)
            for index, info in found.storage_data.items()
        }
        paths = found.planner_data if isinstance(found.planner_data, dict) else {}
        return {
            str(name): _entry(str(name), kept, places, tuple(map(str, paths.get(name, (name,)))))
            for name, kept in found.state_dict_metadata.items()
        }


def _place(info: Any) -> _Place:
    transforms = tuple(map(str, vars(info).get("transform_descriptors") or ()))
    return _Place(str(info.relative_path), int(info.offset), int(info.length), transforms)


def _entry(name: str, kept: Any, places: Mapping[Any, _Place], path: tuple[str, ...]) -> _Entry:
    if "chunks" not in vars(kept):
        return _Entry(path, None, None, ((Box((), ()), places[name, None]),))
    properties = kept.properties
    dtype = properties.state[0] if "state" in vars(properties) else properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} has no format")  # noqa: TRY004
    boxes = [Box(_numbers(chunk.offsets), _numbers(chunk.sizes)) for chunk in kept.chunks]
    return _Entry(path, _numbers(kept.size), dtype, tuple((box, places[name, box.offsets]) for box in boxes))


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(map(int, values))


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor in a ``.distcp`` file."""

    file: Path
    name: str
    place: _Place
    sizes: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Any:
        """Read all of it, and return the values at ``index``."""
        value = load_torch_bytes(_bytes_at(self.file, self.place), file=self.file, what=self.name)
        with explain_damage(self.file, self.name):
            tensor = stored_tensor(value)
            if (tuple(tensor.shape), tensor.dtype) != (self.sizes, self.dtype):
                raise ValueError(f"a part is {tensor.dtype} {tuple(tensor.shape)}, not {self.dtype} {self.sizes}")
            return tensor[index]


def _bytes_at(file: Path, place: _Place) -> bytes:
    with explain_damage(file), file.open("rb") as stream:
        size, end = file.stat().st_size, place.offset + place.length
        if not 0 <= place.offset <= end <= size:
            raise ValueError(f"it has {size} bytes, and .metadata promises {end}")
        stream.seek(place.offset)
        return stream.read(place.length)


def read_dcp(weights: ForeignFiles, optimizer: ForeignFiles | None) -> ForeignTensors:
    """Return the tensors of one folder, or of one of weights and one of the optimizer.

    Raises:
        BadCheckpoint: files are damaged, or hold other objects.
    """
    found = ForeignTensors()
    for files in (weights, optimizer):
        if files is not None:
            _Folder(files.folder).add_to(found)
    return found


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, inside(folder, folder / ".metadata")
        self._entries = read_metadata(self._file)

    def add_to(self, found: ForeignTensors) -> None:
        """Add this folder's weights and moments."""
        numbered = False
        nested = any(len(entry.path) > 1 and entry.path[-2] in _MODELS for entry in self._entries.values())
        with explain_damage(self._file):
            for name, entry in self._entries.items():
                path = entry.path
                if (state := _state_of(path)) is not None:
                    parameter, kind = clean_name(state[0]), state[1]
                    numbered |= parameter.isdigit()
                    if kind == "step":
                        add_step(found.moments, parameter, self._value(name, entry), self._file)
                    else:
                        self._add(found.moments, f"{kind}.{parameter}", name, entry)
                elif path[-2:] == ("train_state", "step"):
                    found.step = int(self._value(name, entry).item())
                elif entry.shape is not None and (path[-2] in _MODELS if len(path) > 1 else not nested):
                    self._add(found.weights, clean_name(path[-1]), name, entry)
            if numbered:
                found.order = self._order()

    def _add(self, state: StoredState, target: str, name: str, entry: _Entry) -> None:
        if entry.shape is None or entry.dtype is None:
            raise ValueError(f"{name} is no tensor")
        for box, place in entry.parts:
            values = _Chunk(self._file_of(place, name), name, place, box.sizes, entry.dtype)
            state.add(target, entry.shape, box, values, dtype=entry.dtype, file=values.file)

    def _file_of(self, place: _Place, name: str) -> Path:
        if place.transforms:
            raise ValueError(f"{name} is stored by {', '.join(place.transforms)}, which is not read")
        return inside(self._folder, self._folder / place.file)

    def _value(self, name: str, entry: _Entry) -> Any:
        """Return a value that is small: a scalar, or an object of plain values."""
        if len(entry.parts) != 1:
            raise ValueError(f"{name} has {len(entry.parts)} parts")
        box, place = entry.parts[0]
        file = self._file_of(place, name)
        if entry.dtype is not None:
            return _Chunk(file, name, place, box.sizes, entry.dtype)[...]
        return load_torch_bytes(_bytes_at(file, place), file=file, what=name)

    def _order(self) -> list[list[str]]:
        """Return the numbers of parameters in each group of an optimizer's own ``state_dict``."""
        groups: dict[str, list[str]] = {}
        for name, entry in self._entries.items():
            if entry.path[-1].split(".")[-1] == "param_groups":
                return [[str(number) for number in group["params"]] for group in self._value(name, entry)]
            if entry.path[-1] == "params" and "param_groups" in entry.path:
                groups[entry.path[-2]] = [str(number) for number in self._value(name, entry)]
        return [groups[key] for key in sorted(groups, key=int)]


def _state_of(path: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the parameter of an optimizer's state, and which state it is; ``None`` for others."""
    start = next((number + 1 for number, part in enumerate(path) if part in _OPTIMIZERS), 0)
    words = ".".join(path[start:])
    match = _STATE.fullmatch(words) or (_STATE.fullmatch(words.partition(".")[2]) if len(path) == 1 else None)
    return (match["parameter"], match["kind"]) if match else None


def read_dcp_safetensors(files: ForeignFiles) -> ForeignTensors:
    """Return the weights of a folder whose safetensors hold parts of tensors.

    Raises:
        BadCheckpoint: a file is damaged.
    """
    found = ForeignTensors()
    parts: dict[str, list[tuple[Box, Any, torch.dtype, Path]]] = {}
    for file in files.files:
        with explain_damage(inside(files.folder, file)):
            opened: Any = safe_open(str(file), framework="pt")
            places = json.loads((opened.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for key in opened.keys():  # noqa: SIM118
                values = opened.get_slice(key)
                sizes = tuple(values.get_shape())
                offsets = tuple(map(int, places.get(key, {}).get("saved_offsets", (0,) * len(sizes))))
                dtype = safetensors_dtype(values.get_dtype())
                parts.setdefault(key, []).append((Box(offsets, sizes), values, dtype, file))
    for key, stored in parts.items():
        with explain_damage(stored[0][3], key):
            ends = zip(*(map(sum, zip(box.offsets, box.sizes, strict=True)) for box, *_ in stored), strict=True)
            shape = tuple(max(each) for each in ends)
            for box, values, dtype, file in stored:
                found.weights.add(clean_name(key), shape, box, values, dtype=dtype, file=file)
    return found
