"""FSDP2 beside a pipeline: each stretch is sharded over the pipelines side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from launcher.models.units import blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from launcher.engines.pipelining.stage import Stretch


def shard(stretch: Stretch, mesh: DeviceMesh) -> None:
    """Shard blocks one by one, and what is left together.

    What a step has gathered stays until its end: torch's pipeline reduces gradients once, after the last micro-batch,
    and gathering again for each would send everything as many times.
    """
    for block in blocks(stretch.model):
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(stretch, mesh=mesh, reshard_after_forward=False)


def free_gathered(stretches: Iterable[nn.Module]) -> None:
    """Keep only shards; after passes without a backward pass nothing else would."""
    for stretch in stretches:
        for module in stretch.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
