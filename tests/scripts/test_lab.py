"""The lab itself: its hosts are apart, its faults are what they say, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostlab.lab import Lab, load
from hostlab.network import links
from hostlab.process import LabError, inhabitants

from tests.conftest import REPOSITORY
from tests.helpers import wait_for

LabHosts = Callable[..., Lab]
HOSTS = REPOSITORY / "scripts" / "lab" / "hosts.py"


@pytest.fixture(scope="module")
def lab(lab_hosts_of_module: LabHosts) -> Lab:
    return lab_hosts_of_module(2, slots=3)


def ssh(lab: Lab, name: str, command: str, *, timeout: float = 30) -> str:
    """Return what a command prints over ssh from this machine."""
    argv = ["ssh", "-F", lab.ssh_config, "-o", "BatchMode=yes", name, command]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def output(lab: Lab, name: str, *argv: str) -> str:
    ended = lab.run(name, argv)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@contextlib.contextmanager
def conversation(lab: Lab, name: str) -> Iterator[socket.socket]:
    """Connect to a host's sshd, whose greeting has been read, so that it waits for us to speak."""
    with socket.create_connection((lab.address(name), 22), timeout=30) as connection:
        assert connection.recv(100).startswith(b"SSH-")
        yield connection


def is_silent(connection: socket.socket, seconds: float) -> bool:
    """Return whether nothing comes: neither bytes, nor an end, nor a reset."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return not selector.select(seconds)


def test_a_host_is_a_machine_of_its_own(lab: Lab) -> None:
    assert lab.hostfile.read_text() == "node1 slots=3\nnode2 slots=3\n"
    for name in lab.names:
        assert ssh(lab, name, "hostname; cat /etc/hostname").split() == [name, name]
        assert lab.address(name) in ssh(lab, name, "ip -4 -o address show eth0")
        assert ssh(lab, name, "ls /sys/class/net").split() == ["eth0", "lo"]
        assert "/init.py" in ssh(lab, name, "tr '\\0' ' ' < /proc/1/cmdline")
        assert ssh(lab, name, "echo $HOME").endswith(f"/{name}/home")
    assert socket.gethostname() not in lab.names


def test_hosts_know_and_reach_one_another_by_name(lab: Lab) -> None:
    assert ssh(lab, "node1", "ssh node2 hostname") == "node2"
    assert output(lab, "node2", "ssh", "node1", "hostname") == "node1"
    assert output(lab, "node2", "getent", "hosts", "node1").split() == [lab.address("node1"), "node1"]


def test_shared_memory_is_a_hosts_own_and_the_disk_is_not(lab: Lab, tmp_path: Path) -> None:
    output(lab, "node1", "touch", "/dev/shm/only-here", str(tmp_path / "everywhere"))
    assert output(lab, "node1", "ls", "/dev/shm") == "only-here"
    assert output(lab, "node2", "ls", "/dev/shm", str(tmp_path)) == f"/dev/shm:\n\n{tmp_path}:\neverywhere"


def test_a_host_counts_what_was_started_on_it(lab: Lab) -> None:
    assert lab.processes("node1") == {}
    with subprocess.Popen(lab.command("node1", ["sleep", "987"])) as command:
        while "sleep 987" not in (found := lab.processes("node1")).values():
            assert command.poll() is None
        assert list(found.values()) == ["sleep 987"]
        assert lab.processes("node2") == {}
        os.kill(next(iter(found)), signal.SIGKILL)
    assert lab.processes("node1") == {}


def test_a_cut_is_silent_and_heals(lab: Lab) -> None:
    with conversation(lab, "node1") as connection:
        lab.fault("node1", "cut")
        connection.sendall(b"SSH-2.0-test\r\n")
        assert is_silent(connection, 2)
        with pytest.raises(TimeoutError):
            socket.create_connection((lab.address("node1"), 22), timeout=1)
        assert ssh(lab, "node2", "hostname") == "node2"
        lab.heal("node1")
        connection.settimeout(60)
        assert connection.recv(10_000)  # the server answers what was sent meanwhile


def test_a_blocked_port_is_silent_and_the_others_are_not(lab: Lab) -> None:
    lab.fault("node1", "block", 22)
    with pytest.raises(TimeoutError):
        socket.create_connection((lab.address("node1"), 22), timeout=1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((lab.address("node1"), 23), timeout=30)
    lab.heal("node1")
    assert ssh(lab, "node1", "hostname") == "node1"


def test_a_link_that_is_down_is_noticed_on_the_host(lab: Lab) -> None:
    lab.fault("node1", "down")
    assert lab.run("node1", ["ssh", "node2", "true"]).returncode == 255
    lab.fault("node1", "up")
    assert ssh(lab, "node1", "hostname") == "node1"


def test_a_delay_makes_every_round_trip_longer(lab: Lab) -> None:
    def round_trip_s() -> float:
        started = time.monotonic()
        with conversation(lab, "node2"):
            return time.monotonic() - started

    with lab.delay("node2", 100):
        assert round_trip_s() >= 0.4  # one to connect, one for the greeting
        zeros = "head -c 2000000 /dev/zero"
        sent = output(lab, "node1", "sh", "-c", f"ssh node2 '{zeros}' | cksum")
        assert sent == output(lab, "node1", "sh", "-c", f"{zeros} | cksum")
    assert min(round_trip_s() for _ in range(5)) < 0.4


def test_loss_and_a_slow_link_are_set_and_removed(lab: Lab) -> None:
    lab.fault("node1", "loss", 2.5)
    lab.fault("node1", "rate", 8)
    assert "mod 1000 < 25 drop" in output(lab, "node1", "nft", "list", "ruleset")
    assert "rate 8Mbit" in output(lab, "node1", "tc", "qdisc", "show", "dev", "eth0")
    assert ssh(lab, "node1", "hostname") == "node1"
    lab.heal("node1")
    assert output(lab, "node1", "nft", "list", "ruleset") == ""
    assert "tbf" not in output(lab, "node1", "tc", "qdisc", "show", "dev", "eth0")


def test_an_unknown_fault_or_host_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match="no such fault: fire; choose of cut, down, up, loss NUMBER"):
        lab.fault("node1", "fire")
    with pytest.raises(LabError, match="no host is node9: there are node1, node2"):
        lab.heal("node9")


def test_a_power_cut_ends_everything_without_a_message(lab_hosts: LabHosts) -> None:
    lab = lab_hosts(2)
    processes = lab.hosts["node1"].keeper.namespace("pid_for_children")
    with conversation(lab, "node1") as connection, subprocess.Popen(lab.command("node1", ["sleep", "987"])) as command:
        while not lab.processes("node1"):
            assert command.poll() is None
        lab.power_off("node1")
        assert list(inhabitants(processes, "pid")) == []
        assert is_silent(connection, 1)
    assert command.returncode != 0
    assert lab.processes("node1") == {}
    with pytest.raises(LabError, match="node1 is off"):
        lab.run("node1", ["true"])
    assert ssh(lab, "node2", "hostname") == "node2"


def test_a_host_lives_on_without_its_sshd(lab_hosts: LabHosts) -> None:
    lab = lab_hosts(1)
    argv = ["ssh", "-F", lab.ssh_config, "node1", "echo up; exec sleep 987"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as session:
        assert session.stdout is not None
        assert session.stdout.readline() == b"up\n"
        lab.kill_sshd("node1")
        assert session.wait(30) == 255
    assert list(lab.processes("node1").values()) == ["sleep 987"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((lab.address("node1"), 22), timeout=30)


def test_a_private_tmp_is_not_shared(lab_hosts: LabHosts) -> None:
    lab = lab_hosts(2, prefix="lone", has_private_tmp=True)
    output(lab, "lone1", "touch", "/tmp/only-here")
    assert "only-here" in output(lab, "lone1", "ls", "/tmp")
    assert "only-here" not in output(lab, "lone2", "ls", "/tmp")
    assert ssh(lab, "lone1", "ssh lone2 hostname") == "lone2"


def test_a_login_finds_the_environment_of_its_host(lab_hosts: LabHosts) -> None:
    odd = "two words, $HOME and 'quotes'"
    lab = lab_hosts(1, environment={"SITE": odd})
    assert ssh(lab, "node1", 'echo "$SITE"') == odd
    assert output(lab, "node1", "printenv", "SITE") == odd


@pytest.mark.usefixtures("lab_hosts")  # it skips where there can be no hosts
def test_hosts_end_with_the_process_that_holds_their_leash(tmp_path: Path) -> None:
    program = f"""
import os
from pathlib import Path
from hostlab.lab import up
up(Path({str(tmp_path / "lab")!r}), "node", 2, subnet="10.99.99", leash=os.pipe()[0])
os.kill(os.getpid(), 9)
"""
    env = {**os.environ, "PYTHONPATH": str(HOSTS.parent)}
    ended = subprocess.run([sys.executable, "-c", program], env=env, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    lab = load(tmp_path / "lab")
    assert lab is not None
    hosts = lab.hosts.values()
    wait_for(lambda: not (lab.switch.is_alive() or any(host.is_on() for host in hosts) or "lab10.99.99" in links()))


@pytest.mark.usefixtures("lab_hosts")
def test_the_script_starts_disturbs_and_ends_hosts(tmp_path: Path) -> None:
    def hosts(*words: str, returncode: int = 0) -> str:
        command = [sys.executable, HOSTS, "--state", tmp_path, *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == returncode, ended.stderr
        return ended.stdout + ended.stderr

    try:
        assert "ssh config: " in hosts("up", "box", "2", "--subnet", "10.99.98", "--slots", "4")
        lab = load(tmp_path / "box")
        assert lab is not None
        assert ssh(lab, "box2", "hostname") == "box2"
        assert "exists: take that lab down first" in hosts("up", "box", "1", "--subnet", "10.99.97", returncode=1)
        assert "10.99.98.0/24 is in use" in hosts("up", "other", "1", "--subnet", "10.99.98", returncode=1)
        assert not (tmp_path / "other").exists()
        hosts("fault", "box1", "cut")
        hosts("kill", "box2")
        assert [line.split("\t")[2] for line in hosts("list").splitlines()] == ["on", "off"]
        namespaces = {lab.switch.namespace("net"), lab.hosts["box1"].keeper.namespace("net")}
        assert "" not in namespaces
    finally:
        hosts("down", "box")
    assert [process for namespace in namespaces for process in inhabitants(namespace, "net")] == []
    assert "lab10.99.98" not in links()
    assert list(tmp_path.iterdir()) == []
    hosts("down", "box")
