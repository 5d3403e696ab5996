"""What is wrong between hosts, judged from what they measured: pure functions, each yielding findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from launcher.doctor.facts import Contact, Everyone, Pair
from launcher.doctor.finding import Finding, error, warning
from launcher.wording import bytes_text

HIGH_LATENCY_S = 0.005
"""Inside of a building a round trip takes well under a millisecond."""
DISTANT_S = 0.05
"""Over such a link an all-reduce of any size is hopeless, and measuring it takes longer than all else together."""
LOW_BYTES_PER_S = 50 * 2**20
"""Less than half of what gigabit Ethernet carries."""
ODD_SHARE = 0.25
"""A pair with less than this share of the usual bandwidth is named."""


def port_rules(first: str, *, port: int | None, problem: str) -> Iterator[Finding]:
    """Yield that the first host cannot open the port of the rendezvous; ``None`` means any."""
    if port is None:
        yield error(first, f"no port can be opened for the rendezvous: {problem}", "see why no port is free there")
        return
    what = f"port {port} cannot be opened for the rendezvous: {problem}"
    yield error(first, what, "set backend.port=auto, or end what uses it")


def contact_rules(contacts: Mapping[str, Contact], *, port: int) -> Iterator[Finding]:
    """Yield what keeps hosts from the rendezvous, or slows them down.

    Args:
        contacts: by host; the first one is where the others meet.
        port: of the rendezvous.
    """
    first, *others = contacts
    unreached = [host for host in others if contacts[host].problem is not None]
    slow = [host for host in others if (contacts[host].latency_s or 0.0) > HIGH_LATENCY_S]
    yield from _unreached(first, unreached, contacts, port, is_everyone=len(unreached) == len(others) > 1)
    yield from _slow(first, slow, contacts, is_everyone=len(slow) == len(others) > 1)
    if contacts[first].problem is not None:
        yield error(first, f"{contacts[first].problem}", "mend the routes there: ip route get ADDRESS")
    for host, found in contacts.items():
        if others and found.local_address is not None and found.interface in (None, "lo"):
            what = f"its route to the other hosts begins at {found.local_address}, which no network interface has"
            if found.interface == "lo":
                what = f"its route to the other hosts leads to itself ({found.local_address})"
            yield error(host, what, "mend /etc/hosts or the routes there: ip route get ADDRESS")


def _unreached(
    first: str, hosts: Sequence[str], contacts: Mapping[str, Contact], port: int, *, is_everyone: bool
) -> Iterator[Finding]:
    remedy = f"open it in the firewall, or set backend.port to one that is open; try there: nc -vz {first} {port}"
    if is_everyone:
        what = f"no other host reaches its port {port}: {contacts[hosts[0]].problem}"
        yield error(first, what, remedy)
        return
    for host in hosts:
        yield error(host, f"cannot reach port {port} of {first}: {contacts[host].problem}", remedy)


def _slow(first: str, hosts: Sequence[str], contacts: Mapping[str, Contact], *, is_everyone: bool) -> Iterator[Finding]:
    remedy = "see whether it is on the same network, and whether the route takes a slow interface or a tunnel"
    if is_everyone:
        fastest = min(contacts[host].latency_s or 0.0 for host in hosts)
        yield warning(first, f"every other host needs {fastest * 1e3:.1f} ms or more for a round trip to it", remedy)
        return
    for host in hosts:
        latency = contacts[host].latency_s or 0.0
        via = f" over {contacts[host].interface}"
        yield warning(host, f"a round trip to {first} takes {latency * 1e3:.1f} ms{via}", remedy)


def pair_rules(pairs: Sequence[Pair]) -> Iterator[Finding]:
    """Yield pairs that cannot talk or talk slowly."""
    for pair in pairs:
        if pair.problem is not None:
            what = f"an all-reduce with {pair.hosts[0]} fails: {pair.problem}"
            yield error(
                pair.hosts[1], what, "open all TCP ports between the two hosts: ranks connect on ports of any number"
            )
    measured = [pair for pair in pairs if pair.problem is None]
    speeds = [pair.bytes_per_s for pair in measured if pair.bytes_per_s is not None]
    usual = median(speeds) if len(speeds) > 2 else 0.0
    for pair in measured:
        speed, latency = pair.bytes_per_s or 0.0, pair.latency_s or 0.0
        if speed < LOW_BYTES_PER_S or speed < usual * ODD_SHARE:
            known = f", the median of all pairs is {bytes_text(usual)}/s" if usual else ""
            what = f"an all-reduce with {pair.hosts[0]} carries {bytes_text(speed)}/s{known}"
            yield warning(
                pair.hosts[1], what, "see link speed and cables of both (ethtool), and what else uses the network"
            )
        elif latency > HIGH_LATENCY_S:
            what = f"an all-reduce with {pair.hosts[0]} takes {latency * 1e3:.1f} ms at least"
            yield warning(pair.hosts[1], what, "see the route between the two hosts, and what else runs there")


def everyone_rules(everyone: Mapping[str, Everyone], *, silent: Mapping[str, str]) -> Iterator[Finding]:
    """Yield hosts for which an all-reduce among all does not work.

    Args:
        everyone: what each host said, by name.
        silent: why others said nothing, by name.
    """
    for host, found in everyone.items():
        if found.problem is not None:
            yield error(host, f"an all-reduce among all hosts fails: {found.problem}", "see what torch says there")
    for host, why in silent.items():
        yield error(host, f"measured nothing: {why}", "see whether `import torch` works there, and how long it takes")
