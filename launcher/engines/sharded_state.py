"""Tensors of all ranks in one folder of safetensors, found again by any other number of ranks.

torch.distributed.checkpoint does it; its safetensors storage holds no pickle, so nothing in a checkpoint can run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from launcher.errors import EXIT_BAD_INPUT, JobError

if TYPE_CHECKING:
    from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what this rank holds: shards (DTensor) of tensors, and whole ones, which one rank of each name writes."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())


def load_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``tensors`` in place from what any number of ranks wrote.

    Raises:
        JobError: the folder does not hold tensors of these names and shapes.
    """
    try:
        reader = HuggingFaceStorageReader(str(folder))
        dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    except (OSError, ValueError, KeyError, RuntimeError, dcp.CheckpointException) as error:
        raise JobError(f"{folder} does not hold this model and optimiser: {error}", exit_code=EXIT_BAD_INPUT) from error


def optimiser_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """Return AdamW's state by name (``exp_avg.<parameter>``), made first where no step has been taken."""
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors |= {f"{moment}.{names[parameter]}": state[moment] for moment in _MOMENTS}
    return tensors
