"""Facts and measurements of hosts, and the lines that carry them from probe to doctor."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from launcher.protocol.wire import require_fields

PACKAGES = ("torch", "deepspeed", "transformers")
"""Versions that must agree on all hosts."""


_BEGINNING = b'{"doctor": '


_FIELDS: dict[str, dict[str, Any]] = {
    "hello": {},
    "survey": {},
    "listen": {"port": int | None, "problem": str | None},
    "contact": {"contact": dict[str, Any]},
    "hush": {},
    "pair": {"pair": dict[str, Any]},
    "everyone": {"everyone": dict[str, Any]},
    "collective": {"exit_code": int},
}
"""What a message of each kind must hold; the values inside are read by type where they are used."""


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """What a run will need of its hosts."""

    run_dir: str
    """Absolute path; it need not exist."""
    port: int | None = None
    """Of the rendezvous on the first host; ``None`` takes any free one."""


@dataclass(frozen=True, kw_only=True)
class Software:
    """What is installed for the interpreter that answered."""

    python: str
    """Version."""
    python_path: str
    packages: dict[str, str]
    """Versions by name; a package that is missing is left out."""
    cuda: str | None
    """Version torch was built for; ``None`` for a build without CUDA, and where torch is missing."""
    nccl: str | None
    """Version installed beside torch."""
    driver: str | None
    """Version of the NVIDIA driver."""
    code_hash: str
    """SHA-256 of the files of this package."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The run directory as the host sees it, and shared memory."""

    folder: str
    """The run directory, or the nearest folder above it that exists."""
    problem: str | None
    """Why nothing can be written there; ``None`` when it can."""
    is_ours: bool
    """Whether a file that the launching machine wrote is there too."""
    served_by: str = ""
    """File server of the folder and where it is there; empty where the disk is the host's own, or of unknown kind."""
    free_bytes: int
    shm_bytes: int
    """Size of /dev/shm; 0 where there is none."""
    shm_free_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """One host."""

    hostname: str
    address: str
    """Where it was reached, or else where it reaches others from."""
    architecture: str
    boot_id: str
    cores: int
    """Those this login may use."""
    memory_bytes: int
    """RAM, or what the control group allows of it."""
    free_memory_bytes: int
    computes_bf16: bool
    devices: tuple[str, ...]
    """Names of the visible GPUs."""
    device_ids: tuple[str, ...]
    """What CUDA_VISIBLE_DEVICES calls each."""
    device_bytes: int
    """Memory of the smallest GPU; 0 when not known."""
    software: Software
    storage: Storage


@dataclass(frozen=True, kw_only=True)
class Contact:
    """How a host reaches the first one."""

    interface: str | None
    """Network interface that routes there; ``None`` when the address belongs to none."""
    local_address: str | None
    """Address of this host on that route; ``None`` without a route."""
    latency_s: float | None
    """Of a round trip; ``None`` when there was none."""
    problem: str | None
    """Why the port cannot be reached; on the first host, why it cannot be opened."""


@dataclass(frozen=True, kw_only=True)
class PairMeasurement:
    """An all-reduce between two hosts."""

    hosts: tuple[str, str]
    latency_s: float | None = None
    """Of 8 bytes: the fastest of several."""
    bytes_per_s: float | None = None
    """Size of the buffer over the fastest time."""
    problem: str | None = None
    """Why there are no figures."""


@dataclass(frozen=True, kw_only=True)
class GroupMeasurement:
    """An all-reduce among all hosts, as one of them saw it."""

    latency_s: float | None = None
    problem: str | None = None


def send_message(kind: str, **values: Any) -> None:
    """Print one message to the doctor; two processes of a host share this stdout, so it goes out in one piece."""
    tree = {key: asdict(value) if is_dataclass(value) else value for key, value in values.items()}  # type: ignore[arg-type]
    sys.stdout.write(json.dumps({"doctor": kind, **tree}) + "\n")
    sys.stdout.flush()


def parse_message(line: bytes) -> dict[str, Any] | None:
    """Return the message that a line of a host's stdout holds; ``None`` when it holds none."""
    if not line.startswith(_BEGINNING):
        return None
    try:
        message = json.loads(line)
        kind = message["doctor"] if isinstance(message, dict) else None
        fields = _FIELDS.get(kind) if isinstance(kind, str) else None
        if fields is None:
            return None
        require_fields(message, fields)
    except (ValueError, RecursionError):
        return None
    return dict(message)
