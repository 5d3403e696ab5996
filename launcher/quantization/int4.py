"""4-bit weights in groups: a layer that computes with them, and how a layer gets them.

torchao has no stable format for them that a CPU computes with and that can be saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

LEVELS = 15
ZERO_STEPS = 16
"""Zero points are stored in sixteenths of a step, as finely as a byte allows.
That is twice as finely as errors show."""
_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a group's range that are tried.
Clipping the ends often loses less than coarser steps do."""


class Int4Linear(nn.Module):  # type: ignore[misc]
    """A linear layer with w = scale * (q - zero / 16), q in 0..15: 4.75 bits in groups of 32.

    Attributes:
        qdata: (out, in / 2) uint8; the even input of two is in the low half of a byte.
        scale: (out, groups) fp16.
        zero: (out, groups) uint8.
    """

    def __init__(self, qdata: Tensor, scale: Tensor, zero: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias = bias
        self.out_features: int = qdata.shape[0]
        self.in_features: int = 2 * qdata.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        groups: int = self.scale.shape[1]
        return self.in_features // groups

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix (out, in)."""
        grouped = levels(self.qdata).view(self.out_features, -1, self.group_size).float()
        weight = (grouped - self.zero.float()[..., None] / ZERO_STEPS) * self.scale.float()[..., None]
        return weight.view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) of (…, in), in the format of ``x``; the matrix is widened each time."""
        return linear(x, self.dequantized(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        """Return the layer's text in a print of the model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}"


def levels(qdata: Tensor) -> Tensor:
    """Return 4-bit values as uint8 (out, in), unpacked from two in a byte."""
    return torch.stack((qdata & 0xF, qdata >> 4), dim=-1).flatten(-2)


def quantize_int4(layer: nn.Linear, *, group_size: int) -> Int4Linear:
    """Return the layer with its weight in groups of ``group_size`` 4-bit values."""
    weight = layer.weight.detach().float().view(layer.out_features, -1, group_size)
    low, high = (edge(dim=-1, keepdim=True) for edge in (weight.amin, weight.amax))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    best, kept = torch.full_like(low, torch.inf), None
    for share in _SHRUNK:
        scale = ((high - low) * share / LEVELS).to(torch.float16)
        scale = scale.clamp(min=torch.finfo(torch.float16).smallest_normal)
        zero = (-low * share / scale.float() * ZERO_STEPS).round().clamp(0, LEVELS * ZERO_STEPS)
        q = (weight / scale.float() + zero / ZERO_STEPS).round().clamp(0, LEVELS)
        error = ((q - zero / ZERO_STEPS) * scale.float() - weight).square().sum(dim=-1, keepdim=True)
        if kept is None:
            kept, best = (q, scale, zero), error
            continue
        better = error < best
        best = torch.where(better, error, best)
        kept = tuple(torch.where(better, new, old) for new, old in zip((q, scale, zero), kept, strict=True))
    assert kept is not None, "there are shares to try"
    q, scale, zero = kept
    pairs = q.view(layer.out_features, -1, 2).to(torch.uint8)
    qdata = pairs[..., 0] | (pairs[..., 1] << 4)
    return Int4Linear(qdata, scale[..., 0].contiguous(), zero[..., 0].to(torch.uint8), layer.bias)
