"""Hardware and software versions of this machine, found without importing torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import launcher
from launcher.utils.text import bytes_text

_QUERY = ("--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
_MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as the driver lists it."""

    index: str
    uuid: str
    name: str
    memory_bytes: int
    """0 when not known."""


def list_gpus(driver: Path = Path("/proc/driver/nvidia/gpus")) -> list[Gpu]:
    """Return the machine's GPUs; none without ``nvidia-smi`` and the driver in ``/proc``.

    ``nvidia-smi`` comes first because only it reports the size of memory.
    """
    if not driver.is_dir() and shutil.which("nvidia-smi") is None:
        return []
    return _from_nvidia_smi() or _from_driver(driver)


def _from_nvidia_smi() -> list[Gpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run([program, *_QUERY], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
    return [
        Gpu(index=row[0], uuid=row[1], name=row[2], memory_bytes=int(row[3]) * _MIB if row[3].isdigit() else 0)
        for row in rows
        if len(row) == 4
    ]


def _from_driver(driver: Path) -> list[Gpu]:
    gpus = []
    for index, file in enumerate(sorted(driver.glob("*/information"))):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        gpus.append(
            Gpu(index=str(index), uuid=known.get("GPU UUID", ""), name=known.get("Model", "NVIDIA GPU"), memory_bytes=0)
        )
    return gpus


def visible_gpus(gpus: Sequence[Gpu], setting: str | None) -> list[tuple[str, Gpu]]:
    """Return (name in CUDA_VISIBLE_DEVICES, GPU) of those CUDA shows under ``setting``.

    CUDA's rules: unset shows all; the list ends at the first entry that names no GPU (``-1``, an empty text); an entry
    is an index or the beginning of a UUID.
    """
    if setting is None:
        return [(gpu.index, gpu) for gpu in gpus]
    shown: list[tuple[str, Gpu]] = []
    for word in (word.strip() for word in setting.split(",")):
        found = next((gpu for gpu in gpus if word and (gpu.index == word or gpu.uuid.startswith(word))), None)
        if found is None:
            break
        shown.append((word, found))
    return shown


def memory_limit(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of RAM for this process: the machine's, or less by its control group."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in (groups / "memory.max", groups / "memory" / "memory.limit_in_bytes"):
        if file.is_file():
            text = file.read_text(encoding="ascii").strip()
            limits += [int(text)] if text.isdigit() else []
    return min(limits)


def cpu_computes_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 itself: AVX512-BF16 or AMX on x86, BF16 on Arm."""
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(values.split())
    return False


_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "accelerate", "hydra-core", "wandb")
_DRIVER = Path("/proc/driver/nvidia/version")


def describe_environment() -> dict[str, str]:
    """Return machine and versions as text, without values of variables.

    Nothing heavy is imported.
    """
    packages = {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    driver = {"NVIDIA driver": _DRIVER.read_text(encoding="utf-8").splitlines()[0]} if _DRIVER.is_file() else {}
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, {bytes_text(memory_limit())}",
        **driver,
        "interpreter": f"{sys.executable}, Python {platform.python_version()}",
        "launcher": launcher.__version__,
        **packages,
    }


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's name, or its architecture."""
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
