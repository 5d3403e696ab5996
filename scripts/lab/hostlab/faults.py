"""What can go wrong with a host's network. This is done to the host's end, so it hits connections from everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from hostlab.network import inside
from hostlab.process import LabError, Process

_TABLE = "inet lab"


def cut(host: Process) -> None:
    """Let nothing in or out, without a word: the link stays up and no connection is refused."""
    _filter(host, 'iifname "eth0" drop', 'oifname "eth0" drop')


def loss(host: Process, percent: float) -> None:
    """Lose so many of the packets that arrive."""
    _filter(host, f'iifname "eth0" numgen random mod 1000 < {round(percent * 10)} drop')


def block(host: Process, port: float) -> None:
    """Drop what arrives for one TCP port, as a firewall does."""
    _filter(host, f'iifname "eth0" tcp dport {round(port)} drop')


def rate(host: Process, megabits: float) -> None:
    """Send no faster than so many megabits a second."""
    shape = ("tbf", "rate", f"{megabits}mbit", "burst", "64kb", "latency", "400ms")
    inside(host, "tc", "qdisc", "replace", "dev", "eth0", "root", *shape)


def down(host: Process) -> None:
    """Take the link down; the host notices."""
    inside(host, "ip", "link", "set", "eth0", "down")


def up(host: Process) -> None:
    """Bring the link up again."""
    inside(host, "ip", "link", "set", "eth0", "up")


PLAIN: Mapping[str, Callable[[Process], None]] = {"cut": cut, "down": down, "up": up}
MEASURED: Mapping[str, Callable[[Process, float], None]] = {"loss": loss, "rate": rate, "block": block}
"""These take a number: percent, megabits a second, a port."""


def heal(host: Process) -> None:
    """Undo every fault but a delay, which ends with its relay."""
    _clear(host)
    with contextlib.suppress(LabError):  # there is none
        inside(host, "tc", "qdisc", "delete", "dev", "eth0", "root")
    up(host)


def _filter(host: Process, arriving: str, leaving: str = "") -> None:
    """Replace the host's filter by one with these two rules."""
    _clear(host)
    hooks = {"input": arriving, "output": leaving}
    chains = [f"chain {hook} {{ type filter hook {hook} priority 0; {rule}\n}}" for hook, rule in hooks.items()]
    inside(host, "nft", "-f", "-", given=f"table {_TABLE} {{\n" + "\n".join(chains) + "\n}\n")


def _clear(host: Process) -> None:
    inside(host, "nft", "-f", "-", given=f"table {_TABLE}\ndelete table {_TABLE}\n")
