"""Facts of a healthy host, and processes of this machine that play hosts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.doctor.examine import examine_hosts
from launcher.doctor.protocol import HostFacts, ProbeRequest, Software, Storage
from launcher.doctor.report import DoctorReport
from launcher.protocol.plan import Host
from launcher.remote.command import RemoteCommand

_GIB = 2**30

SOFTWARE = Software(
    python="3.11.7",
    python_path="/venv/bin/python",
    packages={"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"},
    cuda=None,
    nccl=None,
    driver=None,
    code_hash="ab" * 32,
)
STORAGE = Storage(
    folder="/runs", problem=None, is_shared=True, free_bytes=100 * _GIB, shm_bytes=8 * _GIB, shm_free_bytes=8 * _GIB
)
FACTS = HostFacts(
    hostname="node1",
    address="10.0.0.1",
    architecture="x86_64",
    boot_id="boot",
    cores=8,
    memory_bytes=32 * _GIB,
    free_memory_bytes=30 * _GIB,
    computes_bf16=True,
    devices=(),
    device_ids=(),
    device_bytes=0,
    software=SOFTWARE,
    storage=STORAGE,
)

FactsOf = Callable[..., dict[str, HostFacts]]


@pytest.fixture
def facts_of() -> FactsOf:
    """Return healthy facts of so many hosts, with what the last ones have instead."""

    def make(num_hosts: int, **last: Any) -> dict[str, HostFacts]:
        facts = {
            f"node{number}": replace(FACTS, hostname=f"node{number}", address=f"10.0.0.{number}")
            for number in range(1, num_hosts + 1)
        }
        name, found = list(facts.items())[-1]
        software = {key: last.pop(key) for key in list(last) if hasattr(SOFTWARE, key)}
        disk = {key: last.pop(key) for key in list(last) if hasattr(STORAGE, key)}
        facts[name] = replace(found, software=replace(SOFTWARE, **software), storage=replace(STORAGE, **disk), **last)
        return facts

    return make


NAMED_PROBE = (
    sys.executable,
    "-c",
    "import runpy, socket, sys; name = sys.argv.pop(); socket.gethostname = lambda: name; "
    "runpy.run_module('launcher.doctor.probe', run_name='__main__')",
)
"""A probe that tells a host name of its own: without that, all would be found to be one machine."""

Examine = Callable[..., DoctorReport]


@pytest.fixture
def examine_here(tmp_path: Path) -> Examine:
    """Examine processes of this machine that play hosts; ``commands`` replaces the command of some of them."""

    def examined(
        num_hosts: int,
        *,
        commands: Mapping[str, tuple[str, ...]] | None = None,
        quick: bool = True,
        port: int | None = None,
        run_dir: Path = tmp_path / "runs" / "x",
        deadline_s: float = 60.0,
    ) -> DoctorReport:
        hosts = [
            Host(name=f"node{number}", slots=1, ssh_destination=f"node{number}") for number in range(1, num_hosts + 1)
        ]

        def remote(host: Host, module: str) -> RemoteCommand:
            assert module == "launcher.doctor.probe"
            return RemoteCommand(argv=(commands or {}).get(host.name, (*NAMED_PROBE, host.name)))

        request = ProbeRequest(run_dir=str(run_dir), port=port)
        return examine_hosts(hosts, remote, request, quick=quick, deadline_s=deadline_s)

    return examined
