"""Model folders: config.json and safetensors, checked by their JSON headers alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.config.model.config_json import invalid_sizes, sizes_from_config
from launcher.config.model.image_text import is_image_text
from launcher.config.model.shape import Gpt2Sizes
from launcher.config.model.transformers_support import causal_lm_types, rope_types
from launcher.config.option_text import quoted_word
from launcher.config.quantization import MANIFEST_FILE as QUANTIZATION_FILE
from launcher.errors import ConfigError
from launcher.protocol.foreign_files import LOOKED_FOR, find_foreign
from launcher.protocol.state_files import MODEL_FOLDER, StoredPart, read_parts, state_files, weight_names, whole_shapes
from launcher.utils.files import exists, read_named
from launcher.utils.safetensors_header import read_header
from launcher.utils.text import shell_word

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 14

_OTHER_ROPE_TYPES = frozenset({"default", "mrope", "su"})
"""Rotary types that no table of Transformers holds: unscaled ones, and old names."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a JSON object; the message names the file.
    """
    return _json_object(folder / "config.json")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, empty when it has none.

    Where a folder has both, the single file counts and the index does not, as for ``from_pretrained``. Those of a
    checkpoint's ``model/`` are beside it, and hold more than weights.

    Raises:
        OSError: the index cannot be read.
        ValueError: the index is malformed.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        return checkpoint_files(folder)
    names = _json_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{INDEX_FILE} has no weight_map from tensors to files")
    outside = [name for name in names.values() if Path(name).name != name]
    if outside:
        raise ValueError(f"{INDEX_FILE} names {outside[0]!r}, which is not a file of the folder")
    missing = sorted(name for name in set(names.values()) if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{missing[0]} is missing, which {INDEX_FILE} names (of {len(set(names.values()))} files)")
    return [folder / name for name in sorted(set(names.values()))]


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the tensor files of the checkpoint whose ``model/`` this is; empty for others."""
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return []
    folder = folder.resolve()
    return state_files(folder.parent) if folder.name == MODEL_FOLDER else []


def _json_object(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(read_named(file).decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file.name} is not a JSON object")  # noqa: TRY004  (one error for all malformed files)
    return tree


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a folder, by name; of a checkpoint, of its weights.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is cut short or is not safetensors.
    """
    if files := checkpoint_files(folder):
        stored = whole_shapes(part for file in files for part in _parts_in(file))
        return {name: stored[name] for name in weight_names(stored)}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        shapes |= read_header(file).shapes
    return shapes


def _parts_in(file: Path) -> Iterator[StoredPart]:
    """Yield the parts of tensors that a file of a checkpoint stores."""
    header = read_header(file)
    try:
        for _, part in read_parts(header.metadata, header.shapes):
            yield part
    except ValueError as error:
        raise ValueError(f"{file.name} is not a file of a checkpoint: {error}") from error


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a model folder's weights; those of a checkpoint are in fp32.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is cut short or is not safetensors.
    """
    if checkpoint_files(folder):
        return sum(4 * math.prod(shape) for shape in tensor_shapes(folder).values())
    files = weight_files(folder)
    if not files and (foreign := find_foreign(folder)) is not None:
        files = foreign.weight_files()
    return sum(file.stat().st_size for file in files)


def weights_fingerprint(folder: Path) -> str:
    """Return a checksum of the sizes, the headers and samples of a folder's weights.

    It differs where weights were trained apart, and takes no longer for large models.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the index of the files is malformed.
    """
    files = weight_files(folder)
    if not files and (foreign := find_foreign(folder)) is not None:
        files = foreign.weight_files()
    found = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        found.update(str(size).encode())
        with file.open("rb") as stream:
            for part in range(_SAMPLES * _SAMPLES):
                stream.seek(size * part // (_SAMPLES * _SAMPLES))
                found.update(stream.read(_SAMPLE_BYTES))
    return found.hexdigest() if files else ""


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file that holds each tensor of a folder's safetensors, by the tensor's name."""
    return {name: file for file in weight_files(folder) for name in read_header(file).shapes}


def has_separate_head(folder: Path) -> bool:
    """Return whether a folder's safetensors hold an output head that differs from the embedding.

    Parts of both tensors are compared: a head that was trained apart differs nearly everywhere.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is cut short or is not safetensors.
    """
    names = tensor_shapes(folder)
    head = next((name for name in _HEADS if name in names), None)
    embedding = next((name for name in names if name.endswith(_EMBEDDINGS)), None)
    if head is None or embedding is None:
        return False
    if checkpoint_files(folder):
        return True  # which holds a tied tensor once
    files = tensor_files(folder)
    one, other = (_samples(files[name], name) for name in (head, embedding))
    return any(first != second for first, second in itertools.zip_longest(one, other))


def _samples(file: Path, name: str) -> Iterator[bytes]:
    """Yield the format of a tensor, then bytes from places all over it."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length).decode())[name]
        start, end = entry["data_offsets"]
        yield f"{entry['dtype']} {entry['shape']}".encode()
        for part in range(_SAMPLES):
            place = start + (end - start) * part // _SAMPLES
            stream.seek(8 + length + place)
            yield stream.read(min(_SAMPLE_BYTES, end - place))


def validate_model_folder(
    option: str, value: str, *, architecture: Mapping[str, Any] | None, own_family: str | None = None
) -> Iterator[ConfigError]:
    """Yield why ``value`` is not a folder that weights of ``architecture`` can be loaded from.

    Args:
        option: the option as the user types it.
        value: what it is set to.
        architecture: what the folder must hold; ``None`` accepts any.
        own_family: family of a model that brings its class, as a plugin's does, so that Transformers need not have it.
    """
    folder = Path(value).expanduser()
    instead = f"or {option}=random" if option.endswith(".weights") else "or a name on the hub (org/model)"
    fix = f"give a folder with config.json and {SINGLE_FILE} (as save_pretrained writes), {instead}"
    if not folder.is_dir():
        why = "is a file, not a folder" if folder.exists() else "there is no such folder"
        yield ConfigError(option, value, why=why, fix=fix)
        return
    if run := _run_in(folder):
        name = run if option == "model.weights" else value
        fix_run = f"set model.weights={shell_word(str(name))}"
        if option != "model.weights":
            fix_run += f", and leave {option} and the group model out"
        why = "holds runs, not a model" if run != folder else "is a run or a checkpoint, not a model"
        yield ConfigError(option, value, why=why, fix=fix_run)
        return
    has_config = exists(folder / "config.json")
    try:
        config = read_config(folder) if has_config else None
        shapes = tensor_shapes(folder)
        foreign = None if shapes and has_config else find_foreign(folder)
    except (OSError, ValueError) as error:
        yield ConfigError(option, value, why=f"cannot be read: {error}", fix=fix)
        return
    if config is None:
        if foreign is not None and option == "model.weights":
            return  # the model is chosen otherwise, and ranks compare it with the tensors
        why = "holds no config.json"
        if foreign is not None:
            why, fix = f"is a {foreign.title} without config.json", "choose its model, and set model.weights to it"
            if (below := foreign.weights.folder) != folder and exists(below / "config.json"):
                why, fix = f"holds {below.name}, a {foreign.title}", f"set {quoted_word(option, str(below))}"
        elif not shapes:
            why += f", nor weights: looked for {LOOKED_FOR}"
        yield ConfigError(option, value, why=why, fix=fix)
        return
    if not shapes and foreign is None:
        yield ConfigError(option, value, why=f"holds no weights: looked for {LOOKED_FOR}", fix=fix)
    elif (folder / "adapter_config.json").is_file():
        why = "holds a PEFT adapter beside the weights, which would not be applied"
        yield ConfigError(option, value, why=why, fix="merge it into the weights, or remove adapter_config.json")
    is_quantized_here = (folder / QUANTIZATION_FILE).is_file()
    yield from validate_config_json(option, value, config, is_quantized_here=is_quantized_here, own_family=own_family)
    sizes = sizes_from_config(config)
    found = sizes.architecture() if sizes else {"family": config.get("model_type")}
    if architecture is not None and (different := _differences(found, architecture)):
        fix = "choose the model that fits it"
        if option == "model.weights":
            fix += f": model=hf {quoted_word('model.name', value)}"
        yield ConfigError(option, value, why=f"holds another model: {different}", fix=fix)


def _run_in(folder: Path) -> Path | None:
    """Return ``folder`` if it is a run or checkpoint, else the newest run directly below it."""
    if exists(folder / "config.json"):
        return None
    if any(exists(folder / name) for name in ("run.yaml", "manifest.json", "checkpoints")):
        return folder
    try:
        return max(folder.glob("*/run.yaml"), key=lambda file: file.parent.name).parent
    except (ValueError, OSError):
        return None


def validate_config_json(
    option: str,
    value: object,
    config: Mapping[str, Any],
    *,
    is_quantized_here: bool = False,
    own_family: str | None = None,
) -> Iterator[ConfigError]:
    """Yield what a ``config.json`` needs that the installed Transformers or the launcher lacks.

    Args:
        option: the option as the user types it.
        value: what it is set to.
        config: the content of the file.
        is_quantized_here: job=quantize wrote the folder, and its own file says how to read the weights.
        own_family: family of a model that brings its class.
    """
    family, known = config.get("model_type"), causal_lm_types()
    if not isinstance(family, str):
        fix = "give a folder that save_pretrained wrote"
        yield ConfigError(option, value, why="config.json names no model_type", fix=fix)
    elif known is not None and family not in known and family != own_family and not is_image_text(config):
        why = f"the installed Transformers has no causal language model of type {family}"
        fix = "choose another model, or install a Transformers that has it"
        if "auto_map" in config:
            why += ", and the launcher never runs code of a model"
        yield ConfigError(option, value, why=why, fix=fix)
    if isinstance(sizes := sizes_from_config(config), Gpt2Sizes) and sizes.hidden_size % sizes.num_attention_heads:
        why = (
            f"config.json has n_embd={sizes.hidden_size}, which is not a multiple of n_head={sizes.num_attention_heads}"
        )
        yield ConfigError(option, value, why=why, fix="give a folder that save_pretrained wrote")
    for key, size in invalid_sizes(config):
        why = f"config.json says {key}: {json.dumps(size)}, which is not a whole number of at least 1"
        yield ConfigError(option, value, why=why, fix=f"correct {key} in its config.json, or choose another model")
    for kind in _rope_types(config):
        if (scaled := rope_types()) is not None and kind not in scaled | _OTHER_ROPE_TYPES:
            why = f"config.json sets rotary positions of type {kind!r}, unknown to the installed Transformers"
            fix = f"set its rope_type to one of {', '.join(sorted(scaled))}, or install a Transformers that has it"
            yield ConfigError(option, value, why=why, fix=fix)
    if (quantized := config.get("quantization_config")) and not is_quantized_here:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
        why = f"its weights are quantized by {method or 'an unnamed method'}, which the launcher does not read"
        fix = "give the original weights, and set model.quantization to quantize them"
        yield ConfigError(option, value, why=why, fix=fix)


def _rope_types(config: Mapping[str, Any]) -> set[str]:
    """Return the rotary types of a configuration, one per kind of layer if they differ."""
    found = set()
    for key in ("rope_scaling", "rope_parameters"):
        tree = config.get(key)
        if isinstance(tree, Mapping):
            for each in (tree, *(part for part in tree.values() if isinstance(part, Mapping))):
                kind = each.get("rope_type", each.get("type"))  # the newer key wins, as in Transformers
                found |= {kind} if isinstance(kind, str) else set()
    return found


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    if found.get("family") != wanted.get("family"):
        return f"its family is {found.get('family')}, not {wanted.get('family')}"
    names = [name for name in wanted if name in found and found[name] != wanted[name]]
    if "tie_word_embeddings" in names and wanted["tie_word_embeddings"]:
        names.remove("tie_word_embeddings")  # a head of its own in the files stays apart when they are loaded
    return ", ".join(f"{name} is {found[name]}, not {wanted[name]}" for name in names)
