"""Reading what ``torch.save`` wrote without running any code that a file brings along.

``torch.save`` writes a pickle, and a pickle can call any function when it is loaded. A checkpoint may come from another
user, so every one is read with ``weights_only``: tensors, plain values, and the few classes named here.
"""

from __future__ import annotations

import enum
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from launcher.errors import EXIT_BAD_INPUT, JobError, LauncherError

_REFUSED = re.compile(r"GLOBAL ([\w.]+)|class (?:<class ')?([\w.]+)")


def load_file(path: Path, *, device: torch.device | str = "cpu") -> Any:
    """Return what a file of a checkpoint holds: tensors and plain values.

    Raises:
        JobError: it is missing, damaged, or holds anything else; exit code 65.
    """
    with named(path):
        return torch.load(path, weights_only=True, map_location=device)


@contextmanager
def named(place: Path) -> Iterator[None]:
    """Turn errors of reading ``place``, a file or folder of a checkpoint, into one that names it.

    Raises:
        JobError: it is missing, damaged, or holds something else than it should; exit code 65.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        what = f"an object of {found[1] or found[2]}, which could run code" if found else "something else than tensors"
        why = f"{place} holds {what}; it is not loaded. Resume from a checkpoint that this program wrote"
        raise JobError(why, exit_code=EXIT_BAD_INPUT) from error
    except (torch.OutOfMemoryError, LauncherError):
        raise
    except Exception as error:  # damaged bytes make the readers of pickles and archives fail in any way
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise JobError(f"{place} cannot be read: {first}", exit_code=EXIT_BAD_INPUT) from error


def _enum_member(kind: Any, name: Any) -> enum.Enum:
    """Return a member of an enumeration: stands for ``getattr``, by which Python 3.11.0 to 3.11.3 pickle members.

    Raises:
        pickle.UnpicklingError: an attribute of anything else is asked for.
    """
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise pickle.UnpicklingError("Unsupported GLOBAL getattr of what is no enumeration")
    return kind[name]


@contextmanager
def deepspeed_tensors_only() -> Iterator[None]:
    """Within this block DeepSpeed's own loader, which asks torch for full unpickling, gets ``weights_only`` loading."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    full = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        return full(*arguments, **{**options, "weights_only": True})

    allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, (_enum_member, "builtins.getattr")]
    with torch.serialization.safe_globals(allowed):
        torch.load = load
        try:
            yield
        finally:
            torch.load = full
