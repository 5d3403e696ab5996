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
    groups = [
        {"params": alike, "weight_decay": decay}
        for parameters, decay in ((matrices, weight_decay), (vectors, 0.0))
        for alike in _by_mesh(parameters)
    ]
    return [group for group in groups if group["params"]]


def _by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return parameters that are sharded alike together: one call of the optimiser takes no others."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(found.values())
