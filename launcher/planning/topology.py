"""Where each rank runs, and groups of hosts with equal plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.protocol.plan import Host, HostPlan, RankPlacement, first_ranks


def rank_places(hosts: Sequence[Host]) -> Iterator[RankPlacement]:
    """Yield where each rank runs, in the order of ranks."""
    for host, first in zip(hosts, first_ranks(hosts), strict=True):
        for local_rank in range(host.slots):
            device = f"cuda:{local_rank}" if host.devices else "cpu" if host.is_probed else "?"
            yield RankPlacement(rank=first + local_rank, host=host.name, local_rank=local_rank, device=device)


@dataclass(frozen=True, kw_only=True)
class HostGroup:
    """Consecutive hosts with equal plans."""

    first: HostPlan
    last: HostPlan
    number: int
    """Number of the first, from 0."""
    size: int
    varying: tuple[str, ...] = ()
    """Flags and variables that hold the host's number or name (``--node-rank``)."""

    @property
    def name(self) -> str:
        """The host's name, or the first and the last."""
        if self.size == 1:
            return self.first.host.name
        return f"{self.first.host.name} … {self.last.host.name} ({self.size:,} hosts)"


def group_hosts(hosts: Sequence[HostPlan]) -> list[HostGroup]:
    """Return ``hosts`` as groups, in order.

    Every host is compared once, with the first of its group.
    """
    groups: list[HostGroup] = []
    for number, host in enumerate(hosts):
        varying = _varying(groups[-1], host, number) if groups else None
        if varying is None:
            groups.append(HostGroup(first=host, last=host, number=number, size=1))
        else:
            groups[-1] = dataclasses.replace(groups[-1], last=host, size=groups[-1].size + 1, varying=varying)
    return groups


def _varying(group: HostGroup, other: HostPlan, number: int) -> tuple[str, ...] | None:
    """Return the fields that vary once ``other`` joins; ``None`` if the hosts differ in more.

    Hosts of one group may differ in their number and name only.
    """
    mine, yours = list(_words(group.first)), list(_words(other))
    if _shape(group.first.host) != _shape(other.host) or [m[0] for m in mine] != [y[0] for y in yours]:
        return None
    varying = list(group.varying)
    follows = {(str(group.number), str(number)), (group.first.host.name, other.host.name)}
    for (label, left), (_, right) in zip(mine, yours, strict=True):
        if left == right:
            continue
        if (left, right) not in follows:
            return None
        if label not in varying:
            varying.append(label)
    return tuple(varying)


def _shape(host: Host) -> Host:
    return dataclasses.replace(host, name="", address="", ssh_destination="")


def _words(plan: HostPlan) -> Iterator[tuple[str, str]]:
    """Yield (flag or variable, value) of everything in the host's commands."""
    for command in (*plan.build_commands, plan.agent_command, *plan.sidecars):
        yield from command.env.items()
        flag = ""
        for word in command.argv:
            name, equals, value = word.partition("=")
            if word.startswith("-"):
                flag = name
                yield flag, value if equals else ""
            else:
                yield flag, word
