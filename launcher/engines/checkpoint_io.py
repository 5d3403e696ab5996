"""Files of a checkpoint on ranks: safe unpickling, sharded safetensors, generator states.

``torch.save`` writes a pickle, and a pickle can call any function when it is loaded. A checkpoint may come from another
user, so every one is read with ``weights_only``: tensors, plain values, and the few classes named here. Sharded tensors
are written by torch.distributed.checkpoint as safetensors, which hold no pickle.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from launcher.errors import EXIT_BAD_INPUT, JobError, LauncherError

if TYPE_CHECKING:
    from torch import Tensor, nn


ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
"""Names of AdamW's state of each parameter."""


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's shards (DTensor), and whole tensors by one rank of each name."""
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
        raise JobError(f"{folder} does not hold this model and optimizer: {error}", exit_code=EXIT_BAD_INPUT) from error


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], *, state_names: Sequence[str] = ADAMW_STATE
) -> dict[str, Tensor]:
    """Return an optimizer's state by name (``exp_avg.<parameter>``), created if missing.

    Args:
        optimizer: whose state it is.
        names: of its parameters.
        state_names: of its state of each parameter; ``step`` is a scalar, the others have the parameter's shape.
    """
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                for name in state_names:
                    step = torch.zeros((), dtype=torch.float32, device=parameter.device) if name == "step" else None
                    state[name] = torch.zeros_like(parameter) if step is None else step
            tensors |= {f"{name}.{names[parameter]}": state[name] for name in state_names}
    return tensors


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rng_{rank:05d}.pt"


def save_rng(folder: Path, *, rank: int, device: torch.device) -> None:
    """Write the state of this rank's generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    torch.save(state, _file(folder, rank))


def load_rng(folder: Path, *, rank: int, device: torch.device) -> None:
    """Restore them; a rank that did not exist when the checkpoint was written keeps its own."""
    path = _file(folder, rank)
    if not path.exists():
        return
    state = load_file(path)
    with explain_read_errors(path):
        torch.set_rng_state(state["cpu"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)


_REFUSED = re.compile(r"GLOBAL ([\w.]+)|class (?:<class ')?([\w.]+)")


def load_file(path: Path, *, device: torch.device | str = "cpu") -> Any:
    """Return the content of a checkpoint file: tensors and plain values.

    Raises:
        JobError: it is missing, damaged, or holds anything else; exit code 65.
    """
    with explain_read_errors(path):
        return torch.load(path, weights_only=True, map_location=device)


@contextmanager
def explain_read_errors(place: Path) -> Iterator[None]:
    """Turn errors of reading ``place``, a file or folder of a checkpoint, into one naming it.

    Raises:
        JobError: it is missing, damaged, or holds something else than it should; exit code 65.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        what = f"an object of {found[1] or found[2]}, which could run code" if found else "something other than tensors"
        why = f"{place} holds {what}; it is not loaded. Resume from a checkpoint that this program wrote"
        raise JobError(why, exit_code=EXIT_BAD_INPUT) from error
    except (torch.OutOfMemoryError, LauncherError):
        raise
    except Exception as error:  # damaged bytes make the readers of pickles and archives fail in any way
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise JobError(f"{place} cannot be read: {first}", exit_code=EXIT_BAD_INPUT) from error
