"""The three steps of an examination, each a question to all hosts and what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from launcher.doctor.conversation import Conversation
from launcher.doctor.facts import Contact, Everyone, HostFacts, Pair, Request
from launcher.doctor.network_rules import DISTANT_S
from launcher.errors import ConfigError
from launcher.schema import build

T = TypeVar("T")

_HUSH_S = 2.0
_LATEST_S = 1e12
"""No clock of a host says more seconds since 1970; NaN compares as false."""
_MARGIN_S = 0.5
"""Hosts give up so much earlier than we do, for what they say to arrive."""


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """What hosts told about themselves."""

    facts: dict[str, HostFacts]
    """In the order of hosts."""
    skews_s: dict[str, float]
    strangers: tuple[str, ...]
    """Hosts whose answer cannot be read: another version."""


@dataclass(frozen=True, kw_only=True)
class Met:
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
class Measured:
    """All-reduces."""

    pairs: tuple[Pair, ...] = ()
    everyone: dict[str, Everyone] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)
    """Why hosts measured nothing."""


def survey(
    talk: Conversation,
    request: Request,
    *,
    token: str | None,
    is_full: bool,
    life_s: float,
    until: float,
    patience: float,
) -> Surveyed:
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
    return Surveyed(
        facts={name: facts for name, facts in read.items() if facts is not None},
        skews_s={
            name: answers[name]["clock"] - answers[name]["heard"] for name, facts in read.items() if facts is not None
        },
        strangers=tuple(name for name, facts in read.items() if facts is None),
    )


def meet(talk: Conversation, addresses: Mapping[str, str], *, port: int | None, until: float) -> Met:
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
    return Met(address=address, contacts=contacts, port=opened["port"], problem=opened["problem"])


def measure(talk: Conversation, facts: Mapping[str, HostFacts], met: Met, *, until: float) -> Measured:
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
    pairs = [_decoded(Pair, said["pair"]) for name in names for said in talk.told(name, "pair")]
    told = {name: _decoded(Everyone, said["everyone"]) for name in names for said in talk.told(name, "everyone")}
    places = {name: place for place, name in enumerate(names)}
    found = {pair.hosts: pair for pair in pairs if pair is not None and places.keys() >= set(pair.hosts)}
    return Measured(
        pairs=tuple(sorted(found.values(), key=lambda pair: [places[name] for name in pair.hosts])),
        everyone={name: everyone for name, everyone in told.items() if everyone is not None},
        silent=_silent(talk, names, ended),
    )


def _silent(talk: Conversation, names: Sequence[str], ended: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
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
