"""Versions of what is installed, read from metadata: torch takes seconds to import and is never asked."""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path

import launcher
from launcher.doctor.facts import PACKAGES, Software

_CUDA = re.compile(r"^cuda\b[^=]*=\s*['\"]([0-9.]+)['\"]", re.MULTILINE)
_DRIVER = re.compile(r"Kernel Module(?: for \S+)?\s+([0-9.]+)")


def software() -> Software:
    """Return what this interpreter would run with."""
    found = {name: _version(name) for name in PACKAGES}
    return Software(
        python=platform.python_version(),
        python_path=sys.executable,
        packages={name: number for name, number in found.items() if number is not None},
        cuda=_cuda(),
        nccl=_nccl(),
        driver=_driver(),
        code_hash=code_hash(),
    )


def code_hash() -> str:
    """Return the SHA-256 over names and contents of this package's modules; the same files give the same anywhere."""
    package = Path(launcher.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py"), key=lambda file: file.relative_to(package).parts):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cuda() -> str | None:
    """Return what ``torch/version.py`` says, without running it or anything else of torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    found = _CUDA.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else None


def _nccl() -> str | None:
    """Return the version of the package that brings NCCL; its name ends with the CUDA version it is for."""
    for distribution in distributions():
        if (distribution.name or "").lower().replace("_", "-").startswith("nvidia-nccl-"):
            return distribution.version
    return None


def _driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    found = _DRIVER.search(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    return found[1] if found else None
