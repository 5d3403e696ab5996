"""Read files of ``torch.save`` without running what they hold.

``torch.save`` writes a pickle, and a pickle can call any function when it is loaded. So only tensors, plain values and
the few classes named here are read, the latter as stand-ins: no other package is imported. An archive whose entries
are compressed is refused, because ``torch.save`` never compresses and a small file could fill the memory.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from launcher.errors import EXIT_BAD_INPUT, JobError

_REFUSED = re.compile(r"GLOBAL ([\w.]+)|class (?:<class ')?([\w.]+)")


class BadCheckpoint(JobError):
    """A checkpoint of another program that cannot be read; exit code 65."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, why: str) -> None:
        super().__init__(why, exit_code=EXIT_BAD_INPUT)


class _Opaque:
    """Stands for an object of another program whose content is of no use here."""

    def __init__(self, *arguments: Any) -> None:
        del arguments

    def __new__(cls, *arguments: Any) -> _Opaque:
        """Take any arguments."""
        del arguments
        return super().__new__(cls)


class _LossScaler(_Opaque):
    pass


class _DynamicLossScaler(_Opaque):
    pass


class _ZeroStage(_Opaque):
    pass


class _FragmentAddress(_Opaque):
    pass


def _enum_member(kind: Any, name: Any) -> _ZeroStage:
    """Return a member of DeepSpeed's enumeration, in place of ``getattr`` in a pickle.

    Python 3.11.0 to 3.11.3 pickle members by ``getattr``.

    Raises:
        pickle.UnpicklingError: an attribute of anything else is asked for.
    """
    if kind is not _ZeroStage or not isinstance(name, str):
        raise pickle.UnpicklingError("Unsupported GLOBAL getattr of what is no enumeration")
    return _ZeroStage()


_STAND_INS: list[Any] = [
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_enum_member, "builtins.getattr"),
]


def load_torch_file(file: Path) -> Any:
    """Return the content of a file of ``torch.save``; tensors stay on disk until they are used.

    Raises:
        BadCheckpoint: it is missing, damaged, or holds anything else.
    """
    with explain_damage(file):
        is_archive = _check_archive(file)
        return _load(file, mmap=is_archive)


def load_torch_bytes(data: bytes, *, file: Path, what: str) -> Any:
    """Return what ``torch.save`` wrote into a part of a file.

    Raises:
        BadCheckpoint: it is damaged, or holds anything else than tensors and plain values.
    """
    with explain_damage(file, what):
        _check_archive(io.BytesIO(data))
        return _load(io.BytesIO(data), mmap=False)


def _load(source: Path | IO[bytes], *, mmap: bool) -> Any:
    with torch.serialization.safe_globals(_STAND_INS):
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)


def _check_archive(source: Path | IO[bytes]) -> bool:
    """Return whether a file is a zip archive, after a check of its entries.

    Raises:
        ValueError: entries are compressed, or larger than the file.
    """
    if not zipfile.is_zipfile(source):
        return False
    with zipfile.ZipFile(source) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise ValueError(f"its entry {entry.filename} is compressed, which torch.save never does")
    return True


def stored_tensor(value: Any) -> torch.Tensor:
    """Return ``value``, a dense tensor whose storage holds all its elements.

    Raises:
        ValueError: it is none: an expanded tensor would take more memory than its file has bytes.
    """
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise ValueError(f"a dense tensor is expected, not {type(value).__name__}")
    if value.numel() * value.itemsize > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(value.shape)} has {value.untyped_storage().nbytes()} bytes")
    return value.detach()


@contextmanager
def explain_damage(file: Path, what: str = "") -> Iterator[None]:
    """Turn errors of reading a file of another program into one that names it.

    Raises:
        BadCheckpoint: always, for any error.
    """
    place = f"{file}{what and f' ({what})'}"
    try:
        yield
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        held = f"an object of {found[1] or found[2]}, which could run code" if found else "something else than tensors"
        raise BadCheckpoint(f"{place} holds {held}; it is not loaded") from error
    except (BadCheckpoint, MemoryError):
        raise
    except Exception as error:  # damaged bytes make the readers of pickles and archives fail in any way
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise BadCheckpoint(f"{place} cannot be read: {first}") from error


def inside(folder: Path, file: Path) -> Path:
    """Return ``file``, which lies in ``folder`` also after its links are followed.

    Raises:
        BadCheckpoint: it lies elsewhere, or is no regular file.
    """
    if not file.resolve().is_relative_to(folder.resolve()):
        raise BadCheckpoint(f"{file} is a link or path out of {folder}; it is not read")
    if not file.is_file():
        raise BadCheckpoint(f"{file} is missing, or is no regular file")
    return file
