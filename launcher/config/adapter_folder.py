"""Folders of trained adapters: PEFT's, and ``model/`` of a checkpoint with an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.adapter import Dora, Lora, RsLora, shortest_targets
from launcher.config.model.folder import checkpoint_files, tensor_shapes
from launcher.config.model.linear_layers import ModuleSizes
from launcher.errors import ConfigError
from launcher.utils.files import exists, read_named
from launcher.utils.safetensors_header import read_header
from launcher.utils.schema import build

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_NAME = "default"
"""Name of the one adapter in a model, which is part of the names of its parameters."""

ADAPTER_ATTRIBUTE = "adapter_config"
"""Attribute of a model with an adapter on a rank: the adapter's config in PEFT's format."""

_PREFIX = "base_model.model."
_LORA = ("lora_A", "lora_B")
_MAGNITUDE = "lora_magnitude_vector"
_WHOLE = f"modules_to_save.{ADAPTER_NAME}"

_USUAL: Mapping[str, tuple[Any, ...]] = {
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "target_parameters": (None, [], ()),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "mica": (None, False),
}
"""Options of PEFT that change what an adapter computes, with the supported values."""


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder holds an adapter instead of a model."""
    if not exists(folder / ADAPTER_CONFIG):
        return False
    return exists(folder / ADAPTER_WEIGHTS) or bool(checkpoint_files(folder)) or not exists(folder / "config.json")


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """An adapter on the disk: what it is, and which tensors it has."""

    folder: Path
    lora: Lora
    base: str
    """Name of the model that it was trained on, as its config gives it."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each tensor by the name of its parameter in a model with this adapter."""
    keys: Mapping[str, str]
    """Name of each tensor in the files, by the name of its parameter."""

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have matrices."""
        return [name.partition(".lora_A.")[0] for name in self.shapes if ".lora_A." in name]


def read_adapter_folder(option: str, value: str) -> AdapterFolder:
    """Return the adapter in a folder, without reading its tensors.

    Args:
        option: by which the folder was chosen.
        value: the folder.

    Raises:
        ConfigError: the folder is missing, is damaged, or holds an adapter that the launcher does not support.
    """
    folder = Path(value).expanduser()
    fix = f"give a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, or a run of job=train adapter=lora"
    if not folder.is_dir():
        why = "is a file, not a folder" if folder.exists() else "there is no such folder"
        raise ConfigError(option, value, why=why, fix=fix)
    if not exists(folder / ADAPTER_CONFIG):
        raise ConfigError(option, value, why=f"holds no {ADAPTER_CONFIG}, so it is no adapter", fix=fix)
    if exists(folder / "adapter_model.bin") and not exists(folder / ADAPTER_WEIGHTS):
        why = "its weights are a pickle (adapter_model.bin), which could run code when it is read"
        raise ConfigError(option, value, why=why, fix="save it again with safe_serialization=True")
    try:
        tree = json.loads(read_named(folder / ADAPTER_CONFIG).decode())
        stored = _stored_shapes(folder)
        if not isinstance(tree, dict):
            raise ValueError(f"{ADAPTER_CONFIG} is not a JSON object")  # noqa: TRY004 (one error for all)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(option, value, why=f"cannot be read: {error}", fix=fix) from error
    if not stored:
        raise ConfigError(option, value, why=f"holds no {ADAPTER_WEIGHTS}", fix=fix)
    return _adapter_of(option, value, folder, tree, stored)


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    if exists(folder / ADAPTER_WEIGHTS):
        return read_header(folder / ADAPTER_WEIGHTS).shapes
    return tensor_shapes(folder) if checkpoint_files(folder) else {}


def _adapter_of(
    option: str, value: str, folder: Path, tree: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]
) -> AdapterFolder:
    if problem := next(_unsupported(tree), None):
        why = f"is an adapter that the launcher cannot apply: {problem}"
        raise ConfigError(option, value, why=why, fix="merge it into its model with PEFT, and load that")
    whole = tuple(map(str, tree.get("modules_to_save") or ()))
    keys = {parameter_name(key, whole): key for key in stored}
    shapes = {name: stored[key] for name, key in keys.items()}
    layers = [name.partition(".lora_A.")[0] for name in shapes if ".lora_A." in name]
    strange = [
        key
        for name, key in keys.items()
        if "lora_" in name and not any(f".{part}.{ADAPTER_NAME}." in name for part in (*_LORA, _MAGNITUDE))
    ]
    if strange or not layers:
        why = f"holds {strange[0]}, which is of no linear layer" if strange else "holds no matrices of LoRA"
        raise ConfigError(option, value, why=why, fix="give an adapter of linear layers")
    kind = Dora if tree.get("use_dora") else RsLora if tree.get("use_rslora") else Lora
    errors: list[ConfigError] = []
    options = {
        "r": tree.get("r", 8),
        "alpha": tree.get("lora_alpha", 8),
        "dropout": tree.get("lora_dropout", 0.0),
        "targets": tuple(layers),
        "modules_to_save": tuple(dict.fromkeys(n.partition(f".{_WHOLE}.")[0] for n in shapes if f".{_WHOLE}." in n)),
        "bias": tree.get("bias", "none"),
    }
    lora = build(kind, options, path="adapter", report=errors.append)
    ranks = {shapes[f"{name}.lora_A.{ADAPTER_NAME}.weight"][0] for name in layers}
    if lora is not None and ranks != {lora.r}:
        errors.append(ConfigError("r", lora.r, why=f"its matrices have rank {sorted(ranks)}", fix=""))
    if errors or lora is None:
        name = errors[0].option.removeprefix("adapter.")
        why = f"its {ADAPTER_CONFIG} says {name}={errors[0].value}: {errors[0].why}"
        raise ConfigError(option, value, why=why, fix="give an adapter that PEFT wrote")
    base = str(tree.get("base_model_name_or_path") or "a model that it does not name")
    return AdapterFolder(folder=folder, lora=lora, base=base, shapes=shapes, keys=keys)


def _unsupported(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yield options of PEFT that the launcher does not support."""
    if tree.get("peft_type") != "LORA":
        yield f"peft_type is {tree.get('peft_type')}, not LORA"
    if tree.get("use_dora") and tree.get("use_rslora"):
        yield "use_dora and use_rslora together"
    for name, usual in _USUAL.items():
        if (value := tree.get(name)) not in usual:
            yield f"{name} is {json.dumps(value)}"


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


def validate_adapter_fits(
    option: str, found: AdapterFolder, modules: ModuleSizes, *, model: str
) -> Iterator[ConfigError]:
    """Yield why an adapter is of another model.

    Args:
        option: by which it was chosen.
        found: the adapter.
        modules: of the model of this run.
        model: its name.
    """
    wrong = ""
    for name in found.layers:
        size = modules.linear.get(name)
        a, b = (found.shapes.get(f"{name}.{part}.{ADAPTER_NAME}.weight", (0, 0)) for part in _LORA)
        if size is None:
            wrong = f"it has matrices for {name}, and this model has no such layer"
        elif (a[1], b[0]) != (size.inputs, size.outputs):
            wrong = f"its {name} takes {a[1]} values to {b[0]}, this model's {size.inputs} to {size.outputs}"
        if wrong:
            why = f"is of another model ({found.base}) than {model}: {wrong}"
            yield ConfigError(option, found.folder, why=why, fix="choose the model that it was trained on")
            return
