"""Matrices that torchao keeps and multiplies: in the place of a layer's weight stands one of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from launcher.quantization.base import Quantization


class AoCodec:
    """How the methods of torchao make, keep and restore a layer, in the format that Transformers loads, too."""

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
        """Refuse nothing: a scale for each output fits any size."""

    def quantise(self, layer: nn.Linear) -> nn.Module:
        """Return the layer with its weight quantised."""
        from torchao.quantization import quantize_

        quantize_(layer, self.config())
        return layer

    def tensors(self, name: str, layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what files keep of a layer, its bias left out, and what their headers say."""
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        tensors, metadata = flatten_tensor_state_dict({f"{name}.weight": layer.weight.data})
        metadata.pop("tensor_names")
        return tensors, metadata

    def owns(self, name: str, stored: str) -> bool:
        """Return whether files keep a part of the layer ``name`` under ``stored``."""
        return stored.startswith(f"{name}._weight_")

    def restore(
        self,
        name: str,
        size: tuple[int, int],
        bias: nn.Parameter | None,
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str],
    ) -> nn.Module:
        """Return the layer that files keep."""
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
