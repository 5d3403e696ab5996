#!/usr/bin/env python3
"""Hosts for tests and for trying things out, on one machine: each is a set of namespaces with an sshd.

    scripts/lab/hosts.py up node 3 --slots 2   node1 node2 node3; says where their hostfile and ssh_config are
    ssh -F STATE/node/ssh_config node1         they know one another by name, and share the disk
    scripts/lab/hosts.py fault node2 cut       also: loss PERCENT, rate MBIT, block PORT, down, up, heal
    scripts/lab/hosts.py delay node2 100       what it sends and receives is 100 ms late, until this is ended
    scripts/lab/hosts.py kill node2            a power cut
    scripts/lab/hosts.py list
    scripts/lab/hosts.py down node

A host has its own network, address, name, processes, /dev/shm, /run and home. Needs root and, from Debian:
iproute2 nftables openssh-client openssh-server.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hostlab.lab import Lab, load, up
from hostlab.needs import missing
from hostlab.process import LabError


def main() -> None:
    """Do what the command line says."""
    arguments = _parser().parse_args()
    try:
        _do(arguments, Path(arguments.state).resolve())
    except LabError as error:
        sys.exit(f"hosts: {error}")


def _do(arguments: argparse.Namespace, state: Path) -> None:
    match arguments.verb:
        case "up":
            if (why := missing()) is not None:
                raise LabError(why)
            lab = up(
                state / arguments.prefix,
                arguments.prefix,
                arguments.num_hosts,
                subnet=arguments.subnet,
                slots=arguments.slots,
                has_private_tmp=arguments.private_tmp,
            )
            print(f"hostfile:   {lab.hostfile}\nssh config: {lab.ssh_config}")
        case "down":
            if (found := load(state / arguments.prefix)) is not None:
                found.down()
        case "list":
            for lab in _labs(state):
                for host in lab.hosts.values():
                    print(f"{host.name}\t{host.address}\t{'on' if host.is_on() else 'off'}\t{host.own}")
        case "kill":
            _lab_of(state, arguments.host).power_off(arguments.host)
        case "fault" if arguments.kind == "heal":
            _lab_of(state, arguments.host).heal(arguments.host)
        case "fault":
            _lab_of(state, arguments.host).fault(arguments.host, arguments.kind, arguments.amount)
        case "delay":
            relay = _lab_of(state, arguments.host).relay(arguments.host, arguments.ms)
            os.execvp(relay[0], relay)  # noqa: S606


def _labs(state: Path) -> Iterator[Lab]:
    for folder in sorted(state.glob("*/")):
        if (lab := load(folder)) is not None:
            yield lab


def _lab_of(state: Path, host: str) -> Lab:
    found = [lab for lab in _labs(state) if host in lab.hosts]
    if not found:
        raise LabError(f"no lab below {state} has a host {host}")
    return found[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("LAB_STATE") or Path(tempfile.gettempdir()) / "launcher-lab"
    parser.add_argument("--state", default=default, help="folder of all labs; LAB_STATE, else in the temporary folder")
    verbs = parser.add_subparsers(dest="verb", required=True)
    start = verbs.add_parser("up", help="start hosts")
    start.add_argument("prefix", help="of their names")
    start.add_argument("num_hosts", type=int)
    start.add_argument("--subnet", default="10.77.0", help="first three numbers of their addresses")
    start.add_argument("--slots", type=int, default=1, help="of each, in the hostfile")
    start.add_argument("--private-tmp", action="store_true", help="each gets its own /tmp")
    verbs.add_parser("down", help="end hosts, all of a prefix").add_argument("prefix")
    verbs.add_parser("list", help="show all hosts")
    verbs.add_parser("kill", help="take the power of a host away").add_argument("host")
    fault = verbs.add_parser("fault", help="disturb a host's network")
    fault.add_argument("host")
    fault.add_argument("kind", choices=["cut", "down", "up", "loss", "rate", "block", "heal"])
    fault.add_argument("amount", type=float, nargs="?", help="percent, megabits a second, a TCP port")
    delay = verbs.add_parser("delay", help="make a host's network slow to answer")
    delay.add_argument("host")
    delay.add_argument("ms", type=float, help="milliseconds, each way")
    return parser


if __name__ == "__main__":
    main()
