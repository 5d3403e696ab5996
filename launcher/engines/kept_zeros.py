"""Zeros of linear layers that stay zero in training (``sparsity.keep=true``).

No mask is stored. Before an update, a weight of a linear layer that is zero gets a gradient of zero, wherever the
weight lies: in a replica, a slice, a shard or a stage. So the gradient's norm is that of the other weights, and
optimizers that treat each value by itself leave zeros as they are. A checkpoint needs nothing besides its weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from launcher.engines.model_state import local_shard
from launcher.models.layers import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linear_matrices(models: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """Return the matrices of linear layers in the blocks of models, by name."""
    from transformers.pytorch_utils import Conv1D

    found: dict[str, nn.Parameter] = {}
    for model in models:
        inside = {id(module) for block in blocks(cast("PreTrainedModel", model)) for module in block.modules()}
        for path, module in model.named_modules():
            if id(module) in inside and isinstance(module, nn.Linear | Conv1D):
                found[f"{path}.weight"] = module.weight
    return found


class KeptZeros:
    """Keeps zeros through updates, also of optimizers that mix values of a matrix (Muon).

    Args:
        matrices: of this rank: whole, or DTensors.
    """

    def __init__(self, matrices: Iterable[nn.Parameter]) -> None:
        self._matrices = [matrix for matrix in matrices if matrix.requires_grad]
        self._zeros: list[Tensor] = []

    def mask_gradients(self) -> None:
        """Set the gradients of zeros to zero; call it once they are reduced."""
        self._zeros = [local_shard(matrix.detach()) == 0 for matrix in self._matrices]
        for matrix, zeros in zip(self._matrices, self._zeros, strict=True):
            if matrix.grad is not None:
                local_shard(matrix.grad).masked_fill_(zeros, 0.0)

    def restore(self) -> None:
        """Set what was zero before the update to zero again, and forget where that was."""
        for matrix, zeros in zip(self._matrices, self._zeros, strict=True):
            local_shard(matrix.detach()).masked_fill_(zeros, 0.0)
        self._zeros = []


def mask_in_backward(matrices: Iterable[nn.Parameter]) -> None:
    """Have the backward pass set the gradients of zeros to zero, before anything adds them up.

    DeepSpeed reduces, clips and frees gradients within its own calls. A backward pass needs whole matrices, so they are
    there at this moment, under ZeRO-3 too.
    """
    for matrix in matrices:
        if matrix.requires_grad:
            matrix.register_hook(partial(_masked, matrix))


def _masked(matrix: nn.Parameter, gradient: Tensor) -> Tensor:
    assert matrix.shape == gradient.shape, "a backward pass needs the whole matrix"
    return gradient.masked_fill(matrix.detach() == 0, 0.0)
