"""Folders of safetensors: what is in them, read from their JSON headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigError
from launcher.models.families import sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a JSON object.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  (one error for all malformed files)
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, empty when it has none.

    Raises:
        ValueError: the index is malformed.
    """
    index = folder / INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{INDEX} has no weight_map")
        return [folder / name for name in sorted(set(names.values()))]
    return [folder / SINGLE] if (folder / SINGLE).is_file() else []


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a folder's safetensors, by name.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is cut short or is not safetensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        shapes |= _header(file)
    return shapes


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file that holds each tensor of a folder's safetensors, by the tensor's name."""
    return {name: file for file in weight_files(folder) for name in _header(file)}


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} is not a safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise ValueError(f"{file.name} is not a safetensors file") from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size != 8 + length + end:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes where its header promises {8 + length + end}")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def folder_problems(option: str, value: str, *, architecture: Mapping[str, Any] | None) -> Iterator[ConfigError]:
    """Yield why ``value`` is not a folder that weights of ``architecture`` can be loaded from.

    Args:
        option: the option as the user types it.
        value: what it is set to.
        architecture: what the folder must hold; ``None`` accepts any.
    """
    folder = Path(value).expanduser()
    fix = f"give a folder with config.json and {SINGLE} (as save_pretrained writes), or {option}=random"
    if not folder.is_dir():
        why = "is a file, not a folder" if folder.exists() else "there is no such folder"
        yield ConfigError(option, value, why=why, fix=fix)
        return
    try:
        config, shapes = read_config(folder), tensor_shapes(folder)
    except (OSError, ValueError) as error:
        yield ConfigError(option, value, why=f"cannot be read: {error}", fix=fix)
        return
    if not shapes:
        pickled = any(folder.glob("*.bin"))
        why = "holds only pickled weights, which can run code when loaded" if pickled else "holds no safetensors"
        yield ConfigError(option, value, why=why, fix=fix)
    sizes = sizes_of(config)
    found = sizes.architecture() if sizes else {"family": config.get("model_type")}
    if architecture is not None and (different := _differences(found, architecture)):
        yield ConfigError(option, value, why=f"holds another model: {different}", fix="choose the model that fits it")


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    if found.get("family") != wanted.get("family"):
        return f"its family is {found.get('family')}, not {wanted.get('family')}"
    names = [name for name in wanted if name in found and found[name] != wanted[name]]
    return ", ".join(f"{name} is {found[name]}, not {wanted[name]}" for name in names)


def save_model_folder(model: PreTrainedModel, folder: Path) -> None:
    """Write what :func:`folder_problems` accepts: configuration and weights, tied ones once. Imports safetensors.

    Transformers' own ``save_pretrained`` imports DeepSpeed where that is installed, which takes seconds: too many for a
    run that is asked to save and leave.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kept = set(model.state_dict())  # not buffers that are made anew
    named = (*model.named_parameters(), *model.named_buffers())
    tensors = {name: tensor.detach().contiguous() for name, tensor in named if name in kept}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
