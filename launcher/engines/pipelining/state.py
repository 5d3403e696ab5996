"""A pipeline's checkpoint: each tensor under its name in the whole model, so any stages and shards can read it.

AdamW's numbers for a weight are under ``exp_avg.<name>``, ``exp_avg_sq.<name>`` and ``step.<name>``. A tied parameter
is there once, under its first name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from launcher.engines.sharded_state import optimiser_tensors

if TYPE_CHECKING:
    from launcher.engines.pipelining.stage import Stretch

_TWIN = " (twin)"
"""Ends the name of a copy whose first one is on the same rank."""


def named_state(
    own: Sequence[Stretch], optimizer: torch.optim.AdamW, tied: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return this rank's weights and moments by name, sharing storage, and the twins of some of them.

    Args:
        own: this rank's stretches.
        optimizer: of all their parameters.
        tied: further names of tied parameters, each with the first name.
    """
    names: dict[nn.Parameter, str] = {}
    for stretch in own:
        for name, parameter in stretch.model.named_parameters():
            if parameter in names:
                continue
            known = tied.get(name, name)
            names[parameter] = known + _TWIN if known in names.values() else known
    tensors = {name: parameter.detach() for parameter, name in names.items()} | optimiser_tensors(optimizer, names)
    twins = {name.removesuffix(_TWIN): tensor for name, tensor in tensors.items() if name.endswith(_TWIN)}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_TWIN)}, twins


def copy_to_twins(tensors: Mapping[str, Tensor], twins: Mapping[str, Tensor]) -> None:
    """Make each twin equal to the tensor of its name."""
    for name, twin in twins.items():
        twin.copy_(tensors[name])
