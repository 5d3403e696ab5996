"""Checkpoints by the name of each parameter, in safetensors: any number of stages and shards reads them.

A weight is under its name in the whole model; AdamW's numbers for it are under ``exp_avg.<name>``,
``exp_avg_sq.<name>`` and ``step.<name>``. A tied parameter is there once, under its first name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from launcher.errors import JobError

if TYPE_CHECKING:
    from launcher.engines.pipelining.stage import Stretch


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's tensors, whole or sharded, beside those of other ranks; every rank calls it.

    A tensor that several ranks hold is written by one of them.
    """
    folder.mkdir(exist_ok=True)
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
        dcp.save(dict(tensors), storage_writer=writer)


def load_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's tensors with what ``save_tensors`` wrote, however it was spread; every rank calls it.

    Raises:
        JobError: something is missing, or of another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
            dcp.load(dict(tensors), storage_reader=reader)
    except (CheckpointException, OSError) as error:
        raise JobError(f"{folder} does not hold this model: {error}") from error


def named_state(
    own: Sequence[Stretch], optimizer: torch.optim.AdamW, names: Mapping[str, str], *, load: bool
) -> dict[str, Tensor]:
    """Return this rank's weights and moments by name, sharing storage; moments that are not there yet are made.

    Args:
        own: this rank's stretches.
        optimizer: of all their parameters.
        names: of tied parameters: further name to first name.
        load: with tied parameters of the last stretch too, which are saved by the first.
    """
    found: dict[str, Tensor] = {}
    for stretch in own:
        for name, parameter in stretch.model.named_parameters():
            if name in names and not load:
                continue
            known = names.get(name, name)
            if known in found:  # the first stretch is on this rank too
                continue
            found[known] = parameter
            for key, value in _moments(optimizer, parameter).items():
                found[f"{key}.{known}"] = value
    return found


def copy_state(optimizer: torch.optim.AdamW, pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Make the second parameter of each pair, and its moments, equal to the first."""
    with torch.no_grad():
        for one, other in pairs:
            other.copy_(one)
            for key, value in _moments(optimizer, one).items():
                _moments(optimizer, other)[key].copy_(value)


def _moments(optimizer: torch.optim.AdamW, parameter: nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)  # where a fused AdamW has it
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return {"step": state["step"].view(1), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
