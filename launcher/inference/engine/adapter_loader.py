"""Load LoRA adapters from PEFT folders for a model's linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from launcher.config.lora_folder import BadLoraFolder, LoraFolder, adapter_folder, check_layers, read_lora_folder
from launcher.errors import EXIT_BAD_INPUT, ConfigError, JobError
from launcher.inference.kernels.low_rank import NO_ADAPTERS, AdapterSet, LowRank
from launcher.quantization.int4 import Int4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_FOLDERS: Mapping[str, str] = MappingProxyType({})


def load_adapters(
    model: PreTrainedModel, folders: Mapping[str, str], *, name: str, heartbeat: Callable[[], None] = lambda: None
) -> AdapterSet:
    """Return the adapters of a model, loaded on its device.

    Args:
        model: the base model, whole, with its own layers.
        folders: of the adapters, by name.
        name: of the model, for messages.
        heartbeat: called after each adapter.

    Raises:
        ConfigError: a folder holds no adapter of this model that can be applied.
        JobError: the values of an adapter are not finite.
    """
    if not folders:
        return NO_ADAPTERS
    linear = _linear_layers(model)
    shapes = {path: shape for path, (_, shape) in linear.items()}
    updates: dict[nn.Module, dict[int, LowRank]] = {}
    for number, (adapter_name, value) in enumerate(folders.items()):
        option = f"job.adapters.{adapter_name}"
        try:
            adapter = read_lora_folder(adapter_folder(value))
            check_layers(adapter, shapes, model=name)
            loaded = _load(adapter, model.device)
        except BadLoraFolder as bad:
            raise ConfigError(option, value, why=bad.why, fix=bad.fix) from bad
        for path, update in loaded.items():
            if not (update.down.isfinite().all() and update.up.isfinite().all()):
                why = f"{option}={value}: its update of {path} has values that are not finite"
                raise JobError(f"{why}. Leave the adapter out, or export it again.", exit_code=EXIT_BAD_INPUT)
            updates.setdefault(linear[path][0], {})[number] = update
        heartbeat()
    return AdapterSet(tuple(folders), updates)


def _linear_layers(model: PreTrainedModel) -> dict[str, tuple[nn.Module, tuple[int, int]]]:
    """Return the linear layers before the output layer, by name, with (out, in) of each."""
    found = {}
    for path, layer in model.named_modules():
        if layer is model.get_output_embeddings():
            continue
        if isinstance(layer, Conv1D):
            found[path] = (layer, (layer.nf, layer.nx))
        elif isinstance(layer, nn.Linear | Int4Linear):
            found[path] = (layer, (layer.out_features, layer.in_features))
    return found


def _load(adapter: LoraFolder, device: torch.device) -> dict[str, LowRank]:
    """Return an adapter's updates by layer, in fp32.

    Raises:
        BadLoraFolder: the file changed since its header was read.
    """
    found = {}
    try:
        with safe_open(adapter.path / "adapter_model.safetensors", framework="pt", device=str(device)) as file:
            for path, module in adapter.modules.items():
                down, up = (file.get_tensor(name).float() for name in adapter.tensor_names(path))
                found[path] = LowRank(down=down, up=module.scale * up)
    except (OSError, SafetensorError) as error:
        raise BadLoraFolder(f"cannot be read: {error}", "save the adapter again") from error
    return found
