"""Codecs of quantized layers: int8 and fp8 by torchao, NF4 by bitsandbytes, and int4."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from launcher.config.quantization import Int4Weight, Nf4, Quantization
from launcher.quantization.int4 import Int4Codec, Int4Linear


class LayerCodec(Protocol):
    """Quantize layers, split them into tensors for files, and restore them."""

    def check(self, name: str, in_features: int, *, option: str) -> None:
        """Raise a ConfigError for a layer whose size does not fit; ``option`` chose the method."""

    def quantize(self, layer: nn.Linear) -> nn.Module:
        """Return the quantized layer that replaces one in floats."""

    def tensors(self, name: str, layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors that files hold of a layer without its bias, and their metadata."""

    def owns(self, name: str, stored: str) -> bool:
        """Return whether the stored tensor ``stored`` is part of the layer ``name``."""

    def restore(
        self,
        name: str,
        size: tuple[int, int],
        bias: nn.Parameter | None,
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str],
    ) -> nn.Module:
        """Return the stored layer of ``size`` (outputs, inputs); a KeyError names a missing tensor."""


class AoCodec:
    """Codec of torchao's methods, in the format that Transformers loads too."""

    def __init__(self, method: Quantization) -> None:
        self._kind = method.kind

    def config(self) -> Any:
        """Return torchao's own configuration of the method."""
        from torchao.quantization import (
            Float8WeightOnlyConfig,
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
        )

        made = {
            "int8_dynamic": Int8DynamicActivationInt8WeightConfig,
            "int8_weight": Int8WeightOnlyConfig,
            "fp8": Float8WeightOnlyConfig,
        }[self._kind]
        return made(set_inductor_config=False)  # which would change the compiler for everything else

    def check(self, name: str, in_features: int, *, option: str) -> None:
        """Accept any size: there is a scale for each output."""

    def quantize(self, layer: nn.Linear) -> nn.Module:
        """Return the layer with its weight quantized."""
        from torchao.quantization import quantize_

        quantize_(layer, self.config())
        return layer

    def tensors(self, name: str, layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors that files hold of a layer without its bias, and their metadata."""
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        tensors, metadata = flatten_tensor_state_dict({f"{name}.weight": layer.weight.data})
        metadata.pop("tensor_names")
        return tensors, metadata

    def owns(self, name: str, stored: str) -> bool:
        """Return whether the stored tensor ``stored`` is part of the layer ``name``."""
        return stored.startswith(f"{name}._weight_")

    def restore(
        self,
        name: str,
        size: tuple[int, int],
        bias: nn.Parameter | None,
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str],
    ) -> nn.Module:
        """Return the stored layer."""
        import json

        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        weight = f"{name}.weight"
        about = metadata[weight]
        parts = json.loads(about)["_tensor_data_names"]
        tensors = {f"{name}._weight_{part}": read(f"{name}._weight_{part}") for part in parts}
        whole, left = unflatten_tensor_state_dict(tensors, {weight: about, "tensor_names": json.dumps([weight])})
        assert not left, f"torchao made nothing of {list(left)}"
        layer = nn.Linear(size[1], size[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(whole[weight], requires_grad=False)
        layer.bias = bias
        return layer


_NF4_BLOCK = 64
_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
_NF4_TENSORS = ("weight", "weight.absmax", "weight.quant_map", _NF4_STATE)


class Nf4Codec:
    """Codec of ``nf4``, in the format that Transformers loads too."""

    def check(self, name: str, in_features: int, *, option: str) -> None:
        """Accept any size: blocks continue from one output to the next."""

    def quantize(self, layer: nn.Linear) -> nn.Module:
        """Return the quantized layer that replaces one in floats."""
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn import Params4bit

        packed, state = quantize_4bit(layer.weight.detach().contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4")
        weight = Params4bit(packed, False, state, _NF4_BLOCK, False, "nf4", torch.uint8, None, True)
        return _nf4_layer(weight, layer.bias, (layer.out_features, layer.in_features))

    def tensors(self, name: str, layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors that files hold of a layer without its bias, and their metadata."""
        state = layer.state_dict()  # bitsandbytes puts its tables, and the order of weights, back for it
        return {f"{name}.{key}": value for key, value in state.items() if key != "bias"}, {}

    def owns(self, name: str, stored: str) -> bool:
        """Return whether the stored tensor ``stored`` is part of the layer ``name``."""
        return stored in {f"{name}.{key}" for key in _NF4_TENSORS}

    def restore(
        self,
        name: str,
        size: tuple[int, int],
        bias: nn.Parameter | None,
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str],
    ) -> nn.Module:
        """Return the stored layer."""
        from bitsandbytes.nn import Params4bit

        tables = {key: read(f"{name}.{key}") for key in _NF4_TENSORS[1:]}
        weight = Params4bit.from_prequantized(read(f"{name}.weight"), tables, requires_grad=False, device="cpu")
        return _nf4_layer(weight, bias, size)


def _nf4_layer(weight: Tensor, bias: nn.Parameter | None, size: tuple[int, int]) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        size[1], size[0], bias=bias is not None, compress_statistics=False, quant_type="nf4", device="meta"
    )
    weight.module = layer
    layer.weight, layer.bias, layer.quant_state = weight, bias, weight.quant_state
    return layer


def codec_of(method: Quantization) -> LayerCodec:
    """Return the codec of a method."""
    if isinstance(method, Int4Weight):
        return Int4Codec(method)
    return Nf4Codec() if isinstance(method, Nf4) else AoCodec(method)


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a codec made this layer."""
    origin = type(getattr(layer, "weight", None)).__module__.partition(".")[0]
    return isinstance(layer, Int4Linear) or origin in ("torchao", "bitsandbytes")


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that are quantized, by name."""
    for name, layer in model.named_modules():
        if is_quantized(layer):
            yield name, layer


def rounds_activations(layer: nn.Module) -> bool:
    """Return whether a layer also quantizes its inputs."""
    return getattr(getattr(layer, "weight", None), "act_quant_kwargs", None) is not None
