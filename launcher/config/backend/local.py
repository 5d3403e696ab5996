"""``backend=local``: this machine as the only host."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from launcher.config.backend.base import Backend
from launcher.protocol.plan import Host
from launcher.utils.hardware import cpu_computes_bf16, list_gpus, memory_limit, visible_gpus


@dataclass(frozen=True, kw_only=True)
class LocalBackend(Backend):
    """Ranks are processes of this machine."""

    kind: ClassVar[str] = "local"

    def hosts(self, *, max_ranks: int | None) -> tuple[Host, ...]:
        """Return this machine."""
        return (local_host(self.ranks, max_ranks=max_ranks),)


def local_host(
    ranks: int | Literal["auto"], *, max_ranks: int | None = None, environ: Mapping[str, str] = os.environ
) -> Host:
    """Return this machine as a host that takes so many ranks.

    ``auto`` is one rank per visible GPU; without GPUs two where there are two cores, so that what runs is
    distributed, else one; never more than ``max_ranks``. Linux only: reads the CPU affinity and ``/proc``.
    """
    cores = len(os.sched_getaffinity(0))
    gpus = visible_gpus(list_gpus(), environ.get("CUDA_VISIBLE_DEVICES"))
    automatic = min(len(gpus) or min(2, cores), max_ranks or cores + len(gpus))
    return Host(
        name=socket.gethostname().partition(".")[0],
        slots=automatic if ranks == "auto" else ranks,
        devices=tuple(gpu.name for _, gpu in gpus),
        device_ids=tuple(shown for shown, _ in gpus),
        device_bytes=min((gpu.memory_bytes for _, gpu in gpus), default=0),
        cores=cores,
        memory_bytes=memory_limit(),
        computes_bf16=cpu_computes_bf16(),
        python=sys.executable,
    )
