"""Examine hosts: facts, contacts and all-reduces, step by step, under one deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from launcher.doctor.host_facts import DiskToken, code_hash, collect_plugin, create_disk_token
from launcher.doctor.probe_client import ProbeClient
from launcher.doctor.probe_failure import explain_probe_failure
from launcher.doctor.protocol import Contact, GroupMeasurement, HostFacts, PairMeasurement, ProbeRequest
from launcher.doctor.report import DoctorReport, Finding, Level, error, probed_host
from launcher.doctor.rules import DISTANT_S, contact_rules, group_rules, host_rules, pair_rules, port_rules
from launcher.errors import ConfigError
from launcher.protocol.plan import Host
from launcher.remote.command import RemoteCommand
from launcher.utils.schema import build

QUICK_S, FULL_S = 20.0, 60.0
"""Deadlines for a few hosts; most of the full one is for importing torch from a slow disk."""
PER_HOST_S = 0.05
"""Added per host: a handshake of ssh takes some 20 ms of CPU time on the launching machine."""
_REACH_S, _REACH_SHARE = 10.0, 0.6
"""Time to reach hosts, and its maximum share of the deadline; a dead host takes all of it."""
_FACTS_S, _FACTS_SHARE = 20.0, 0.8
"""The same for the facts of hosts that have been reached."""
_CONTACT_S = 4.0
_LIFE_S = 5.0
"""Probes exit by themselves this long after the deadline, in case the network is cut."""
_THIS_MACHINE = "this machine"
T = TypeVar("T")
_CLOSE_PORT_S = 2.0
_MAX_CLOCK_S = 1e12
"""Largest plausible time since 1970; NaN compares as false."""
_MARGIN_S = 0.5
"""Hosts time out this much earlier than the doctor, so that their answers arrive."""


def default_deadline_s(num_hosts: int, *, quick: bool) -> float:
    """Return the default deadline for a number of hosts."""
    return (QUICK_S if quick else FULL_S) + PER_HOST_S * num_hosts


def examine_hosts(
    hosts: Sequence[Host],
    remote: Callable[[Host, str], RemoteCommand],
    request: ProbeRequest,
    *,
    quick: bool,
    deadline_s: float,
) -> DoctorReport:
    """Examine ``hosts``, end all probes, and return the report.

    Args:
        hosts: in the order of ranks; names are unique.
        remote: how to run a module on one of them.
        request: requirements of the run.
        quick: whether to skip the all-reduces, for which torch must be imported. They are also skipped after errors.
        deadline_s: for everything; a host that does not answer in time is a finding.
    """
    started = time.monotonic()
    deadline = started + deadline_s
    local_code_hash = code_hash()  # first, because the files may be edited meanwhile
    local_plugins = [collect_plugin(module) for module in request.plugins]
    checked, measured = CheckedContacts(), AllReduceResults()
    with create_disk_token(Path(request.run_dir)) as token, ProbeClient(hosts, remote) as client:
        collected = collect_facts(
            client,
            request,
            token=token.path,
            is_full=not quick,
            life_s=deadline_s + _LIFE_S,
            until=started + min(_REACH_SHARE * deadline_s, _REACH_S + PER_HOST_S * len(hosts)),
            facts_until=started + min(_FACTS_SHARE * deadline_s, _FACTS_S + PER_HOST_S * len(hosts)),
        )
        waited_s = time.monotonic() - started
        if collected.facts:
            addresses = {
                host.name: probed_host(host, collected.facts[host.name]).address
                for host in hosts
                if host.name in collected.facts
            }
            checked = probe_contacts(
                client, addresses, port=request.port, until=min(deadline, time.monotonic() + _CONTACT_S)
            )
        findings = [
            *([] if token.problem is None else [_unwritable(token)]),
            *host_rules(
                hosts, collected.facts, skews_s=collected.skews_s, code_hash=local_code_hash, plugins=local_plugins
            ),
            *_contact_findings(checked, port=request.port),
        ]
        is_fit = len(collected.facts) == len(hosts) and not any(found.level is Level.ERROR for found in findings)
        if is_fit and not quick:
            measured = measure_all_reduces(client, collected.facts, checked, until=deadline)
    findings += _probe_failures(hosts, client, collected, waited_s=waited_s)
    findings += pair_rules(measured.pairs)
    findings += group_rules(measured.group, silent=measured.silent)
    return DoctorReport(
        findings=_sorted(findings, hosts),
        hosts=tuple(hosts),
        facts=collected.facts,
        skews_s=collected.skews_s,
        contacts=checked.contacts,
        port=checked.port,
        is_full=not quick,
        pairs=measured.pairs,
        group=measured.group,
        elapsed_s=time.monotonic() - started,
    )


def _probe_failures(
    hosts: Sequence[Host], client: ProbeClient, collected: CollectedFacts, *, waited_s: float
) -> Iterator[Finding]:
    """Yield why probes sent no facts, once their commands have exited."""
    for host in hosts:
        if host.name in client.not_started:
            yield error(
                host.name, f"nothing can be started for it: {client.not_started[host.name]}", "install that here"
            )
        elif host.name in collected.incompatible:
            remedy = "install the version of this machine there, or set backend.code=sent"
            yield error(host.name, "runs an incompatible version of launcher", remedy)
        elif host.name not in collected.facts:
            probe = client.probes[host.name]
            yield explain_probe_failure(
                host,
                probe.stderr_tail,
                exit_code=probe.exit_code,
                has_started=any(client.messages_of(host.name, "hello")),
                waited_s=waited_s,
            )


def _contact_findings(checked: CheckedContacts, *, port: int | None) -> Iterator[Finding]:
    if checked.port is not None:
        yield from contact_rules(checked.contacts, port=checked.port)
    elif checked.contacts:
        yield from port_rules(next(iter(checked.contacts)), port=port, problem=checked.problem or "")


def _unwritable(token: DiskToken) -> Finding:
    what = f"nothing can be written to the run directory: {token.folder}: {token.problem}"
    return error(_THIS_MACHINE, what, "set run.root to a writable folder")


def _sorted(findings: Sequence[Finding], hosts: Sequence[Host]) -> tuple[Finding, ...]:
    order = {host.name: number for number, host in enumerate(hosts)}
    return tuple(sorted(findings, key=lambda found: (found.level is not Level.ERROR, order.get(found.host, -1))))


@dataclass(frozen=True, kw_only=True)
class CollectedFacts:
    """Facts of the hosts that answered."""

    facts: dict[str, HostFacts]
    """In the order of hosts."""
    skews_s: dict[str, float]
    incompatible: tuple[str, ...]
    """Hosts whose answer this version cannot read."""


@dataclass(frozen=True, kw_only=True)
class CheckedContacts:
    """Contacts of all hosts with the first one that answered, which comes first."""

    address: str = ""
    """Address of the first host."""
    contacts: dict[str, Contact] = field(default_factory=dict)
    port: int | None = None
    problem: str | None = None
    """Why the port cannot be opened."""

    @property
    def near(self) -> tuple[str, ...]:
        """The first host and those with a low latency to it."""
        return tuple(name for name, found in self.contacts.items() if (found.latency_s or 0.0) < DISTANT_S)


@dataclass(frozen=True, kw_only=True)
class AllReduceResults:
    """Measurements of all-reduces."""

    pairs: tuple[PairMeasurement, ...] = ()
    group: dict[str, GroupMeasurement] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    """Why hosts measured nothing."""


def collect_facts(
    client: ProbeClient,
    request: ProbeRequest,
    *,
    token: str | None,
    is_full: bool,
    life_s: float,
    until: float,
    facts_until: float,
) -> CollectedFacts:
    """Request the facts of every host.

    Args:
        client: with a probe per host.
        request: requirements of the run.
        token: path of the file whose existence hosts check.
        is_full: whether hosts should prepare all-reduces.
        life_s: time after which probes exit in any case.
        until: deadline on the monotonic clock.
        facts_until: the same for hosts whose probe has started: many GPUs, or a slow disk, take a while.
    """
    message = {
        "ask": "facts",
        "run_dir": request.run_dir,
        "token": token,
        **({"plugins": list(request.plugins)} if request.plugins else {}),
        "is_full": is_full,
        "life_s": life_s,
    }
    for name in client.probes:
        client.ask(name, message)
    answers = client.collect("facts", client.probes, until=until)
    late = [name for name in client.probes if name not in answers and any(client.messages_of(name, "hello"))]
    answers |= client.collect("facts", late, until=facts_until)
    read = {name: _facts_in(answers[name]) for name in client.probes if name in answers}
    return CollectedFacts(
        facts={name: facts for name, facts in read.items() if facts is not None},
        skews_s={
            name: answers[name]["clock"] - answers[name]["received_at"]
            for name, facts in read.items()
            if facts is not None
        },
        incompatible=tuple(name for name, facts in read.items() if facts is None),
    )


def probe_contacts(
    client: ProbeClient, addresses: Mapping[str, str], *, port: int | None, until: float
) -> CheckedContacts:
    """Open the port on the first host and connect to it from the others.

    Args:
        client: with a probe per host.
        addresses: of the hosts that answered, by name.
        port: to open; ``None`` for any free one.
        until: deadline on the monotonic clock.
    """
    first, *others = addresses
    client.ask(first, {"ask": "listen", "port": port})
    opened = client.collect("listen", [first], until=until).get(first, {"port": None, "problem": "no answer in time"})
    address = addresses[first]
    towards = addresses[others[0]] if others else address
    timeout_s = max(0.1, until - time.monotonic() - _MARGIN_S)
    client.ask(first, {"ask": "contact", "address": towards, "port": None, "timeout_s": timeout_s})
    for name in others:
        client.ask(name, {"ask": "contact", "address": address, "port": opened["port"], "timeout_s": timeout_s})
    answers = client.collect("contact", addresses, until=until)
    no_contact = Contact(interface=None, local_address=None, latency_s=None, problem="no answer in time")
    contacts = {name: _decoded(Contact, answers.get(name, {}).get("contact")) or no_contact for name in addresses}
    return CheckedContacts(address=address, contacts=contacts, port=opened["port"], problem=opened["problem"])


def measure_all_reduces(
    client: ProbeClient, facts: Mapping[str, HostFacts], checked: CheckedContacts, *, until: float
) -> AllReduceResults:
    """Measure all-reduces among the hosts with a low latency to the first one.

    Args:
        client: with a probe per host, prepared for all-reduces.
        facts: of these hosts.
        checked: contacts, and a port that all of them reach.
        until: deadline on the monotonic clock.
    """
    names = checked.near
    first = next(iter(checked.contacts))
    client.ask(first, {"ask": "close_port"})
    client.collect("close_port", [first], until=min(until, time.monotonic() + _CLOSE_PORT_S))
    for rank, name in enumerate(names):
        order = {
            "rank": rank,
            "names": names,
            "address": checked.address,
            "port": checked.port,
            "interface": checked.contacts[name].interface,
            "uses_gpus": all(facts[name].devices for name in names),
            "timeout_s": max(1.0, until - time.monotonic() - _MARGIN_S),
        }
        client.ask(name, {"ask": "collective", "order": order})
    exited = client.collect("collective", names, until=until)
    pairs = [
        _decoded(PairMeasurement, message["pair"]) for name in names for message in client.messages_of(name, "pair")
    ]
    group = {
        name: _decoded(GroupMeasurement, message["group"])
        for name in names
        for message in client.messages_of(name, "group")
    }
    order_of = {name: number for number, name in enumerate(names)}
    found = {pair.hosts: pair for pair in pairs if pair is not None and order_of.keys() >= set(pair.hosts)}
    return AllReduceResults(
        pairs=tuple(sorted(found.values(), key=lambda pair: [order_of[name] for name in pair.hosts])),
        group={name: found for name, found in group.items() if found is not None},
        silent=_silent(client, names, exited),
    )


def _silent(client: ProbeClient, names: Sequence[str], exited: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    silent = {}
    for name in names:
        if name not in exited:
            silent[name] = "no answer in time" if client.probes[name].is_open else "the connection was lost"
        elif exited[name]["exit_code"] != 0:
            last = (client.probes[name].stderr_tail.strip().splitlines() or ["no output"])[-1]
            silent[name] = f"exit code {exited[name]['exit_code']}: {last[:300]}"
    return silent


def _facts_in(answer: Mapping[str, Any]) -> HostFacts | None:
    """Return the facts in an answer; ``None`` when this version cannot read them."""
    clock = answer.get("clock")
    is_time = isinstance(clock, int | float) and abs(clock) < _MAX_CLOCK_S
    return _decoded(HostFacts, answer.get("facts")) if is_time else None


def _decoded(cls: type[T], tree: Any) -> T | None:
    ignored: list[ConfigError] = []
    return build(cls, tree, path="facts", report=ignored.append) if isinstance(tree, Mapping) else None
