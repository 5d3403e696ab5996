"""Codecs of quantized layers: int8 and fp8 by torchao, NF4 by bitsandbytes, and int4."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launcher.config.quantization import Int4Weight, Nf4, Quantization
from launcher.errors import ConfigError
from launcher.quantization.int4 import Int4Linear, quantize_int4


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """A quantized layer in a file."""

    name: str
    size: tuple[int, int]
    """Outputs and inputs."""
    bias: nn.Parameter | None
    read: Callable[[str], Tensor]
    """Return a tensor of the file by its name; a KeyError names a missing one."""
    metadata: Mapping[str, str]


class LayerCodec(ABC):
    """Quantize layers, split them into tensors for files, and restore them."""

    def check(self, name: str, in_features: int, *, option: str) -> None:  # noqa: B027  (most methods take any size)
        """Raise a ConfigError for a layer whose size does not fit; ``option`` chose the method."""

    @abstractmethod
    def quantize(self, layer: nn.Linear) -> nn.Module:
        """Return the quantized layer that replaces one in floats."""

    @abstractmethod
    def tensors(self, name: str, layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors that files hold of a layer without its bias, and their metadata."""

    @abstractmethod
    def owns(self, name: str, stored: str) -> bool:
        """Return whether the stored tensor ``stored`` is part of the layer ``name``."""

    @abstractmethod
    def restore(self, stored: StoredLayer) -> nn.Module:
        """Return the layer of a file."""


class AoCodec(LayerCodec):
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

    def restore(self, stored: StoredLayer) -> nn.Module:
        """Return the layer of a file."""
        import json

        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        weight = f"{stored.name}.weight"
        about = stored.metadata[weight]
        names = [f"{stored.name}._weight_{part}" for part in json.loads(about)["_tensor_data_names"]]
        tensors = {name: stored.read(name) for name in names}
        whole, left = unflatten_tensor_state_dict(tensors, {weight: about, "tensor_names": json.dumps([weight])})
        assert not left, f"torchao made nothing of {list(left)}"
        outputs, inputs = stored.size
        layer = nn.Linear(inputs, outputs, bias=stored.bias is not None, device="meta")
        layer.weight = nn.Parameter(whole[weight], requires_grad=False)
        layer.bias = stored.bias
        return layer


_NF4_BLOCK = 64
_NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
_NF4_TENSORS = ("weight", "weight.absmax", "weight.quant_map", _NF4_STATE)


class Nf4Codec(LayerCodec):
    """Codec of ``nf4`` in Transformers' format; blocks continue from one output to the next."""

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

    def restore(self, stored: StoredLayer) -> nn.Module:
        """Return the layer of a file."""
        from bitsandbytes.nn import Params4bit

        packed, *tables = (stored.read(f"{stored.name}.{key}") for key in _NF4_TENSORS)
        state = dict(zip(_NF4_TENSORS[1:], tables, strict=True))
        weight = Params4bit.from_prequantized(packed, state, requires_grad=False, device="cpu")
        return _nf4_layer(weight, stored.bias, stored.size)


def _nf4_layer(weight: Tensor, bias: nn.Parameter | None, size: tuple[int, int]) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        size[1], size[0], bias=bias is not None, compress_statistics=False, quant_type="nf4", device="meta"
    )
    if size[1] % _NF4_BLOCK:
        keep_differentiable(layer)  # its kernel for CPUs takes whole blocks of inputs
    weight.module = layer
    layer.weight, layer.bias, layer.quant_state = weight, bias, weight.quant_state
    return layer


_INT4_TENSORS = ("qdata", "scale", "zero")


class Int4Codec(LayerCodec):
    """Codec of ``int4_weight``."""

    def __init__(self, method: Int4Weight) -> None:
        self._group = method.group_size

    def check(self, name: str, in_features: int, *, option: str) -> None:
        """Raise for a layer whose inputs do not fill groups.

        Raises:
            ConfigError: naming the layer and a size that fits it.
        """
        if in_features % self._group:
            fitting = [size for size in (128, 64, 32, 16, 8, 4, 2) if in_features % size == 0]
            why = f"{name} has {in_features} inputs, which groups of {self._group} do not divide"
            fix = f"set quantization.group_size={fitting[0]}, or " if fitting else ""
            fix += f"leave it as it is with 'quantization.skip=[\"{name}\"]'"
            if option == "quantization":
                raise ConfigError("quantization.group_size", self._group, why=why, fix=fix)
            raise ConfigError(option, Int4Weight.kind, why=why, fix=f"keep weights by job=quantize first: {fix}")

    def quantize(self, layer: nn.Linear) -> nn.Module:
        """Return the quantized layer that replaces one in floats."""
        return quantize_int4(layer, group_size=self._group)

    def tensors(self, name: str, layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors that files hold of a layer without its bias, and their metadata."""
        return {f"{name}.{key}": getattr(layer, key) for key in _INT4_TENSORS}, {}

    def owns(self, name: str, stored: str) -> bool:
        """Return whether the stored tensor ``stored`` is part of the layer ``name``."""
        return stored in {f"{name}.{key}" for key in _INT4_TENSORS}

    def restore(self, stored: StoredLayer) -> nn.Module:
        """Return the layer of a file."""
        qdata, scale, zero = (stored.read(f"{stored.name}.{key}") for key in _INT4_TENSORS)
        return Int4Linear(qdata, scale, zero, stored.bias)


def keep_differentiable(layer: nn.Module) -> None:
    """Let a quantized layer keep its weights as they are in evaluations.

    bitsandbytes repacks NF4 weights at the first evaluation on a CPU, for a kernel without a backward pass.
    """
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False


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
