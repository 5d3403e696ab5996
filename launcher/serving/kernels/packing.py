"""Matrices as ``native.c`` wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
        panel = native().native_panel()
        weight = torch.cat([part.detach() for part in weights])
        self.columns, inner = weight.shape
        out = -(-self.columns // panel) * panel
        stacked = weight.new_zeros((out, inner))
        stacked[: self.columns] = weight
        panels = stacked.view(out // panel, panel, inner).transpose(1, 2)
        if weight.dtype == torch.bfloat16:  # lane j holds outputs j and j + half a panel
            panels = panels.reshape(out // panel, inner, 2, panel // 2).transpose(2, 3)
        self.weight = panels.contiguous()
        self.bias = None
        if any(bias is not None for bias in biases):
            self.bias = torch.zeros(out)
            start = 0
            for part, bias in zip(weights, biases, strict=True):
                if bias is not None:
                    self.bias[start : start + len(part)] = bias.detach().float()
                start += len(part)
        self.out, self.inner = out, inner
        self.struct = Linear(self.weight.data_ptr(), None if self.bias is None else self.bias.data_ptr(), out, inner)


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
