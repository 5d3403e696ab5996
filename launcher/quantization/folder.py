"""Save quantized weights as a folder that this program, or Transformers, can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.config.quantization import QuantizationManifest
from launcher.quantization.codecs import AoCodec, Nf4Codec, codec_of, quantized_layers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from launcher.config.quantization import Quantization

_SINGLE = "model.safetensors"


def save_quantized(model: PreTrainedModel, method: Quantization, folder: Path) -> None:
    """Write weights, configuration and layer formats, before the first forward pass.

    That pass may reorder weights.

    Args:
        model: quantized by ``method``.
        method: how.
        folder: does not exist, or is empty.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors, header = stored_tensors(model, method)
    save_file(tensors, folder / _SINGLE, metadata={"format": "pt", **header})
    QuantizationManifest(method=method, layers=tuple(name for name, _ in quantized_layers(model))).write(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if (found := transformers_quantization_config(model, method)) is not None:
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, "quantization_config": found}, indent=2) + "\n", encoding="utf-8")


def stored_tensors(model: PreTrainedModel, method: Quantization) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all that files keep of a model, tied weights once, and what their header says."""
    codec, layers = codec_of(method), dict(quantized_layers(model))
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for name, layer in layers.items():
        found, about = codec.tensors(name, layer)
        tensors |= {key: value.detach().contiguous() for key, value in found.items()}
        header |= about
    inside = tuple(f"{name}." for name in layers)
    kept = set(model.state_dict())
    plain = {
        name: tensor.detach().contiguous()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name in kept and (not name.startswith(inside) or name.endswith(".bias"))
    }
    if isinstance(codec, AoCodec):  # whose reader wants to know of every tensor
        header |= {name: json.dumps({"_type": "Tensor"}) for name in plain}
        header["tensor_names"] = json.dumps([*(f"{name}.weight" for name in layers), *plain])
    return {**tensors, **plain}, header


def transformers_quantization_config(model: PreTrainedModel, method: Quantization) -> dict[str, Any] | None:
    """Return the configuration by which Transformers loads the folder, ``None`` if it cannot.

    It knows the formats of torchao and bitsandbytes, in models whose own layers are ``nn.Linear``: where ``Conv1D`` was
    turned round, it would look for a matrix that is not there.
    """
    codec = codec_of(method)
    layers = {name for name, _ in quantized_layers(model)}
    with torch.device("meta"):
        stock = type(model)(model.config)
    if not all(isinstance(stock.get_submodule(name), nn.Linear) for name in layers):
        return None
    spared = [name for name, layer in stock.named_modules() if isinstance(layer, nn.Linear) and name not in layers]
    if isinstance(codec, AoCodec):
        from transformers import TorchAoConfig

        return dict(TorchAoConfig(codec.config(), modules_to_not_convert=spared).to_dict())
    if isinstance(codec, Nf4Codec):
        from transformers import BitsAndBytesConfig

        bnb = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=model.dtype,
            llm_int8_skip_modules=spared,
        )
        return dict(bnb.to_dict())
    return None
