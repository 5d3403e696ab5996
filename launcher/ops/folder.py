"""Where operators are built, and which are there: answered by ``stat`` alone, without importing torch."""

from __future__ import annotations

import hashlib
import os
import sys
from functools import cache
from importlib.metadata import distribution, version
from pathlib import Path

from launcher.parallel.base import NativeOps

OPTIONAL_MARK = "?"
"""Ends the name of an operator the run can do without, on the command line of ``python -m launcher.ops``."""


def ops_folder() -> Path:
    """Return the folder of this environment's operators.

    It is ``TORCH_EXTENSIONS_DIR`` where that is set, else a folder below ``$XDG_CACHE_HOME/launcher/ops`` of its own
    for each combination of Python, torch, DeepSpeed, environment and instruction set: what is compiled for one of them
    is wrong, or rebuilt over and over, in another.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(f"{sys.prefix}\n{_instruction_set()}".encode()).hexdigest()[:8]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache / "launcher" / "ops" / f"py{python}-torch{version('torch')}-deepspeed{version('deepspeed')}-{digest}"


def _instruction_set() -> str:
    """Return the processor's flags, because operators are compiled for the machine at hand; empty outside Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def library(name: str) -> Path:
    """Return the path of a built operator."""
    return ops_folder() / name / f"{name}.so"


def lock(name: str) -> Path:
    """Return the path of the lock that torch holds while it builds an operator, and for a moment while it loads it."""
    return ops_folder() / name / "lock"


def is_built(name: str) -> bool:
    """Whether ranks can load this operator as it is.

    One that is older than DeepSpeed's sources is not: an environment that was installed again has newer ones, and every
    rank would compile them anew, each for minutes, when it loads the operator.
    """
    try:
        built = library(name).stat().st_mtime_ns
    except OSError:  # it is not there, or the folder is another user's
        return False
    return built >= _sources_changed_ns()


def mark_built(name: str) -> None:
    """Say that an operator is up to date, whatever the times of files that it is not made of."""
    if library(name).exists():
        os.utime(library(name))


@cache
def _sources_changed_ns() -> int:
    """Return the time of DeepSpeed's newest source file, in ns; found without importing DeepSpeed."""
    sources = Path(str(distribution("deepspeed").locate_file("deepspeed/ops/csrc")))
    files = (file for file in sources.rglob("*") if file.is_file())
    return max((file.stat().st_mtime_ns for file in files), default=0)


def missing(ops: NativeOps) -> tuple[str, ...]:
    """Return the arguments of ``python -m launcher.ops`` that make ``ops`` ready; empty when there is nothing to do.

    A lock counts as missing: either a build is going on, or a killed one left it and it has to be cleared.
    """
    return tuple(word for word in arguments(ops) if not is_built(_name(word)) or lock(_name(word)).exists())


def arguments(ops: NativeOps) -> tuple[str, ...]:
    """Return the arguments of ``python -m launcher.ops`` that make ``ops`` ready wherever it runs."""
    return (*ops.needed, *(name + OPTIONAL_MARK for name in ops.optional))


def _name(argument: str) -> str:
    return argument.removesuffix(OPTIONAL_MARK)
