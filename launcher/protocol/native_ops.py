"""DeepSpeed's native operators: where they are built, which are there, what came of a build.

Answered by ``stat`` alone, without importing torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import distribution, version
from pathlib import Path

from launcher.protocol.plan import NativeOps
from launcher.utils.files import home_folder, read_json, write_json

OPTIONAL_MARK = "?"
"""Suffix of an optional operator on the command line of ``python -m launcher.ops``."""


def ops_folder() -> Path:
    """Return the folder of this environment's operators.

    It is ``TORCH_EXTENSIONS_DIR`` where that is set, else a folder below ``$XDG_CACHE_HOME/launcher/ops`` of its own
    for each combination of Python, torch, DeepSpeed, environment and instruction set: what is compiled for one of them
    is wrong, or rebuilt over and over, in another.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache")
    digest = hashlib.sha256(f"{sys.prefix}\n{_instruction_set()}".encode()).hexdigest()[:8]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache / "launcher" / "ops" / f"py{python}-torch{version('torch')}-deepspeed{version('deepspeed')}-{digest}"


def _instruction_set() -> str:
    """Return the processor's flags; empty outside Linux.

    Operators are compiled for the processor at hand.
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def op_library(name: str) -> Path:
    """Return the path of a built operator."""
    return ops_folder() / name / f"{name}.so"


def op_lock(name: str) -> Path:
    """Return the path of the lock that torch holds while it builds or loads an operator."""
    return ops_folder() / name / "lock"


def is_built(name: str) -> bool:
    """Whether ranks can load this operator as it is.

    One that is older than DeepSpeed's sources is not: an environment that was installed again has newer ones. Nor is
    one that is older than its object files or commands: a build that was killed left newer ones. Every rank would
    compile it again, for minutes, when it loads the operator.
    """
    try:
        return op_library(name).stat().st_mtime_ns >= _parts_changed_ns(name)
    except OSError:  # it is not there, a build is going on, or the folder is another user's
        return False


def mark_built(name: str) -> None:
    """Say that an operator is up to date, whatever the times of files that it is not made of."""
    library = op_library(name)
    if library.exists():
        os.utime(library)
        if (changed := _parts_changed_ns(name)) > library.stat().st_mtime_ns:  # in the future: clocks of hosts differ
            os.utime(library, ns=(changed, changed))


def _parts_changed_ns(name: str) -> int:
    """Return the time of the newest file that an operator is made of, in ns."""
    folder = ops_folder() / name
    parts = [folder / "build.ninja", *folder.glob("*.o")]
    return max([_sources_changed_ns(), *(part.stat().st_mtime_ns for part in parts if part.exists())])


@cache
def _sources_changed_ns() -> int:
    """Return the time of DeepSpeed's newest source file, in ns, without importing DeepSpeed."""
    sources = Path(str(distribution("deepspeed").locate_file("deepspeed/ops/csrc")))
    files = (file for file in sources.rglob("*") if file.is_file())
    return max((file.stat().st_mtime_ns for file in files), default=0)


def ops_to_build(ops: NativeOps) -> tuple[str, ...]:
    """Return the arguments of ``python -m launcher.ops`` for missing operators of ``ops``.

    A lock counts as missing: either a build is going on, or a killed one left it and it has to be cleared.
    """
    return tuple(word for word in ops_arguments(ops) if not is_built(_name(word)) or op_lock(_name(word)).exists())


def ops_arguments(ops: NativeOps) -> tuple[str, ...]:
    """Return the arguments of ``python -m launcher.ops`` for all of ``ops``, on any host."""
    return (*ops.needed, *(name + OPTIONAL_MARK for name in ops.optional))


def _name(argument: str) -> str:
    return argument.removesuffix(OPTIONAL_MARK)


@dataclass(frozen=True, kw_only=True)
class BuildOutcome:
    """The end of one build."""

    name: str
    built: bool
    seconds: float
    why: str = ""
    """Why it could not be built."""
    fix: str = ""
    """Command that fixes it."""


def _outcome_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def write_build_outcome(folder: Path, outcome: BuildOutcome) -> None:
    """Keep an outcome."""
    write_json(_outcome_file(folder, outcome.name), asdict(outcome))


def read_build_outcome(folder: Path, name: str) -> BuildOutcome | None:
    """Return the last outcome, or ``None`` when this operator was never built here."""
    path = _outcome_file(folder, name)
    return BuildOutcome(**read_json(path)) if path.exists() else None


def path_with_ninja() -> str:
    """Return PATH with this interpreter's folder, where pip installs ninja."""
    path = os.environ.get("PATH", os.defpath)
    if shutil.which("ninja", path=path):
        return path
    return os.pathsep.join([str(Path(sys.executable).parent), path])
