"""Facts and measurements of hosts, and the messages that carry them from probe to doctor."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import msgspec

PACKAGES = ("torch", "deepspeed", "transformers")
"""Versions that must agree on all hosts."""
_MESSAGE_PREFIX = b'{"doctor": '

_FIELDS: dict[str, dict[str, Any]] = {
    "hello": {},
    "facts": {},
    "listen": {"port": int | None, "problem": str | None},
    "contact": {"contact": dict[str, Any]},
    "close_port": {},
    "pair": {"pair": dict[str, Any]},
    "group": {"group": dict[str, Any]},
    "collective": {"exit_code": int},
}
"""Required fields of each kind of message; nested values are checked where they are used."""
_FORMS = {kind: msgspec.defstruct(kind, fields.items()) for kind, fields in _FIELDS.items()}


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """Requirements of a run on its hosts."""

    run_dir: str
    """Absolute path; it need not exist."""
    port: int | None = None
    """Port of the rendezvous on the first host; ``None`` takes any free one."""
    plugins: tuple[str, ...] = ()
    """Modules that every host must be able to import."""


@dataclass(frozen=True, kw_only=True)
class PluginFacts:
    """A plugin of the run, as the interpreter of the probe finds it."""

    module: str
    problem: str | None = None
    """Why it cannot be loaded; the fields below are then empty."""
    file: str = ""
    version: str = ""
    """Version of its package; empty if that is not installed."""
    code_hash: str = ""
    """SHA-256 of its package's Python and YAML files."""


@dataclass(frozen=True, kw_only=True)
class Software:
    """Software that is installed for the interpreter of the probe."""

    python: str
    """Version."""
    python_path: str
    packages: dict[str, str]
    """Versions by name, without missing packages."""
    cuda: str | None
    """CUDA version of the torch build; ``None`` for a build without CUDA, and without torch."""
    nccl: str | None
    """Version of the installed package."""
    driver: str | None
    """Version of the NVIDIA driver."""
    code_hash: str
    """SHA-256 of the files of this package."""
    plugins: tuple[PluginFacts, ...] = ()
    """Of the plugins that the run uses."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The run directory on the host, and its shared memory."""

    folder: str
    """The run directory, or the nearest folder above it that exists."""
    problem: str | None
    """Why the folder is not writable; ``None`` when it is."""
    is_shared: bool
    """Whether a file that the launching machine wrote exists there too."""
    served_by: str = ""
    """File server and path of the folder; empty for a local disk or an unknown file system."""
    free_bytes: int
    shm_bytes: int
    """Size of /dev/shm; 0 without one."""
    shm_free_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """Hardware, software and storage of one host."""

    hostname: str
    address: str
    """Address at which it was reached, or else of its route to other machines."""
    architecture: str
    boot_id: str
    cores: int
    """Cores that this login may use."""
    memory_bytes: int
    """RAM, or the limit of the control group."""
    free_memory_bytes: int
    computes_bf16: bool
    devices: tuple[str, ...]
    """Names of the visible GPUs."""
    device_ids: tuple[str, ...]
    """Their names in CUDA_VISIBLE_DEVICES."""
    device_bytes: int
    """Memory of the smallest GPU; 0 when unknown."""
    software: Software
    storage: Storage


@dataclass(frozen=True, kw_only=True)
class Contact:
    """Route and latency from a host to the first one."""

    interface: str | None
    """Network interface of the route; ``None`` when the address belongs to none."""
    local_address: str | None
    """Address of this host on that route; ``None`` without a route."""
    latency_s: float | None
    """Time of a round trip; ``None`` when there was none."""
    problem: str | None
    """Why the port cannot be reached or, on the first host, opened."""


@dataclass(frozen=True, kw_only=True)
class PairMeasurement:
    """An all-reduce between two hosts."""

    hosts: tuple[str, str]
    latency_s: float | None = None
    """Fastest of several all-reduces of 8 bytes."""
    bytes_per_s: float | None = None
    """Size of the buffer over the fastest time."""
    problem: str | None = None
    """Why the measurement failed."""


@dataclass(frozen=True, kw_only=True)
class GroupMeasurement:
    """An all-reduce among all hosts, measured on one of them."""

    latency_s: float | None = None
    problem: str | None = None


def send_message(kind: str, **values: Any) -> None:
    """Print one message to the doctor, in one write: two processes of a host share this stdout."""
    tree = {key: asdict(value) if is_dataclass(value) else value for key, value in values.items()}  # type: ignore[arg-type]
    sys.stdout.write(json.dumps({"doctor": kind, **tree}) + "\n")
    sys.stdout.flush()


def parse_message(line: bytes) -> dict[str, Any] | None:
    """Return the message in a line of a probe's stdout; ``None`` when it is not a message."""
    if not line.startswith(_MESSAGE_PREFIX):
        return None
    try:
        message = msgspec.convert(json.loads(line), dict[str, Any])
        msgspec.convert(message, _FORMS[msgspec.convert(message["doctor"], str)])
    except (ValueError, RecursionError, KeyError, msgspec.ValidationError):
        return None
    return message
