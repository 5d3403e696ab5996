"""Which parameters decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def decay_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimiser groups: matrices decay, biases and norms do not.

    Under ZeRO-3 a parameter is empty and its true shape is in ``ds_shape``.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
