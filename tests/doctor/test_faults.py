"""What breaks on real hosts, each named with its host: ssh, firewalls, mounts, cables and a power cut."""

from __future__ import annotations

import contextlib
import importlib.metadata
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import launcher
from launcher.backends.ssh import SshExecutor
from launcher.config.backend.ssh import SshBackend
from launcher.doctor.examine import default_deadline_s, examine_hosts
from launcher.doctor.protocol import ProbeRequest
from launcher.doctor.report import DoctorReport, Finding, Level
from tests.helpers import wait_for, wait_until_empty
from tests.ports import free_port

if TYPE_CHECKING:
    from hostlab.lab import Lab

AT_ONCE_S = 30.0
"""Every fault is to be named in 15 s; twice that on a busy machine."""

OCCUPY = """\
import os, socket, sys, time
taken = socket.create_server(("", int(sys.argv[1])))
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def three(lab_hosts_of_module: Callable[..., Lab]) -> Lab:
    """Three hosts that every test leaves as it found them."""
    return lab_hosts_of_module(3)


@pytest.fixture(autouse=True)
def _nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, no host runs anything afterwards."""
    yield
    if "three" in request.fixturenames:
        lab: Lab = request.getfixturevalue("three")
        for name in lab.names:
            lab.heal(name)
            wait_until_empty(partial(lab.processes, name), seconds=20)


def look(lab: Lab, folder: Path, *, quick: bool = True, port: int | None = None, **options: Any) -> DoctorReport:
    """Examine the hosts of ``lab`` with the ssh backend, and check that it takes no longer than it may."""
    backend = SshBackend(**{"hostfile": str(lab.hostfile), "ssh_config": str(lab.ssh_config), **options})
    request = ProbeRequest(run_dir=str(folder / "runs"), port=port)
    hosts = backend.hosts(max_ranks=None)
    report = examine_hosts(
        hosts,
        SshExecutor(backend).remote_command,
        request,
        quick=quick,
        deadline_s=default_deadline_s(len(hosts), quick=quick),
    )
    assert quick or report.errors or report.pairs
    assert not quick or report.elapsed_s < AT_ONCE_S
    assert not list(folder.glob(".launcher-doctor-*"))
    return report


def only(report: DoctorReport) -> Finding:
    """Return the finding, of which there must be one."""
    assert len(report.findings) == 1, report.findings
    return report.findings[0]


@contextlib.contextmanager
def mounted(lab: Lab, name: str, *mount: str) -> Iterator[None]:
    """Mount something on one host for as long as this is entered."""
    assert lab.run(name, ["mount", *mount]).returncode == 0
    try:
        yield
    finally:
        assert lab.run(name, ["umount", mount[-1]]).returncode == 0


def test_hosts_that_are_well(three: Lab, tmp_path: Path, launch: Callable[..., Any]) -> None:
    words = (f"backend.hostfile={three.hostfile}", f"backend.ssh_config={three.ssh_config}", f"run.root={tmp_path}")
    ended = launch("doctor", "backend=ssh", *words, timeout=200).expect(0)
    assert "3 hosts examined in" in ended.stdout  # a busy machine makes links slow, and the report says so
    assert "all-reduce of 3 pairs: median" in ended.stdout
    for name in three.names:
        assert three.address(name) in ended.stdout


def test_facts_of_a_host_go_into_the_plan(three: Lab, tmp_path: Path) -> None:
    report = look(three, tmp_path)
    assert report.findings == ()
    assert [host.is_probed for host in report.hosts] == [False] * 3
    for host in report.probed(report.hosts):
        assert (host.address, host.interface, host.is_probed) == (three.address(host.name), "eth0", True)
        assert host.cores
        assert host.memory_bytes


def test_a_host_without_power(lab_hosts: Callable[..., Lab], tmp_path: Path) -> None:
    lab = lab_hosts(3)
    lab.power_off("node2")
    report = look(lab, tmp_path)
    assert only(report).host == "node2"
    assert list(report.facts) == ["node1", "node3"]


def test_a_cut_cable(three: Lab, tmp_path: Path) -> None:
    three.fault("node3", "cut")
    report = look(three, tmp_path)
    assert (only(report).host, only(report).level) == ("node3", Level.ERROR)
    assert "does not answer" in only(report).what
    assert report.contacts["node2"].latency_s is not None


def test_the_first_host_is_the_one_that_is_cut_off(three: Lab, tmp_path: Path) -> None:
    three.fault("node1", "down")
    report = look(three, tmp_path)
    assert only(report).host == "node1"
    assert report.contacts["node3"].latency_s is not None


def test_a_key_that_is_not_welcome(three: Lab, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    config = tmp_path / "config"
    config.write_text(three.ssh_config.read_text().replace(f"{three.folder}/id", str(key)))
    findings = look(three, tmp_path, ssh_config=str(config)).errors
    assert [(found.host, found.what) for found in findings] == [(name, "rejects the ssh key") for name in three.names]


def test_an_unknown_host_key(three: Lab, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(three.ssh_config.read_text().replace(f"{three.folder}/known_hosts", str(tmp_path / "empty")))
    findings = look(three, tmp_path, ssh_config=str(config)).errors
    assert {found.what for found in findings} == {"its host key is unknown"}


def test_names_that_lead_nowhere(three: Lab, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"{three.hostfile.read_text()}nowhere.invalid slots=1\n")
    found = only(look(three, tmp_path, hostfile=str(hostfile)))
    assert (found.host, found.what) == ("nowhere.invalid", "has a name that does not resolve")


def test_no_interpreter(three: Lab, tmp_path: Path) -> None:
    findings = look(three, tmp_path, python="/nowhere/bin/python").errors
    assert {found.what for found in findings} == {"has no /nowhere/bin/python"}
    assert "backend.python" in findings[0].remedy


def test_another_version_of_a_package(three: Lab, tmp_path: Path) -> None:
    """One host has an older version where the others have the usual one."""
    distribution = importlib.metadata.distribution("transformers")
    metadata = Path(str(distribution.locate_file(f"transformers-{distribution.version}.dist-info/METADATA")))
    older = tmp_path / "METADATA"
    older.write_text(metadata.read_text().replace(f"\nVersion: {distribution.version}\n", "\nVersion: 4.2.0\n", 1))
    with mounted(three, "node2", "--bind", str(older), str(metadata)):
        found = only(look(three, tmp_path))
    assert (found.host, found.level) == ("node2", Level.ERROR)
    assert found.what == f"transformers is 4.2.0 and most have {distribution.version}"


def test_other_code(three: Lab, tmp_path: Path) -> None:
    file = Path(launcher.__file__)
    other = tmp_path / "init.py"
    other.write_text(file.read_text() + "# changed\n")
    with mounted(three, "node3", "--bind", str(other), str(file)):
        found = only(look(three, tmp_path))
        assert (found.host, found.level) == ("node3", Level.ERROR)
        assert "its launcher code is" in found.what
        assert "backend.code=sent" in found.remedy
        assert look(three, tmp_path, code="sent").findings == ()


def test_a_closed_port(three: Lab, tmp_path: Path) -> None:
    port = free_port()
    three.fault("node1", "block", port)
    found = only(look(three, tmp_path, port=port))
    assert (found.host, found.level) == ("node1", Level.ERROR)
    assert f"no other host reaches its port {port}" in found.what
    assert "firewall" in found.remedy


def test_a_port_in_use(three: Lab, tmp_path: Path) -> None:
    port = free_port()
    command = three.command("node1", [sys.executable, "-c", OCCUPY, str(port)])
    with subprocess.Popen(command, stdout=subprocess.PIPE) as occupier:
        assert occupier.stdout is not None
        number = int(occupier.stdout.readline())
        found = only(look(three, tmp_path, port=port))
        three.run("node1", ["kill", str(number)])
    assert (found.host, found.level) == ("node1", Level.ERROR)
    assert (
        f"port {port} cannot be opened for the rendezvous: Address already in use, by process {number} (python"
        in found.what
    )


def test_a_folder_that_cannot_be_written(three: Lab, tmp_path: Path) -> None:
    with mounted(three, "node2", "-t", "tmpfs", "-o", "ro", "none", str(tmp_path)):
        found = only(look(three, tmp_path))
    assert (found.host, found.level) == ("node2", Level.ERROR)
    assert f"{tmp_path}: Read-only file system" in found.what
    assert "run.root" in found.remedy


def test_a_full_disk(three: Lab, tmp_path: Path) -> None:
    with mounted(three, "node2", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)):
        three.run("node2", ["dd", "if=/dev/zero", f"of={tmp_path}/full", "bs=4k"])
        errors = look(three, tmp_path).errors
    assert [found.host for found in errors] == ["node2"]
    assert "No space left on device" in errors[0].what
    assert "free space" in errors[0].remedy


def test_a_folder_of_its_own(three: Lab, tmp_path: Path) -> None:
    with mounted(three, "node3", "-t", "tmpfs", "none", str(tmp_path)):
        findings = look(three, tmp_path).findings
    assert {(found.host, found.level) for found in findings} == {("node3", Level.WARNING)}
    assert any("is not the folder of that name on this machine" in found.what for found in findings)


def test_a_slow_link(three: Lab, tmp_path: Path) -> None:
    """200 ms there and back; the other hosts are measured, and it is not waited for."""
    with three.delay("node2", 100):
        report = look(three, tmp_path, quick=False)
    found = only(report)
    assert (found.host, found.level) == ("node2", Level.WARNING)
    assert "a round trip to node1 takes" in found.what
    assert 0.2 <= (report.contacts["node2"].latency_s or 0) < 1  # what delays is a program, and may be late itself
    assert [pair.hosts for pair in report.pairs] == [("node1", "node3")]


def test_two_hosts_that_reach_the_first_but_not_each_other(three: Lab, tmp_path: Path) -> None:
    route = ("ip", "route", "add", "blackhole", three.address("node3"))
    assert three.run("node2", route).returncode == 0
    try:
        report = look(three, tmp_path, quick=False)
    finally:
        three.run("node2", [*route[:2], "del", *route[3:]])
    found = only(report)
    assert (found.host, found.level) == ("node3", Level.ERROR)
    assert found.what.startswith("an all-reduce with node2 fails")
    assert [pair.hosts for pair in report.pairs if pair.problem is None] == [("node1", "node2"), ("node1", "node3")]


def test_more_slots_than_cores_and_one_machine_twice(three: Lab, tmp_path: Path) -> None:
    config = tmp_path / "config"
    again = f"Host again\n  HostName {three.address('node1')}\n  HostKeyAlias node1\n"
    config.write_text(again + three.ssh_config.read_text())
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nagain slots=4000\n")
    errors = look(three, tmp_path, hostfile=str(hostfile), ssh_config=str(config)).findings
    assert {found.host for found in errors} == {"again"}
    assert any(found.what == "is the same machine as node1" for found in errors)
    assert any("is given 4,000 ranks and has" in found.what for found in errors)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_hosts_are_left_alone_by_a_doctor_that_is_ended(three: Lab, tmp_path: Path, number: signal.Signals) -> None:
    words = (f"backend.hostfile={three.hostfile}", f"backend.ssh_config={three.ssh_config}", f"run.root={tmp_path}")
    doctor = subprocess.Popen(
        [sys.executable, "-m", "launcher", "doctor", "backend=ssh", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:

        def measures() -> bool:
            return any("collective" in line for name in three.names for line in three.processes(name).values())

        wait_for(measures, seconds=60, process=doctor)
    finally:
        doctor.send_signal(number)
        doctor.wait(timeout=30)
    for name in three.names:
        wait_until_empty(partial(three.processes, name), seconds=20)


def test_each_host_is_known_by_its_own_facts(three: Lab, tmp_path: Path) -> None:
    report = look(three, tmp_path)
    assert {name: facts.hostname for name, facts in report.facts.items()} == {name: name for name in three.names}
    unlisted = replace(report.hosts[0], name="other")
    assert report.probed([unlisted]) == (unlisted,)
