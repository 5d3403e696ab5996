"""Load LoRA adapters from PEFT folders for a model's linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from launcher.config.adapter_folder import (
    ADAPTER_NAME,
    AdapterFolder,
    AdapterUse,
    read_adapter_folder,
    validate_adapter_fits,
)
from launcher.config.model.linear_layers import LinearSize
from launcher.errors import EXIT_BAD_INPUT, ConfigError, JobError
from launcher.inference.kernels.low_rank import NO_ADAPTERS, AdapterSet, LowRank
from launcher.models.adapters import AdapterTensors
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
    sizes = {path: size for path, (_, size) in linear.items()}
    updates: dict[nn.Module, dict[int, LowRank]] = {}
    for number, (adapter_name, value) in enumerate(folders.items()):
        option = f"job.adapters.{adapter_name}"
        found = read_adapter_folder(option, value, use=AdapterUse.ENGINE)
        for error in validate_adapter_fits(option, found, sizes, model=name):
            raise error
        loaded = _load(option, found, model.device)
        for path, update in loaded.items():
            if not (update.down.isfinite().all() and update.up.isfinite().all()):
                why = f"{option}={value}: its update of {path} has values that are not finite"
                raise JobError(f"{why}. Leave the adapter out, or export it again.", exit_code=EXIT_BAD_INPUT)
            updates.setdefault(linear[path][0], {})[number] = update
        heartbeat()
    return AdapterSet(tuple(folders), updates)


def _linear_layers(model: PreTrainedModel) -> dict[str, tuple[nn.Module, LinearSize]]:
    """Return the linear layers before the output layer, by name, with the size of each."""
    found: dict[str, tuple[nn.Module, LinearSize]] = {}
    for path, layer in model.named_modules():
        if layer is model.get_output_embeddings():
            continue
        if isinstance(layer, Conv1D):
            found[path] = (layer, LinearSize(inputs=layer.nx, outputs=layer.nf))
        elif isinstance(layer, nn.Linear | Int4Linear):
            found[path] = (layer, LinearSize(inputs=layer.in_features, outputs=layer.out_features))
    return found


def _load(option: str, adapter: AdapterFolder, device: torch.device) -> dict[str, LowRank]:
    """Return an adapter's updates by layer, in fp32.

    Raises:
        ConfigError: the files changed since their headers were read.
    """
    found = {}
    try:
        tensors = AdapterTensors(adapter)
        for path, update in adapter.layers.items():
            down, up = (tensors.read(f"{path}.{side}.{ADAPTER_NAME}.weight") for side in ("lora_A", "lora_B"))
            assert down is not None, "a layer with matrices"
            assert up is not None, "a layer with matrices"
            down, up = (matrix.to(device, torch.float32) for matrix in (down, up))
            found[path] = LowRank(down=down, up=update.scale * up)
    except (OSError, ValueError, SafetensorError) as error:
        why = f"cannot be read: {error}"
        raise ConfigError(option, adapter.folder, why=why, fix="save the adapter again") from error
    return found
