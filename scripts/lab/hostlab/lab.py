"""A lab: hosts on a network of their own, the files that describe them, and everything that can be done to them."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hostlab import faults
from hostlab.host import Host, start_host
from hostlab.network import FIRST_ADDRESS, MAX_HOSTS, attach_control, attach_host, command, detach_control
from hostlab.process import LabError, Process, inhabitants, spawn, wait_until

_RELAY = Path(__file__).with_name("delay.py")
_STATE = "lab.json"

_SSH_CONFIG = """\
Host {name}
  HostName {address}
  HostKeyAlias {name}
"""
_SSH_CONFIG_OF_ALL = """\
Host *
  User root
  IdentityFile {lab}/id
  IdentitiesOnly yes
  UserKnownHostsFile {lab}/known_hosts
  GlobalKnownHostsFile /dev/null
  LogLevel ERROR
"""


@dataclass(kw_only=True)
class Lab:
    """Hosts that are up, or were."""

    folder: Path
    subnet: str
    """The first three numbers of the addresses."""
    switch: Process
    """Holds the namespace of the bridge."""
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the hosts, in order."""
        return list(self.hosts)

    @property
    def hostfile(self) -> Path:
        """A hostfile with all hosts."""
        return self.folder / "hostfile"

    @property
    def ssh_config(self) -> Path:
        """For ``ssh -F``: with it the names of hosts work from this machine, as they do on the hosts without it."""
        return self.folder / "ssh_config"

    def address(self, name: str) -> str:
        """Return the address of a host."""
        return self._host(name).address

    def command(self, name: str, argv: Sequence[str]) -> list[str]:
        """Return the command that runs ``argv`` on a host; see :meth:`Host.command`."""
        return self._host(name).command(argv)

    def run(self, name: str, argv: Sequence[str], *, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run ``argv`` on a host and wait; works also when its network does not. ``timeout`` is in seconds."""
        command = self.command(name, argv)
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )

    def processes(self, name: str) -> dict[int, str]:
        """Return what runs on a host besides its system; see :meth:`Host.processes`."""
        return self._host(name).processes()

    def fault(self, name: str, kind: str, amount: float | None = None) -> None:
        """Disturb a host's network.

        Args:
            name: of the host.
            kind: ``cut``, ``down``, ``up``; ``loss``, ``rate`` and ``block`` take a number.
            amount: percent, megabits a second, a TCP port.

        Raises:
            LabError: there is no such fault, or the number is missing or too much.
        """
        keeper = self._host(name).keeper
        if kind in faults.PLAIN and amount is None:
            faults.PLAIN[kind](keeper)
        elif kind in faults.MEASURED and amount is not None:
            faults.MEASURED[kind](keeper, amount)
        else:
            kinds = [*faults.PLAIN, *(f"{kind} NUMBER" for kind in faults.MEASURED)]
            asked = kind if amount is None else f"{kind} {amount:g}"
            raise LabError(f"no such fault: {asked}; choose of {', '.join(kinds)}")

    def heal(self, name: str) -> None:
        """Undo the faults of a host's network."""
        faults.heal(self._host(name).keeper)

    @contextlib.contextmanager
    def delay(self, name: str, ms: float) -> Iterator[None]:
        """Delay what a host sends and what it receives by ``ms`` milliseconds each, for as long as this is entered."""
        with subprocess.Popen([*self.relay(name, ms), "leash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as relay:
            try:
                if not relay.stdout or relay.stdout.readline() != b"ready\n":
                    raise LabError(f"{name} cannot be delayed: the relay did not start")
                yield
            finally:
                relay.terminate()

    def relay(self, name: str, ms: float) -> list[str]:
        """Return the command that delays a host until it is ended."""
        enter = ("nsenter", f"--target={self.switch.pid}", "--net")
        program = (sys.executable, "-I", "-S", str(_RELAY))
        return [*enter, *program, f"port{self._host(name).number}", str(ms), str(self.switch.pid)]

    def power_off(self, name: str) -> None:
        """Power a host off: no process of it is left, and its peers receive nothing."""
        self._host(name).power_off(self.switch)

    def kill_sshd(self, name: str) -> None:
        """Kill a host's ssh server and its sessions."""
        self._host(name).kill_sshd()

    def down(self) -> None:
        """End every process of the lab and remove its links and files; nothing happens when that was done before."""
        detach_control(self.subnet)
        for host in self.hosts.values():
            host.end()
        if network := self.switch.namespace("net"):
            for process in inhabitants(network, "net"):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self) -> None:
        """Write down what is needed to end the lab."""
        (self.folder / _STATE).write_text(json.dumps(asdict(self), default=str, indent=1))

    def _host(self, name: str) -> Host:
        if name not in self.hosts:
            raise LabError(f"no host is {name}: there are {', '.join(self.hosts)}")
        return self.hosts[name]


def load(folder: Path) -> Lab | None:
    """Return the lab of a folder, or None where there is none."""
    try:
        kept = json.loads((folder / _STATE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    lab = Lab(folder=folder, subnet=kept["subnet"], switch=Process(**kept["switch"]))
    for name, host in kept["hosts"].items():
        lab.hosts[name] = Host(**{**host, "lab": folder, "keeper": Process(**host["keeper"])})
    return lab


def up(
    folder: Path,
    prefix: str,
    num_hosts: int,
    *,
    subnet: str = "10.77.0",
    slots: int = 1,
    has_private_tmp: bool = False,
    environment: Mapping[str, str] | None = None,
    leash: int | None = None,
) -> Lab:
    """Start hosts ``<prefix>1`` … and return them once all can be logged in to.

    Args:
        folder: for their files; made here.
        prefix: of their names.
        num_hosts: how many.
        subnet: first three numbers of their addresses; host k is at ``subnet.(10+k)``, this machine at ``subnet.1``.
        slots: of each host, in the hostfile.
        has_private_tmp: whether every host has a /tmp of its own.
        environment: variables that a login finds set.
        leash: a file descriptor; when what it reads from ends, so does the lab.

    Raises:
        LabError: the lab exists, the subnet is in use, or something did not start. Nothing is left then.
    """
    if not 1 <= num_hosts <= MAX_HOSTS:
        raise LabError(f"{num_hosts} hosts do not fit into one subnet: choose 1 to {MAX_HOSTS}")
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise LabError(f"{folder} exists: take that lab down first") from error
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        addresses = {f"{prefix}{k}": f"{subnet}.{FIRST_ADDRESS + k - 1}" for k in range(1, num_hosts + 1)}
        _write_files(folder, addresses, subnet=subnet, slots=slots)
        lab = Lab(
            folder=folder, subnet=subnet, switch=spawn(["unshare", "--net", "cat"], log=folder / "log", leash=leash)
        )
        undo.callback(lab.down)
        for number, (name, address) in enumerate(addresses.items(), start=1):
            lab.hosts[name] = start_host(
                name,
                number=number,
                address=address,
                lab=folder,
                environment=environment or {},
                has_private_tmp=has_private_tmp,
                leash=leash,
            )
            lab.save()
        _wait_for_namespaces(lab)
        attach_control(lab.switch, subnet)
        for host in lab.hosts.values():
            attach_host(lab.switch, host.keeper, number=host.number, address=host.address)
        for host in lab.hosts.values():
            host.wait_until_up()
        undo.pop_all()
    return lab


def _write_files(folder: Path, addresses: Mapping[str, str], *, subnet: str, slots: int) -> None:
    for key in ("id", "hostkey"):
        command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(folder / key))
    lines = {"127.0.0.1": "localhost", f"{subnet}.1": "control", **{value: key for key, value in addresses.items()}}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in lines.items()))
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")  # no DNS waits
    config = "".join(_SSH_CONFIG.format(name=name, address=address) for name, address in addresses.items())
    (folder / "ssh_config").write_text(config + _SSH_CONFIG_OF_ALL.format(lab=folder))
    public = (folder / "hostkey.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{name} {public}" for name in addresses))
    (folder / "hostfile").write_text("".join(f"{name} slots={slots}\n" for name in addresses))


def _wait_for_namespaces(lab: Lab) -> None:
    """Wait until the switch and every host have left this machine's network."""
    here = str(Path("/proc/self/ns/net").readlink())
    processes = (lab.switch, *(host.keeper for host in lab.hosts.values()))
    wait_until(lambda: all(process.namespace("net") != here for process in processes), "there are no namespaces yet")
    for process in processes:
        if not process.is_alive():
            logs = "\n".join(log.read_text() for log in sorted(lab.folder.glob("**/log")))
            raise LabError(f"a process of the lab ended early: {logs.strip()}")
