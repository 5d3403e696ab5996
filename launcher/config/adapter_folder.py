"""Folders of trained adapters, read without torch: PEFT's, and those in checkpoints.

``model.adapter`` puts one on a model's weights; ``job.adapters`` serves several beside them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from launcher.config.adapter import Dora, Lora, RsLora, shortest_targets
from launcher.config.model.folder import checkpoint_files, tensor_shapes
from launcher.config.model.linear_layers import LinearSize
from launcher.errors import ConfigError
from launcher.protocol.state_files import MODEL_FOLDER
from launcher.utils.files import exists, read_named
from launcher.utils.safetensors_header import read_header
from launcher.utils.schema import build

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_NAME = "default"
"""Name of the one adapter in a model, which is part of the names of its parameters."""

ADAPTER_ATTRIBUTE = "adapter_config"
"""Attribute of a model with an adapter on a rank: the adapter's config in PEFT's format."""

MAX_LORA_RANK = 512
"""Largest rank that the engine takes, as in vLLM."""
LORA_BYTES = 4
"""Bytes of an element in an engine, which applies adapters in fp32, as PEFT does."""

_PREFIX = "base_model.model."
_LORA = ("lora_A", "lora_B")
_MAGNITUDE = "lora_magnitude_vector"
_WHOLE = f"modules_to_save.{ADAPTER_NAME}"
_MATRIX = re.compile(rf"(?P<layer>.+)\.(?P<side>lora_[AB])\.{ADAPTER_NAME}\.weight")
_OUTPUT_LAYERS = ("lm_head", "embed_out")

_FOLDER = f"give a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, or a run of job=train adapter=lora"
_MERGE = "merge it into its model with PEFT (merge_and_unload), and use that folder"
_AGAIN = "save the adapter again"

_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")
"""Values of ``init_lora_weights`` that leave the base weights as they are."""

_UNSUPPORTED: Mapping[str, str] = {
    "trainable_token_indices": "replaces embedding rows (trainable_token_indices)",
    "target_parameters": "adapts parameters that belong to no linear layer (target_parameters)",
    "layer_replication": "repeats layers of the base model (layer_replication)",
    "lora_bias": "has biases of its own (lora_bias)",
    "alora_invocation_tokens": "starts in the middle of a sequence (alora_invocation_tokens)",
}
"""Settings that no use supports, with the reason."""

_UNUSED = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_type"),
        *("peft_version", "qalora_group_size", "revision", "target_modules", "exclude_modules", "task_type"),
        *("layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("runtime_config", "ensure_weight_tying", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("init_lora_weights", "bias", "fan_in_fan_out", "use_dora", "modules_to_save"),
    }
)
"""Settings that change no result, or that are read here."""


class AdapterUse(Enum):
    """What an adapter is read for, with the settings that this use does not support."""

    MODEL = "model"
    """On a model's weights: trained on, merged into them, exported.
    All layers have one rank and one scale."""
    ENGINE = "engine"
    """Beside weights that other adapters share in a batch.
    Each adds to the output of linear layers, no more."""

    def unsupported(self, config: Mapping[str, Any]) -> Iterator[str]:
        """Yield what an adapter is or does that this use does not support."""
        if self is AdapterUse.MODEL:
            if config.get("use_dora") and config.get("use_rslora"):
                yield "is of DoRA and rsLoRA together (use_dora, use_rslora)"
            for name in ("rank_pattern", "alpha_pattern"):
                if config.get(name):
                    yield f"has layers with values of their own ({name}), which job.adapters supports"
            return
        if config.get("use_dora"):
            yield "is a DoRA adapter: it rescales the base layer's output, so a batch could not share that output"
        if config.get("modules_to_save"):
            yield "replaces whole modules of the base model (modules_to_save)"
        if (bias := config.get("bias", "none")) != "none":
            yield f"changes biases of the base model (bias={bias})"


class _BadAdapter(Exception):
    """An adapter that cannot be used: why, and what the user can do."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why)
        self.why, self.fix = why, fix


@dataclass(frozen=True, kw_only=True)
class LayerUpdate:
    """Low-rank update of one linear layer: ``scale * B A``."""

    rank: int
    scale: float
    inputs: int
    outputs: int

    @property
    def numel(self) -> int:
        """Number of elements of both matrices."""
        return self.rank * (self.inputs + self.outputs)


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """An adapter on the disk: what it is, and which tensors it has."""

    folder: Path
    lora: Lora
    """Its options; ``layers`` has the ranks and scales of layers that have their own."""
    base: str
    """Name of the model that it was trained on, as its config gives it."""
    layers: Mapping[str, LayerUpdate]
    """Layers that have matrices, by their names in the model, sorted."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor by the name of its parameter in a model with this adapter."""
    keys: Mapping[str, str]
    """Name of each tensor in the files, by the name of its parameter."""

    @property
    def numel(self) -> int:
        """Number of elements of all matrices."""
        return sum(layer.numel for layer in self.layers.values())

    @property
    def max_rank(self) -> int:
        """Largest rank of a layer."""
        return max(layer.rank for layer in self.layers.values())


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder holds an adapter instead of a model."""
    if not exists(folder / ADAPTER_CONFIG):
        return False
    return exists(folder / ADAPTER_WEIGHTS) or bool(checkpoint_files(folder)) or not exists(folder / "config.json")


def adapter_label(value: str) -> str:
    """Return a name of an adapter's folder for people.

    It is the folder's last part, or ``RUN@step_…`` of a checkpoint's.
    """
    folder = Path(value)
    if folder.name == MODEL_FOLDER and folder.parent.name.startswith("step_"):
        return f"{folder.parent.parent.parent.name}@{folder.parent.name}"
    return folder.name


def read_adapter_folder(option: str, value: str, *, use: AdapterUse) -> AdapterFolder:
    """Return the adapter in a folder, without reading its tensors.

    Args:
        option: by which the folder was chosen.
        value: the folder.
        use: what the adapter is for.

    Raises:
        ConfigError: the folder is missing or damaged, or holds an adapter that this use does not support.
    """
    try:
        return _read(Path(value).expanduser(), use)
    except _BadAdapter as bad:
        raise ConfigError(option, value, why=bad.why, fix=bad.fix) from bad


def _read(folder: Path, use: AdapterUse) -> AdapterFolder:
    if not folder.is_dir():
        raise _BadAdapter("is a file, not a folder" if exists(folder) else "there is no such folder", _FOLDER)
    if not exists(folder / ADAPTER_CONFIG):
        is_model = exists(folder / "config.json")
        why = "is a whole model, not an adapter" if is_model else f"holds no {ADAPTER_CONFIG}, so it is no adapter"
        raise _BadAdapter(why, _FOLDER)
    if exists(folder / "adapter_model.bin") and not exists(folder / ADAPTER_WEIGHTS):
        why = "its weights are a pickle (adapter_model.bin), which could run code when it is read"
        fix = f"load it with PEFT and save it again, which writes {ADAPTER_WEIGHTS}"
        raise _BadAdapter(why, fix)
    config = _read_config(folder / ADAPTER_CONFIG)
    try:
        stored = _stored_shapes(folder)
    except (OSError, ValueError) as error:
        raise _BadAdapter(f"cannot be read: {error}", _FOLDER) from error
    if stored is None:
        raise _BadAdapter(f"holds no {ADAPTER_WEIGHTS}", _FOLDER)
    problems = [*_unsupported(config), *(_BadAdapter(why, _MERGE) for why in use.unsupported(config))]
    if problems:
        raise problems[0]
    whole = tuple(map(str, config.get("modules_to_save") or ()))
    keys = {parameter_name(key, whole): key for key in stored}
    shapes = {name: stored[key] for name, key in keys.items()}
    layers = _layers(config, shapes, keys, use)
    lora = _options(config, layers, shapes)
    base = str(config.get("base_model_name_or_path") or "a model that it does not name")
    return AdapterFolder(folder=folder, lora=lora, base=base, layers=layers, shapes=shapes, keys=keys)


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(read_named(file).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise _BadAdapter(f"{ADAPTER_CONFIG} cannot be read: {error}", _FOLDER) from error
    if not isinstance(config, dict):
        raise _BadAdapter(f"{ADAPTER_CONFIG} is not a JSON object", _FOLDER)
    return config


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]] | None:
    if exists(folder / ADAPTER_WEIGHTS):
        return read_header(folder / ADAPTER_WEIGHTS).shapes
    return tensor_shapes(folder) if checkpoint_files(folder) else None


def _unsupported(config: Mapping[str, Any]) -> Iterator[_BadAdapter]:
    """Yield settings that no use supports."""
    kind = config.get("peft_type")
    if kind != "LORA":
        yield _BadAdapter(f"is a PEFT adapter of type {kind}, not LORA", _MERGE)
    if (task := config.get("task_type")) not in ("CAUSAL_LM", None):
        yield _BadAdapter(f"was trained for another task ({task})", "give an adapter of task_type CAUSAL_LM")
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            yield _BadAdapter(why, _MERGE)
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INIT:
        why = f"was trained on base weights that its initialization changed (init_lora_weights={init})"
        fix = "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter, or merge it"
        yield _BadAdapter(why, fix)
    for key, value in config.items():
        if key not in _UNUSED and value not in (None, False, "none", [], {}):
            yield _BadAdapter(f"{ADAPTER_CONFIG} sets {key}, which the launcher does not support", _MERGE)


def _layers(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], keys: Mapping[str, str], use: AdapterUse
) -> Mapping[str, LayerUpdate]:
    """Return the layers that have matrices, by name."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if found := _MATRIX.fullmatch(name):
            sides.setdefault(found["layer"], {})[found["side"]] = shape
        elif use is AdapterUse.ENGINE or ("lora_" in name and f".{_MAGNITUDE}.{ADAPTER_NAME}." not in name):
            raise _BadAdapter(f"holds {keys[name]}, which is no LoRA matrix of a linear layer", _MERGE)
    if not sides:
        raise _BadAdapter("holds no matrices of LoRA" if shapes else "holds no tensors", _AGAIN)
    return {name: _layer(name, config, pair, use) for name, pair in sorted(sides.items())}


def _layer(name: str, config: Mapping[str, Any], pair: Mapping[str, tuple[int, ...]], use: AdapterUse) -> LayerUpdate:
    a, b = (pair.get(side, ()) for side in _LORA)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not all((*a, *b)):
        why = f"{name} has lora_A of shape {list(a)} and lora_B of shape {list(b)}; they must be (rank, in) and "
        raise _BadAdapter(f"{why}(out, rank)", _AGAIN)
    rank = a[0]
    said = _by_pattern(config, "rank_pattern", name, config.get("r"))
    if said != rank:
        raise _BadAdapter(f"{ADAPTER_CONFIG} says rank {said} for {name}, whose tensors have {rank}", _AGAIN)
    if rank > MAX_LORA_RANK and use is AdapterUse.ENGINE:
        raise _BadAdapter(f"{name} has rank {rank}; the engine takes at most {MAX_LORA_RANK}", _MERGE)
    alpha = _by_pattern(config, "alpha_pattern", name, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _BadAdapter(f"{ADAPTER_CONFIG} says lora_alpha {alpha!r}, which is not a number", _AGAIN)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LayerUpdate(rank=rank, scale=scale, inputs=a[1], outputs=b[0])


def _by_pattern(config: Mapping[str, Any], option: str, layer: str, usual: Any) -> Any:
    """Return a layer's value of a setting with exceptions by pattern.

    The first match wins, as in PEFT.
    """
    patterns = config.get(option) or {}
    if not isinstance(patterns, Mapping):
        raise _BadAdapter(f"{ADAPTER_CONFIG} has a {option} that is not an object", _AGAIN)
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as error:
            raise _BadAdapter(f"{ADAPTER_CONFIG} has an invalid {option}: {error}", _AGAIN) from error
    return usual


def _options(config: Mapping[str, Any], layers: Iterable[str], shapes: Iterable[str]) -> Lora:
    """Return the options of the group adapter that a config means."""
    kind = Dora if config.get("use_dora") else RsLora if config.get("use_rslora") else Lora
    whole = (name.partition(f".{_WHOLE}.")[0] for name in shapes if f".{_WHOLE}." in name)
    tree = {
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout", 0.0),
        "targets": tuple(layers),
        "modules_to_save": tuple(dict.fromkeys(whole)),
        "bias": config.get("bias", "none"),
    }
    errors: list[ConfigError] = []
    lora = build(kind, tree, path="adapter", report=errors.append)
    if errors or lora is None:
        name = errors[0].option.removeprefix("adapter.")
        why = f"its {ADAPTER_CONFIG} says {name}={errors[0].value}: {errors[0].why}"
        raise _BadAdapter(why, "give an adapter that PEFT wrote")
    return lora


def validate_adapter_fits(
    option: str, found: AdapterFolder, linear: Mapping[str, LinearSize], *, model: str
) -> Iterator[ConfigError]:
    """Yield the first layer of an adapter that a model lacks, or has in another size.

    Args:
        option: by which the adapter was chosen.
        found: the adapter.
        linear: layers in the model's blocks, by name.
        model: its name.
    """
    for name, layer in found.layers.items():
        size = linear.get(name)
        if size is not None and (size.inputs, size.outputs) == (layer.inputs, layer.outputs):
            continue
        fix = f"give an adapter of this model, or set model to the one that it was trained on ({found.base})"
        if size is not None:
            why = f"adapts {name} of {layer.inputs} to {layer.outputs} features, which in {model} has "
            why += f"{size.inputs} to {size.outputs}"
        elif name.rpartition(".")[2] in _OUTPUT_LAYERS:
            why, fix = f"adapts the output layer {name}, which the launcher does not support", _MERGE
        else:
            why = f"adapts {name}, and {model} has no such linear layer"
        yield ConfigError(option, found.folder, why=why, fix=fix)
        return


def parameter_name(key: str, modules_to_save: tuple[str, ...]) -> str:
    """Return the name of a parameter in a model with an adapter, from its name in a file."""
    name = key.removeprefix(_PREFIX)
    for part in _LORA:
        if name.endswith(f".{part}.weight"):
            return name.replace(f".{part}.weight", f".{part}.{ADAPTER_NAME}.weight")
    if name.endswith(f".{_MAGNITUDE}"):
        return f"{name}.{ADAPTER_NAME}.weight"
    owner, _, last = name.rpartition(".")
    if owner.endswith(modules_to_save or ("\0",)):  # as PEFT compares
        return f"{owner}.{_WHOLE}.{last}"
    return name


def peft_key(name: str) -> str:
    """Return the name in PEFT's files of a parameter: the reverse of :func:`parameter_name`."""
    name = name.replace(f".{_MAGNITUDE}.{ADAPTER_NAME}.weight", f".{_MAGNITUDE}").replace(f".{_WHOLE}.", ".")
    for part in _LORA:
        name = name.replace(f".{part}.{ADAPTER_NAME}.", f".{part}.")
    return f"{_PREFIX}{name}"


def base_name(name: str) -> str:
    """Return the name that a parameter of the model itself has without an adapter."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".").replace(f".{_WHOLE}.", ".")


def peft_config(
    lora: Lora, *, base: str, targets: Sequence[str], whole: Sequence[str], linear: Iterable[str], is_conv1d: bool
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``, which PEFT reads.

    Args:
        lora: of the run.
        base: name or folder of the model that it was trained on.
        targets: names of the layers with matrices.
        whole: names of the modules that are trained whole.
        linear: names of all linear layers in the model's blocks.
        is_conv1d: whether they are Transformers' ``Conv1D``, which stores its matrix transposed.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(shortest_targets(targets, linear)),
        "modules_to_save": list(whole) or None,
        "bias": lora.bias,
        "use_rslora": lora.is_rslora,
        "use_dora": lora.is_dora,
        "fan_in_fan_out": is_conv1d,
        "init_lora_weights": "gaussian" if lora.init == "gaussian" else True,
        "inference_mode": True,
    }
