"""One host: its files, its processes, its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostlab.network import detach_host
from hostlab.process import LabError, Process, inhabitants, number_inside, spawn, wait_until

_INIT = Path(__file__).with_name("init.py")
_NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_SSHD_CONFIG = """\
HostKey {lab}/hostkey
PidFile {own}/sshd.pid
AuthorizedKeysFile {lab}/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
AcceptEnv LANG LC_*
SetEnv {environment}
Subsystem sftp internal-sftp
MaxStartups 100
"""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine that is a set of namespaces."""

    name: str
    number: int
    """From 1: of its port in the switch."""
    address: str
    lab: Path
    environment: Mapping[str, str]
    """What a login finds set."""
    keeper: Process
    """In the host's namespaces but that of processes, whose first process dies with it."""

    @property
    def own(self) -> Path:
        """The folder with its home, its logs and its settings."""
        return self.lab / self.name

    def is_on(self) -> bool:
        """Return whether the machine runs."""
        return self.keeper.is_alive()

    def wait_until_up(self) -> None:
        """Wait for its sshd.

        Raises:
            LabError: it did not start; with what it said.
        """
        pid_file = self.own / "sshd.pid"
        wait_until(lambda: pid_file.exists() or not self.is_on(), f"{self.name} does not come up: {self._said()}")
        if not self.is_on():
            raise LabError(f"{self.name} did not start: {self._said()}")

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs ``argv`` there, in its home, without the network.

        It ends when ``argv`` does, with its exit code. Killing it does not end what runs on the host.

        Raises:
            LabError: the host is off.
        """
        first = next((process for process in self._all() if number_inside(process) == 1), None)
        if first is None:
            raise LabError(f"{self.name} is off")
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        enter = ("nsenter", f"--target={first.pid}", *_NAMESPACES)
        return [*enter, "env", "--ignore-environment", f"--chdir={self.environment['HOME']}", *settings, *argv]

    def processes(self) -> dict[int, str]:
        """Return number (as this machine counts) and command line of all that a machine just started does not run.

        That is, without the first process, and without those of sshd, whose sessions outlive a cut connection for as
        long as its keepalive wants.
        """
        others = (process.pid for process in self._all() if number_inside(process) != 1)
        return {pid: _command_line(pid) for pid in others if not _is_sshd(pid)}

    def kill_sshd(self) -> None:
        """Kill the ssh server and its sessions; what they started lives on."""
        for process in self._all():
            if _is_sshd(process.pid):
                process.kill()

    def power_off(self, switch: Process) -> None:
        """Kill everything at once and silently: no connection sends a FIN or RST."""
        if self.is_on() and switch.is_alive():
            detach_host(switch, number=self.number)
        self.end()

    def end(self) -> None:
        """End everything at once; connections are closed as they are when a process ends."""
        if self.is_on():
            processes = self.keeper.namespace("pid_for_children")
            self.keeper.kill()
            wait_until(lambda: not any(inhabitants(processes, "pid")), f"processes of {self.name} do not end")

    def _all(self) -> Iterator[Process]:
        namespace = self.keeper.namespace("pid_for_children")
        yield from inhabitants(namespace, "pid") if namespace else ()

    def _said(self) -> str:
        texts = [(self.own / name).read_text().strip() for name in ("log", "sshd.log") if (self.own / name).exists()]
        return "\n".join(texts)


def start_host(
    name: str,
    *,
    number: int,
    address: str,
    lab: Path,
    environment: Mapping[str, str],
    has_private_tmp: bool,
    leash: int | None,
) -> Host:
    """Start a host that is on no network yet.

    Args:
        name: its name.
        number: of its port in the switch.
        address: its address to be.
        lab: folder with the files that all hosts share.
        environment: variables that a login finds set; HOME is the host's own unless it is given.
        has_private_tmp: whether its /tmp is its own.
        leash: the host goes when this file descriptor ends.
    """
    own = lab / name
    (own / "home").mkdir(parents=True)
    environment = {"HOME": str(own / "home"), "PATH": _PATH, **environment}
    quoted = " ".join(f'"{key}={value}"' for key, value in environment.items())
    (own / "sshd_config").write_text(_SSHD_CONFIG.format(lab=lab, own=own, environment=quoted))
    (own / "hostname").write_text(f"{name}\n")
    options = ("private-tmp",) if has_private_tmp else ()
    init = (sys.executable, "-I", "-S", str(_INIT), str(lab), name, *options)
    unshare = ("unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc")
    keeper = spawn([*unshare, *init], log=own / "log", leash=leash)
    return Host(name=name, number=number, address=address, lab=lab, environment=environment, keeper=keeper)


def _is_sshd(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.startswith("sshd")
    except OSError:
        return False


def _command_line(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(os.fsdecode(word) for word in words if word)
