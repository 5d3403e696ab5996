"""LoRA adapters as PEFT saves them: a folder's settings and shapes, read without torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.model.linear_layers import module_sizes
from launcher.errors import ConfigError
from launcher.utils.files import exists, read_named
from launcher.utils.safetensors_header import read_header

if TYPE_CHECKING:
    from launcher.config.model.base import Model

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_LORA_RANK = 512
"""Largest rank that the engine takes, as in vLLM."""
LORA_BYTES = 4
"""Bytes of an element in an engine, which applies adapters in fp32, as PEFT does."""
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MERGE = "merge it into the base model (merge_and_unload in PEFT) and serve that folder"

_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")
"""Values of ``init_lora_weights`` that leave the base weights as they are."""
_UNSUPPORTED: Mapping[str, str] = {
    "use_dora": "is a DoRA adapter: it rescales the base layer's output, so a batch could not share that output",
    "modules_to_save": "replaces whole modules of the base model (modules_to_save)",
    "trainable_token_indices": "replaces embedding rows (trainable_token_indices)",
    "target_parameters": "adapts parameters that belong to no linear layer (target_parameters)",
    "layer_replication": "repeats layers of the base model (layer_replication)",
    "lora_bias": "has biases of its own (lora_bias)",
    "alora_invocation_tokens": "starts in the middle of a sequence (alora_invocation_tokens)",
}
_UNUSED_HERE = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_type"),
        *("peft_version", "qalora_group_size", "revision", "target_modules", "exclude_modules", "task_type"),
        *("layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("runtime_config", "ensure_weight_tying", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("init_lora_weights", "bias", "fan_in_fan_out", "megatron_config"),
    }
)
"""Keys of the settings that change no result, or that are read here."""


class BadLoraFolder(Exception):
    """A folder whose adapter cannot be used.

    Attributes:
        fix: what the user can do.
    """

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why)
        self.why, self.fix = why, fix


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """Low-rank update of one linear layer: ``scale * up @ down``."""

    rank: int
    scale: float
    in_features: int
    out_features: int

    @property
    def numel(self) -> int:
        """Number of elements of both matrices."""
        return self.rank * (self.in_features + self.out_features)


@dataclass(frozen=True, kw_only=True)
class LoraFolder:
    """A LoRA adapter in PEFT's format."""

    path: Path
    modules: Mapping[str, LoraModule]
    """By the name of the layer in the base model."""

    @property
    def numel(self) -> int:
        """Number of elements of all matrices."""
        return sum(module.numel for module in self.modules.values())

    @property
    def max_rank(self) -> int:
        """Largest rank of a layer."""
        return max(module.rank for module in self.modules.values())

    def tensor_names(self, module: str) -> tuple[str, str]:
        """Return the names in the file of a layer's matrices: (rank, in) and (out, rank)."""
        return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def adapter_folder(value: str) -> Path:
    """Return the PEFT folder that a value of ``job.adapters`` names."""
    return Path(value).expanduser()


def read_lora_folder(folder: Path) -> LoraFolder:
    """Return the adapter in a folder, by its settings and the header of its weights.

    Raises:
        BadLoraFolder: it cannot be read, or is an adapter that the engine cannot apply exactly.
    """
    remedy = f"give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as PEFT's save_pretrained writes"
    if not folder.is_dir():
        raise BadLoraFolder("is a file, not a folder" if exists(folder) else "there is no such folder", remedy)
    if not exists(folder / CONFIG_FILE):
        is_model = exists(folder / "config.json")
        what = "is a whole model, not an adapter" if is_model else f"holds no {CONFIG_FILE}"
        raise BadLoraFolder(what, remedy)
    config = _read_config(folder / CONFIG_FILE, remedy)
    _check_supported(config)
    if not exists(folder / WEIGHTS_FILE):
        if exists(folder / "adapter_model.bin"):
            fix = f"load it with PEFT and save it again, which writes {WEIGHTS_FILE}"
            raise BadLoraFolder("its weights are a pickle (adapter_model.bin), which could run code", fix)
        raise BadLoraFolder(f"holds no {WEIGHTS_FILE}", remedy)
    try:
        shapes = read_header(folder / WEIGHTS_FILE).shapes
    except (OSError, ValueError) as error:
        raise BadLoraFolder(f"cannot be read: {error}", remedy) from error
    return LoraFolder(path=folder, modules=_modules(config, shapes))


def _read_config(file: Path, remedy: str) -> Mapping[str, Any]:
    try:
        config = json.loads(read_named(file).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise BadLoraFolder(f"{CONFIG_FILE} cannot be read: {error}", remedy) from error
    if not isinstance(config, dict):
        raise BadLoraFolder(f"{CONFIG_FILE} is not a JSON object", remedy)
    return config


def _check_supported(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise BadLoraFolder(f"is a PEFT adapter of type {kind}; the engine applies LORA only", _MERGE)
    if (task := config.get("task_type")) not in ("CAUSAL_LM", None):
        raise BadLoraFolder(f"was trained for another task ({task})", "give an adapter of task_type CAUSAL_LM")
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            raise BadLoraFolder(why, _MERGE)
    if (bias := config.get("bias", "none")) != "none":
        raise BadLoraFolder(f"changes biases of the base model (bias={bias})", _MERGE)
    if (init := config.get("init_lora_weights", True)) not in _PLAIN_INIT:
        why = f"was trained on base weights that its initialization changed (init_lora_weights={init})"
        fix = "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter, or merge it"
        raise BadLoraFolder(why, fix)
    for key, value in config.items():
        if key not in _UNUSED_HERE and value not in (None, False, "none", [], {}):
            raise BadLoraFolder(f"{CONFIG_FILE} sets {key}, which the engine does not support", _MERGE)


def _modules(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, LoraModule]:
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found = _TENSOR.fullmatch(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
        if found is None:
            raise BadLoraFolder(f"{WEIGHTS_FILE} holds {name}, which is no LoRA matrix of a linear layer", _MERGE)
        sides.setdefault(found["module"], {})[found["side"]] = shape
    if not sides:
        raise BadLoraFolder(f"{WEIGHTS_FILE} holds no tensors", "save the adapter again")
    return {module: _module(module, config, pair) for module, pair in sorted(sides.items())}


def _module(module: str, config: Mapping[str, Any], pair: Mapping[str, tuple[int, ...]]) -> LoraModule:
    down, up = pair.get("A", ()), pair.get("B", ())
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not all((*down, *up)):
        why = f"{module} has lora_A of shape {list(down)} and lora_B of shape {list(up)}; they must be (rank, in) and "
        raise BadLoraFolder(f"{why}(out, rank)", "save the adapter again")
    rank = down[0]
    said = _by_pattern(config, "rank_pattern", module, config.get("r"))
    if said != rank:
        raise BadLoraFolder(f"{CONFIG_FILE} says rank {said} for {module}, whose tensors have {rank}", "save it again")
    if rank > MAX_LORA_RANK:
        raise BadLoraFolder(f"{module} has rank {rank}; the engine takes at most {MAX_LORA_RANK}", _MERGE)
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise BadLoraFolder(f"{CONFIG_FILE} says lora_alpha {alpha!r}, which is not a number", "save it again")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraModule(rank=rank, scale=scale, in_features=down[1], out_features=up[0])


def _by_pattern(config: Mapping[str, Any], option: str, module: str, usual: Any) -> Any:
    """Return a layer's value of a setting with exceptions by pattern.

    The first match wins, as in PEFT.
    """
    patterns = config.get(option) or {}
    if not isinstance(patterns, Mapping):
        raise BadLoraFolder(f"{CONFIG_FILE} has a {option} that is not an object", "save it again")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise BadLoraFolder(f"{CONFIG_FILE} has an invalid {option}: {error}", "save it again") from error
    return usual


def linear_shapes(model: Model) -> Mapping[str, tuple[int, int]] | None:
    """Return (out, in) of the linear layers in a model's blocks, by name.

    ``None`` for families whose layers do not follow from their sizes.
    """
    modules = module_sizes(model)
    return None if modules is None else {name: (size.outputs, size.inputs) for name, size in modules.linear.items()}


def validate_lora_folder(
    option: str, value: str, *, model: str, layers: Mapping[str, tuple[int, int]] | None
) -> Iterator[ConfigError]:
    """Yield why an adapter cannot be served with a model.

    Args:
        option: as the user types it.
        value: the folder.
        model: name of the base model, for messages.
        layers: (out, in) of its linear layers, by name; ``None`` if they are unknown.
    """
    try:
        adapter = read_lora_folder(adapter_folder(value))
        if layers is not None:
            check_layers(adapter, layers, model=model)
    except BadLoraFolder as bad:
        yield ConfigError(option, value, why=bad.why, fix=bad.fix)


def check_layers(adapter: LoraFolder, layers: Mapping[str, tuple[int, int]], *, model: str) -> None:
    """Raise if an adapter adapts layers that a model lacks, or layers of another size.

    Raises:
        BadLoraFolder: with the first such layer.
    """
    fix = "give an adapter of this model, or set model to the one that it was trained on"
    for name, module in adapter.modules.items():
        shape = layers.get(name)
        if shape is None:
            if name.rpartition(".")[2] in ("lm_head", "embed_out"):
                raise BadLoraFolder(f"adapts the output layer {name}, which the engine does not support", _MERGE)
            raise BadLoraFolder(f"adapts {name}, and {model} has no such linear layer", fix)
        if shape != (module.out_features, module.in_features):
            why = f"adapts {name} of {module.in_features} to {module.out_features} features, which in {model} has "
            raise BadLoraFolder(f"{why}{shape[1]} to {shape[0]}", fix)
