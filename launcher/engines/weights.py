"""Whole weights of a model, however its parameters are laid out over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch import Tensor, nn


def whole_parameters(module: nn.Module, *, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield name and whole value of each parameter, in fp32 on the CPU; tied ones come once.

    Every rank that holds a share must go through all of them: each is gathered when its turn comes.

    Args:
        module: with parameters that are whole or DTensors.
        device: where the ranks talk to each other; offloaded shards are moved there first.
    """
    for name, parameter in module.named_parameters():
        value = parameter.detach()
        if isinstance(value, DTensor):
            value = value.to(device).full_tensor()
        yield name, value.to("cpu", torch.float32)
