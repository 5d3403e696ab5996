"""On what a run ran, found by its first rank and kept beside it: a report made later, elsewhere, can still tell."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import launcher
from launcher.machine import memory_limit
from launcher.wording import bytes_text

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "accelerate", "hydra-core", "wandb")
_DRIVER = Path("/proc/driver/nvidia/version")


def describe_environment() -> dict[str, str]:
    """Return machine and versions in words; nothing heavy is imported, and no value of a variable is among them."""
    packages = {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    driver = {"NVIDIA driver": _DRIVER.read_text(encoding="utf-8").splitlines()[0]} if _DRIVER.is_file() else {}
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} cores, {bytes_text(memory_limit())}",
        **driver,
        "interpreter": f"{sys.executable}, Python {platform.python_version()}",
        "launcher": launcher.__version__,
        **packages,
    }


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return what the processor calls itself, or its architecture."""
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
