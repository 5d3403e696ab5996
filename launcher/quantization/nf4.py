"""4-bit NormalFloat matrices, by bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_BLOCK = 64
_STATE = "weight.quant_state.bitsandbytes__nf4"
_STORED = ("weight", "weight.absmax", "weight.quant_map", _STATE)


class Nf4Codec:
    """How ``nf4`` makes, keeps and restores a layer, in the format that Transformers loads, too."""

    def check(self, name: str, in_features: int, *, option: str) -> None:
        """Refuse nothing: blocks run on from one output to the next."""

    def quantise(self, layer: nn.Linear) -> nn.Module:
        """Return the layer that takes the place of one in floats."""
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn import Params4bit

        packed, state = quantize_4bit(layer.weight.detach().contiguous(), blocksize=_BLOCK, quant_type="nf4")
        weight = Params4bit(packed, False, state, _BLOCK, False, "nf4", torch.uint8, None, True)
        return _layer(weight, layer.bias, (layer.out_features, layer.in_features))

    def tensors(self, name: str, layer: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return what files keep of a layer, its bias left out, and what their headers say."""
        state = layer.state_dict()  # bitsandbytes puts its tables, and the order of weights, back for it
        return {f"{name}.{key}": value for key, value in state.items() if key != "bias"}, {}

    def owns(self, name: str, stored: str) -> bool:
        """Return whether files keep a part of the layer ``name`` under ``stored``."""
        return stored in {f"{name}.{key}" for key in _STORED}

    def restore(
        self,
        name: str,
        size: tuple[int, int],
        bias: nn.Parameter | None,
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str],
    ) -> nn.Module:
        """Return the layer that files keep."""
        from bitsandbytes.nn import Params4bit

        tables = {key: read(f"{name}.{key}") for key in _STORED[1:]}
        weight = Params4bit.from_prequantized(read(f"{name}.weight"), tables, requires_grad=False, device="cpu")
        return _layer(weight, bias, size)


def _layer(weight: Tensor, bias: nn.Parameter | None, size: tuple[int, int]) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        size[1], size[0], bias=bias is not None, compress_statistics=False, quant_type="nf4", device="meta"
    )
    weight.module = layer
    layer.weight, layer.bias, layer.quant_state = weight, bias, weight.quant_state
    return layer
