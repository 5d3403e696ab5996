"""Matrices as ``native.c`` wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from launcher.quantization.int4 import Int4Linear, levels
from launcher.serving.kernels.library import Linear, native

if TYPE_CHECKING:
    from torch import Tensor


class Packed:
    """A matrix in panels, with its bias.

    Args:
        weights: (out, in) each, of one format; they are stacked.
        biases: (out) each, ``None`` where there is none.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None]) -> None:
        weight = torch.cat([part.detach() for part in weights])
        self.columns, inner = weight.shape
        panels = _panels(weight)
        if weight.dtype == torch.bfloat16:  # lane j holds outputs j and j + half a panel
            panels = panels.unflatten(-1, (2, -1)).transpose(2, 3)
        self.weight = panels.contiguous()
        self.bias = _stacked_bias(weights, biases, _whole(self.columns))
        self.out, self.inner = _whole(self.columns), inner
        self.struct = Linear(self.weight.data_ptr(), _address(self.bias), self.out, inner, 0, inner, None, None, 0)


class PackedFew:
    """A matrix of whole numbers in panels, with its scales and its bias.

    Args:
        layers: of one kind, each one for which :func:`is_packable` holds; they are stacked.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        biases = [layer.bias for layer in layers]
        if isinstance(layers[0], Int4Linear):
            numbers = torch.cat([levels(layer.qdata) for layer in layers])
            group = layers[0].group_size
            scale, zero = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("scale", "zero"))
            self._scale, self._zero = (_panels(part).contiguous() for part in (scale, zero))
            bits, zeros, dynamic = 4, self._zero.data_ptr(), 0
        else:
            numbers = torch.cat([layer.weight.data.qdata for layer in layers]).view(torch.uint8)
            group = numbers.shape[1]
            self._scale = torch.zeros(_whole(len(numbers)))
            self._scale[: len(numbers)] = torch.cat([layer.weight.data.scale.flatten() for layer in layers])
            bits, zeros, dynamic = 8, None, int(layers[0].weight.data.act_quant_kwargs is not None)
        self.columns, self.inner = numbers.shape
        self.out = _whole(self.columns)
        self.bias = _stacked_bias([part.qdata if bits == 4 else part.weight for part in layers], biases, self.out)
        self.weight = _lanes(_panels(numbers), bits)
        self.struct = Linear(
            self.weight.data_ptr(),
            _address(self.bias),
            self.out,
            self.inner,
            bits,
            group,
            self._scale.data_ptr(),
            zeros,
            dynamic,
        )


def pack(layers: Sequence[nn.Module]) -> Packed | PackedFew:
    """Return the matrices of linear layers as one, stacked."""
    if any(is_few(layer) for layer in layers):
        return PackedFew(layers)
    return Packed([layer.weight for layer in layers], [layer.bias for layer in layers])


def is_few(layer: nn.Module) -> bool:
    """Return whether a layer's matrix is of whole numbers that ``native.c`` multiplies."""
    if isinstance(layer, Int4Linear):
        return layer.group_size % 4 == 0
    weight: Any = getattr(layer, "weight", None)
    return (
        type(weight).__name__ == "Int8Tensor"
        and _is_by_row(weight.act_quant_kwargs)
        and weight.act_pre_scale is None
        and weight.act_quant_scale is None
        and tuple(weight.block_size) == (1, weight.shape[1])
        and weight.shape[1] % 2 == 0
    )


def _is_by_row(activations: Any) -> bool:
    """Return whether activations stay as they are, or are rounded row by row around 0 to all of 8 bits."""
    return activations is None or (
        type(activations.granularity).__name__ == "PerRow"
        and activations.mapping_type.name == "SYMMETRIC"
        and not activations.reduce_range
    )


def _panels(weight: Tensor) -> Tensor:
    """Return (panels, in, outputs of one) of (out, in), filled up with zeros."""
    panel = native().native_panel()
    out, inner = _whole(len(weight)), weight.shape[1]
    stacked = weight.new_zeros((out, inner))
    stacked[: len(weight)] = weight
    return stacked.view(out // panel, panel, inner).transpose(1, 2)


def _lanes(panels: Tensor, bits: int) -> Tensor:
    """Put as many inputs of outputs j and j + half a panel as fit into the lanes of 32 bits, least first.

    Args:
        panels: (panels, in, outputs of one) uint8.
        bits: of a number.
    """
    inputs = 16 // bits
    apart = panels.unflatten(2, (2, -1)).unflatten(1, (-1, inputs))  # panels, lanes, inputs, halves, half a panel
    apart = apart.permute(0, 1, 4, 2, 3).flatten(-2)  # panels, lanes, half a panel, numbers of a lane
    if bits == 4:
        apart = apart[..., 0::2] | (apart[..., 1::2] << 4)
    return apart.contiguous().view(torch.int32)[..., 0].contiguous()


def _whole(columns: int) -> int:
    panel: int = native().native_panel()
    return -(-columns // panel) * panel


def _stacked_bias(parts: Sequence[Tensor], biases: Sequence[Tensor | None], out: int) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    stacked, start = torch.zeros(out), 0
    for part, bias in zip(parts, biases, strict=True):
        if bias is not None:
            stacked[start : start + len(part)] = bias.detach().float()
        start += len(part)
    return stacked


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Scratch:
    """Room for what one call needs between its parts, shared by all layers: they are called one after the other."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def of(self, size: int) -> int:
        """Return the address of room for ``size`` floats."""
        if self._room.numel() < size:
            self._room = torch.empty(size)
        address: int = self._room.data_ptr()
        return address
