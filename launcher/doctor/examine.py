"""Examine hosts: facts, contacts and all-reduces, step by step, under one deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from launcher.doctor.host_facts import DiskToken, code_hash, token
from launcher.doctor.probe_client import ProbeClient
from launcher.doctor.probe_failure import explain_probe_failure
from launcher.doctor.protocol import Contact, GroupMeasurement, HostFacts, PairMeasurement, ProbeRequest
from launcher.doctor.report import DoctorReport, Finding, Level, error, known_host
from launcher.doctor.rules import DISTANT_S, contact_rules, everyone_rules, host_rules, pair_rules, port_rules
from launcher.errors import ConfigError
from launcher.protocol.plan import Host
from launcher.remote.command import RemoteCommand
from launcher.utils.schema import build

QUICK_S, FULL_S = 20.0, 60.0
"""Deadlines for a few hosts. Nearly all of the full one is for importing torch from a slow disk."""


PER_HOST_S = 0.05
"""Added for each host: a handshake of ssh costs the launching machine's processor some 20 ms."""


_REACH_S, _REACH_SHARE = 10.0, 0.6
"""Time to reach hosts, and the most of the deadline that may be; a dead one takes it all."""


_TELL_S, _TELL_SHARE = 20.0, 0.8
"""The same for hosts that are reached, to tell about themselves."""


_MEET_S = 4.0


_LIFE_S = 5.0
"""Probes end themselves so long after the deadline, where a cut network keeps our own end from reaching them."""


_US = "this machine"


T = TypeVar("T")


_HUSH_S = 2.0


_LATEST_S = 1e12
"""No clock of a host says more seconds since 1970; NaN compares as false."""


_MARGIN_S = 0.5
"""Hosts give up so much earlier than we do, for what they say to arrive."""


def usual_deadline_s(num_hosts: int, *, quick: bool) -> float:
    """Return a deadline for so many hosts."""
    return (QUICK_S if quick else FULL_S) + PER_HOST_S * num_hosts


def examine_hosts(
    hosts: Sequence[Host],
    remote: Callable[[Host, str], RemoteCommand],
    request: ProbeRequest,
    *,
    quick: bool,
    deadline_s: float,
) -> DoctorReport:
    """Examine ``hosts``, end everything that was started for it, and return what was found.

    Args:
        hosts: in the order of ranks; names are unique.
        remote: how to run a module on one of them.
        request: what the run will need.
        quick: whether to leave out the all-reduces, for which torch must be imported. Hosts that are unfit already are
            not measured either: their faults are told the sooner.
        deadline_s: for all of it; a host that says nothing in time is a finding like any other.
    """
    started = time.monotonic()
    ends = started + deadline_s
    our_code = code_hash()  # now: someone may be editing it
    met, measured = CheckedContacts(), AllReduceResults()
    with token(Path(request.run_dir)) as ours, ProbeClient(hosts, remote) as talk:
        surveyed = collect_facts(
            talk,
            request,
            token=ours.path,
            is_full=not quick,
            life_s=deadline_s + _LIFE_S,
            until=started + min(_REACH_SHARE * deadline_s, _REACH_S + PER_HOST_S * len(hosts)),
            patience=started + min(_TELL_SHARE * deadline_s, _TELL_S + PER_HOST_S * len(hosts)),
        )
        waited_s = time.monotonic() - started
        if surveyed.facts:
            addresses = {
                host.name: known_host(host, surveyed.facts[host.name]).address
                for host in hosts
                if host.name in surveyed.facts
            }
            met = check_contacts(talk, addresses, port=request.port, until=min(ends, time.monotonic() + _MEET_S))
        findings = [
            *([] if ours.problem is None else [_not_ours(ours)]),
            *host_rules(hosts, surveyed.facts, skews_s=surveyed.skews_s, code_hash=our_code),
            *_meeting(met, port=request.port),
        ]
        is_fit = len(surveyed.facts) == len(hosts) and not any(found.level is Level.ERROR for found in findings)
        if is_fit and not quick:
            measured = measure_all_reduces(talk, surveyed.facts, met, until=ends)
    findings += _refusals(hosts, talk, surveyed, waited_s=waited_s)
    findings += pair_rules(measured.pairs)
    findings += everyone_rules(measured.everyone, silent=measured.silent)
    return DoctorReport(
        findings=_sorted(findings, hosts),
        hosts=tuple(hosts),
        facts=surveyed.facts,
        skews_s=surveyed.skews_s,
        contacts=met.contacts,
        port=met.port,
        is_full=not quick,
        pairs=measured.pairs,
        everyone=measured.everyone,
        elapsed_s=time.monotonic() - started,
    )


def _refusals(
    hosts: Sequence[Host], talk: ProbeClient, surveyed: CollectedFacts, *, waited_s: float
) -> Iterator[Finding]:
    """Yield why hosts gave no facts, once their commands have ended."""
    for host in hosts:
        if host.name in talk.not_started:
            yield error(host.name, f"nothing can be started for it: {talk.not_started[host.name]}", "install that here")
        elif host.name in surveyed.strangers:
            remedy = "install the version of this machine there, or set backend.code=sent"
            yield error(host.name, "speaks like another version of launcher", remedy)
        elif host.name not in surveyed.facts:
            channel = talk.channels[host.name]
            yield explain_probe_failure(
                host,
                channel.complaint,
                exit_code=channel.exit_code,
                said_hello=any(talk.told(host.name, "hello")),
                waited_s=waited_s,
            )


def _meeting(met: CheckedContacts, *, port: int | None) -> Iterator[Finding]:
    if met.port is not None:
        yield from contact_rules(met.contacts, port=met.port)
    elif met.contacts:
        yield from port_rules(next(iter(met.contacts)), port=port, problem=met.problem or "")


def _not_ours(ours: DiskToken) -> Finding:
    what = f"nothing can be written to the run directory: {ours.folder}: {ours.problem}"
    return error(_US, what, "set run.root to a folder of yours")


def _sorted(findings: Sequence[Finding], hosts: Sequence[Host]) -> tuple[Finding, ...]:
    places = {host.name: place for place, host in enumerate(hosts)}
    return tuple(sorted(findings, key=lambda found: (found.level is not Level.ERROR, places.get(found.host, -1))))


@dataclass(frozen=True, kw_only=True)
class CollectedFacts:
    """What hosts told about themselves."""

    facts: dict[str, HostFacts]
    """In the order of hosts."""
    skews_s: dict[str, float]
    strangers: tuple[str, ...]
    """Hosts whose answer cannot be read: another version."""


@dataclass(frozen=True, kw_only=True)
class CheckedContacts:
    """How hosts reach the first one that answered, which stands first."""

    address: str = ""
    """Of the first one."""
    contacts: dict[str, Contact] = field(default_factory=dict)
    port: int | None = None
    problem: str | None = None
    """Why the port cannot be opened."""

    @property
    def near(self) -> tuple[str, ...]:
        """The first host, and those that are not far from it."""
        return tuple(name for name, found in self.contacts.items() if (found.latency_s or 0.0) < DISTANT_S)


@dataclass(frozen=True, kw_only=True)
class AllReduceResults:
    """All-reduces."""

    pairs: tuple[PairMeasurement, ...] = ()
    everyone: dict[str, GroupMeasurement] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    """Why hosts measured nothing."""


def collect_facts(
    talk: ProbeClient,
    request: ProbeRequest,
    *,
    token: str | None,
    is_full: bool,
    life_s: float,
    until: float,
    patience: float,
) -> CollectedFacts:
    """Ask every host about itself.

    Args:
        talk: with all hosts.
        request: what the run will need.
        token: the file to look for.
        is_full: whether hosts should get ready to measure.
        life_s: when probes end in any case.
        until: when silence counts as an answer, on the monotonic clock.
        patience: the same for hosts that have said hello: asking many GPUs, or a slow disk, takes its time.
    """
    question = {
        "ask": "survey",
        "run_dir": request.run_dir,
        "token": token,
        "is_full": is_full,
        "life_s": life_s,
    }
    for name in talk.channels:
        talk.ask(name, question)
    answers = talk.collect("survey", talk.channels, until=until)
    late = [name for name in talk.channels if name not in answers and any(talk.told(name, "hello"))]
    answers |= talk.collect("survey", late, until=patience)
    read = {name: _facts_in(answers[name]) for name in talk.channels if name in answers}
    return CollectedFacts(
        facts={name: facts for name, facts in read.items() if facts is not None},
        skews_s={
            name: answers[name]["clock"] - answers[name]["heard"] for name, facts in read.items() if facts is not None
        },
        strangers=tuple(name for name, facts in read.items() if facts is None),
    )


def check_contacts(
    talk: ProbeClient, addresses: Mapping[str, str], *, port: int | None, until: float
) -> CheckedContacts:
    """Have the first host open its port and the others knock.

    Args:
        talk: with all hosts.
        addresses: of those that take part, by name.
        port: to be opened; ``None`` for any free one.
        until: when silence counts as an answer, on the monotonic clock.
    """
    first, *others = addresses
    talk.ask(first, {"ask": "listen", "port": port})
    opened = talk.collect("listen", [first], until=until).get(first, {"port": None, "problem": "no answer in time"})
    address = addresses[first]
    towards = addresses[others[0]] if others else address
    patience_s = max(0.1, until - time.monotonic() - _MARGIN_S)
    talk.ask(first, {"ask": "contact", "address": towards, "port": None, "timeout_s": patience_s})
    for name in others:
        talk.ask(name, {"ask": "contact", "address": address, "port": opened["port"], "timeout_s": patience_s})
    answers = talk.collect("contact", addresses, until=until)
    nothing = Contact(interface=None, local_address=None, latency_s=None, problem="no answer in time")
    contacts = {name: _decoded(Contact, answers.get(name, {}).get("contact")) or nothing for name in addresses}
    return CheckedContacts(address=address, contacts=contacts, port=opened["port"], problem=opened["problem"])


def measure_all_reduces(
    talk: ProbeClient, facts: Mapping[str, HostFacts], met: CheckedContacts, *, until: float
) -> AllReduceResults:
    """Have the hosts that are near each other measure all-reduces.

    Args:
        talk: with all hosts, which were told to get ready.
        facts: of those that met.
        met: a port that all of them reach.
        until: when silence counts as an answer, on the monotonic clock.
    """
    names = met.near
    first = next(iter(met.contacts))
    talk.ask(first, {"ask": "hush"})
    talk.collect("hush", [first], until=min(until, time.monotonic() + _HUSH_S))
    for rank, name in enumerate(names):
        order = {
            "rank": rank,
            "names": names,
            "address": met.address,
            "port": met.port,
            "interface": met.contacts[name].interface,
            "uses_gpus": all(facts[name].devices for name in names),
            "timeout_s": max(1.0, until - time.monotonic() - _MARGIN_S),
        }
        talk.ask(name, {"ask": "collective", "order": order})
    ended = talk.collect("collective", names, until=until)
    pairs = [_decoded(PairMeasurement, said["pair"]) for name in names for said in talk.told(name, "pair")]
    told = {
        name: _decoded(GroupMeasurement, said["everyone"]) for name in names for said in talk.told(name, "everyone")
    }
    places = {name: place for place, name in enumerate(names)}
    found = {pair.hosts: pair for pair in pairs if pair is not None and places.keys() >= set(pair.hosts)}
    return AllReduceResults(
        pairs=tuple(sorted(found.values(), key=lambda pair: [places[name] for name in pair.hosts])),
        everyone={name: everyone for name, everyone in told.items() if everyone is not None},
        silent=_silent(talk, names, ended),
    )


def _silent(talk: ProbeClient, names: Sequence[str], ended: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    silent = {}
    for name in names:
        if name not in ended:
            silent[name] = "no answer in time" if talk.channels[name].is_open else "the connection broke"
        elif ended[name]["exit_code"] != 0:
            last = (talk.channels[name].complaint.strip().splitlines() or ["without a word"])[-1]
            silent[name] = f"exit code {ended[name]['exit_code']}: {last[:300]}"
    return silent


def _facts_in(answer: Mapping[str, Any]) -> HostFacts | None:
    """Return what a host says of itself; ``None`` where this version cannot read it."""
    clock = answer.get("clock")
    is_time = isinstance(clock, int | float) and abs(clock) < _LATEST_S
    return _decoded(HostFacts, answer.get("facts")) if is_time else None


def _decoded(cls: type[T], tree: Any) -> T | None:
    ignored: list[ConfigError] = []
    return build(cls, tree, path="facts", report=ignored.append) if isinstance(tree, Mapping) else None
