"""Save and load an engine as safetensors, which run no code when they are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import distributed as dist

from launcher.checkpoint.tensors import StoredState, shard_file_name, write_shards
from launcher.engines.state import divide_copies
from launcher.protocol.state_files import TENSOR_FOLDER, state_files
from launcher.utils.files import read_json, write_json

if TYPE_CHECKING:
    from launcher.checkpoint.tensors import Shard


SCALARS = f"{TENSOR_FOLDER}/scalars.json"


def write_state(folder: Path, shards: Sequence[Shard], scalars: Mapping[str, float]) -> None:
    """Write this rank's share of an engine's state; all ranks call it together.

    Raises:
        OSError: the disk is full or gone.
    """
    (folder / TENSOR_FOLDER).mkdir(exist_ok=True)
    rank = dist.get_rank() if dist.is_initialized() else 0
    group = dist.group.WORLD if dist.is_initialized() else None
    write_shards(folder / shard_file_name(rank), divide_copies(shards, group))
    if rank == 0:
        write_json(folder / SCALARS, dict(scalars))


def read_state(folder: Path) -> tuple[StoredState, dict[str, float]]:
    """Return the tensors and scalars that ranks of any strategy wrote.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged.
    """
    return StoredState(state_files(folder)), read_json(folder / SCALARS)
