"""Process groups of a run, one for each degree of parallelism."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.distributed.device_mesh import init_device_mesh

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from launcher.degrees import Degrees


def mesh_of(degrees: Degrees, *, device: torch.device) -> DeviceMesh:
    """Return the mesh of all ranks whose dimensions are the degrees that divide something, named as they are.

    Every rank of the run calls it, once, after it has joined the process group.
    """
    named = degrees.named()
    return init_device_mesh(device.type, tuple(named.values()), mesh_dim_names=tuple(named))


def dimensions(mesh: DeviceMesh, *names: str) -> DeviceMesh | None:
    """Return the part of ``mesh`` along ``names``, several flattened into one; ``None`` where none divides anything."""
    there = tuple(name for name in names if name in (mesh.mesh_dim_names or ()))
    if not there or math.prod(mesh[name].size() for name in there) == 1:
        return None
    return mesh[there[0]] if len(there) == 1 else mesh[there]._flatten("_".join(there))  # noqa: SLF001
