"""The examination: all hosts at once, step by step, under one deadline. Starts nothing that stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launcher.doctor.conversation import Conversation
from launcher.doctor.facts import Request
from launcher.doctor.finding import Finding, Level, error
from launcher.doctor.network_rules import contact_rules, everyone_rules, pair_rules, port_rules
from launcher.doctor.refusal import refusal
from launcher.doctor.report import Report, known_host
from launcher.doctor.rules import rules
from launcher.doctor.software import code_hash
from launcher.doctor.steps import Measured, Met, Surveyed, measure, meet, survey
from launcher.doctor.storage import Token, token
from launcher.plan import Host
from launcher.remote.command import Remote

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


def usual_deadline_s(num_hosts: int, *, quick: bool) -> float:
    """Return a deadline for so many hosts."""
    return (QUICK_S if quick else FULL_S) + PER_HOST_S * num_hosts


def examine(
    hosts: Sequence[Host],
    remote: Callable[[Host, str], Remote],
    request: Request,
    *,
    quick: bool,
    deadline_s: float,
) -> Report:
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
    met, measured = Met(), Measured()
    with token(Path(request.run_dir)) as ours, Conversation(hosts, remote) as talk:
        surveyed = survey(
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
            met = meet(talk, addresses, port=request.port, until=min(ends, time.monotonic() + _MEET_S))
        findings = [
            *([] if ours.problem is None else [_not_ours(ours)]),
            *rules(hosts, surveyed.facts, skews_s=surveyed.skews_s, code_hash=our_code),
            *_meeting(met, port=request.port),
        ]
        is_fit = len(surveyed.facts) == len(hosts) and not any(found.level is Level.ERROR for found in findings)
        if is_fit and not quick:
            measured = measure(talk, surveyed.facts, met, until=ends)
    findings += _refusals(hosts, talk, surveyed, waited_s=waited_s)
    findings += pair_rules(measured.pairs)
    findings += everyone_rules(measured.everyone, silent=measured.silent)
    return Report(
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


def _refusals(hosts: Sequence[Host], talk: Conversation, surveyed: Surveyed, *, waited_s: float) -> Iterator[Finding]:
    """Yield why hosts gave no facts, once their commands have ended."""
    for host in hosts:
        if host.name in talk.not_started:
            yield error(host.name, f"nothing can be started for it: {talk.not_started[host.name]}", "install that here")
        elif host.name in surveyed.strangers:
            remedy = "install the version of this machine there, or set backend.code=sent"
            yield error(host.name, "speaks like another version of launcher", remedy)
        elif host.name not in surveyed.facts:
            channel = talk.channels[host.name]
            yield refusal(
                host,
                channel.complaint,
                exit_code=channel.exit_code,
                said_hello=any(talk.told(host.name, "hello")),
                waited_s=waited_s,
            )


def _meeting(met: Met, *, port: int | None) -> Iterator[Finding]:
    if met.port is not None:
        yield from contact_rules(met.contacts, port=met.port)
    elif met.contacts:
        yield from port_rules(next(iter(met.contacts)), port=port, problem=met.problem or "")


def _not_ours(ours: Token) -> Finding:
    what = f"nothing can be written to the run directory: {ours.folder}: {ours.problem}"
    return error(_US, what, "set run.root to a folder of yours")


def _sorted(findings: Sequence[Finding], hosts: Sequence[Host]) -> tuple[Finding, ...]:
    places = {host.name: place for place, host in enumerate(hosts)}
    return tuple(sorted(findings, key=lambda found: (found.level is not Level.ERROR, places.get(found.host, -1))))
