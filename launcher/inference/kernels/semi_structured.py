"""2:4 matrices on NVIDIA GPUs, by torch's semi-structured tensors (cuSPARSELt, CUTLASS)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear

from launcher.inference.kernels.two_of_four import is_two_of_four
from launcher.quantization.codecs import is_quantized

if TYPE_CHECKING:
    from torch import Tensor

_CAPABILITY = (8, 0)
"""Tensor cores of Ampere are the first that multiply 2:4 matrices."""
_SMALLEST = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}
"""Outputs and inputs of the smallest matrix, by format; larger ones are multiples.
The sizes are those of torch's CUTLASS kernels, which take the fewest: cuSPARSELt's are half of them."""


class SemiStructuredLinear(nn.Module):  # type: ignore[misc]
    """A linear layer whose matrix is a semi-structured sparse tensor of torch.

    Args:
        layer: with a 2:4 matrix on a GPU.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        self._bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) of (…, in)."""
        y: Tensor = linear(x.flatten(0, -2), self._weight, self._bias)
        return y.unflatten(0, x.shape[:-1])


def replace_by_semi_structured(model: nn.Module, put: Callable[[nn.Module, str, nn.Module], None]) -> int:
    """Replace the linear layers of a model on a GPU whose matrices are 2:4.

    Args:
        model: in inference mode.
        put: replaces a child of a module, by its name.

    Returns:
        How many are replaced; 0 where the GPU, the format or the sizes of matrices do not allow it.
    """
    if torch.version.cuda is None or not torch.cuda.is_available():
        return 0
    if torch.cuda.get_device_capability() < _CAPABILITY:
        return 0
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and is_supported(child)
    ]
    for parent, name, layer in found:
        put(parent, name, SemiStructuredLinear(layer))
    return len(found)


def is_supported(layer: nn.Linear) -> bool:
    """Return whether a layer's matrix is 2:4, in a format and size that torch's kernels take."""
    smallest = _SMALLEST.get(layer.weight.dtype)
    if smallest is None or is_quantized(layer):
        return False
    return not any(size % least for size, least in zip(layer.weight.shape, smallest, strict=True)) and is_two_of_four(
        layer.weight.detach()
    )
