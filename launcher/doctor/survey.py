"""Everything a host can tell about itself without asking another one."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from launcher.doctor.facts import HostFacts
from launcher.doctor.network import own_address
from launcher.doctor.software import software
from launcher.doctor.storage import storage
from launcher.machine import cpu_computes_bf16, list_gpus, memory_limit, visible


def survey(run_dir: Path, *, token: str | None, environ: Mapping[str, str]) -> HostFacts:
    """Return the facts of this machine.

    Args:
        run_dir: of the run to come.
        token: a file of the launching machine.
        environ: of this process; ssh and CUDA leave their words in it.
    """
    gpus = visible(list_gpus(), environ.get("CUDA_VISIBLE_DEVICES"))
    memory = memory_limit()
    return HostFacts(
        hostname=socket.gethostname(),
        address=own_address(environ.get("SSH_CONNECTION")),
        architecture=platform.machine(),
        boot_id=_boot_id(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory,
        free_memory_bytes=min(memory, psutil.virtual_memory().available),
        computes_bf16=cpu_computes_bf16(),
        devices=tuple(gpu.name for _, gpu in gpus),
        device_ids=tuple(word for word, _ in gpus),
        device_bytes=min((gpu.memory_bytes for _, gpu in gpus), default=0),
        software=software(),
        storage=storage(run_dir, token=token),
    )


def _boot_id(file: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    return file.read_text(encoding="ascii").strip() if file.is_file() else ""
