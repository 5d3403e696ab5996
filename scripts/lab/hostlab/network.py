"""The lab's network: one bridge in a namespace of its own, a veth to every host and one to this machine.

    this machine ── lab10.77.0 ══ control ─┐
                                          br0   in the namespace of the switch
    host 1 ── eth0 ══ port1 ───────────────┤
    host 2 ── eth0 ══ port2 ───────────────┘

Nothing has a name outside the namespaces but the link ``lab<subnet>``, so two labs clash only over a subnet, and at
once. A link goes with either of its ends, and a namespace with its last process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from hostlab.process import LabError, Process

FIRST_ADDRESS = 11
"""Last number of the first host's address."""
MAX_HOSTS = 254 - FIRST_ADDRESS + 1


def inside(process: Process, *argv: str, given: str = "") -> str:
    """Run a command in the network namespace of ``process``; return what it prints.

    Raises:
        LabError: it failed.
    """
    return command("nsenter", f"--target={process.pid}", "--net", *argv, given=given)


def command(*argv: str, given: str = "") -> str:
    """Run a command of this machine with ``given`` on its stdin; return what it prints.

    Raises:
        LabError: it failed.
    """
    ended = subprocess.run(argv, input=given, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise LabError(f"{' '.join(argv)}: {ended.stderr.strip() or f'exit code {ended.returncode}'}")
    return ended.stdout


def control_link(subnet: str) -> str:
    """Return the name of this machine's link into a lab."""
    return f"lab{subnet}"


def attach_control(switch: Process, subnet: str) -> None:
    """Make the switch, and connect this machine to it.

    Raises:
        LabError: the subnet is in use.
    """
    link = control_link(subnet)
    if any(f" {subnet}." in line for line in command("ip", "-oneline", "-4", "address").splitlines()):
        raise LabError(f"the subnet {subnet}.0/24 is in use on this machine: choose another")
    _ip(None, [f"link add {link} type veth peer name control netns {switch.pid}"])
    _ip(None, [f"address add {subnet}.1/24 dev {link}", f"link set {link} up"])
    _ip(switch, ["link set lo up", "link add br0 type bridge", "link set br0 up", "link set control master br0 up"])


def attach_host(switch: Process, host: Process, *, number: int, address: str) -> None:
    """Connect a host to the switch."""
    port = port_of(number)
    _ip(switch, [f"link add {port} type veth peer name eth0 netns {host.pid}", f"link set {port} master br0 up"])
    _ip(host, ["link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up"])


def detach_host(switch: Process, *, number: int) -> None:
    """Unplug a host's cable: packets that it sends while it dies are lost."""
    inside(switch, "ip", "link", "delete", port_of(number))


def detach_control(subnet: str) -> None:
    """Remove this machine's link into a lab, if it is there."""
    link = control_link(subnet)
    if link in links():
        command("ip", "link", "delete", link)


def links() -> set[str]:
    """Return the names of this machine's links."""
    lines = command("ip", "-oneline", "link").splitlines()
    return {line.split()[1].rstrip(":").partition("@")[0] for line in lines}


def port_of(number: int) -> str:
    """Return the name of a host's port in the switch."""
    return f"port{number}"


def _ip(process: Process | None, lines: Sequence[str]) -> None:
    batch, text = ("ip", "-batch", "-"), "\n".join(lines) + "\n"
    if process is None:
        command(*batch, given=text)
    else:
        inside(process, *batch, given=text)
