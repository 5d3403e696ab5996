"""Save and load an engine; unpickle safely what others wrote.

``torch.save`` writes a pickle, and a pickle can call any function when it is loaded. A checkpoint may come from another
user, so every one is read with ``weights_only``: tensors and plain values. Our own hold safetensors, which have no
pickle.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist

from launcher.checkpoint.tensors import StoredState, shard_file_name, write_shards
from launcher.engines.state import divide_copies
from launcher.errors import EXIT_BAD_INPUT, JobError
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


_REFUSED = re.compile(r"GLOBAL ([\w.]+)|class (?:<class ')?([\w.]+)")


def load_file(path: Path) -> Any:
    """Return the content of a file of ``torch.save`` on the CPU: tensors and plain values.

    Raises:
        JobError: it is missing, damaged, or holds anything else; exit code 65.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        what = f"an object of {found[1] or found[2]}, which could run code" if found else "something other than tensors"
        raise JobError(f"{path} holds {what}; it is not loaded", exit_code=EXIT_BAD_INPUT) from error
    except Exception as error:  # damaged bytes make the readers of pickles and archives fail in any way
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise JobError(f"{path} cannot be read: {first}", exit_code=EXIT_BAD_INPUT) from error
