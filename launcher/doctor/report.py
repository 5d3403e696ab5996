"""What an examination brought to light."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.doctor.facts import Contact, Everyone, HostFacts, Pair
from launcher.doctor.finding import Finding, Level
from launcher.plan import Host


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it."""

    findings: tuple[Finding, ...]
    """Errors first, then in the order of hosts."""
    hosts: tuple[Host, ...]
    """As they were listed."""
    facts: dict[str, HostFacts]
    """Of those that answered, by name."""
    skews_s: dict[str, float]
    """How far each clock is ahead of this machine's."""
    contacts: dict[str, Contact]
    """How each reaches the first of those that answered, which stands first."""
    port: int | None
    """Of the rendezvous; free on the first host a moment ago. ``None`` when there is none."""
    is_full: bool
    """Whether all-reduces were to be measured."""
    pairs: tuple[Pair, ...] = ()
    everyone: dict[str, Everyone]
    elapsed_s: float

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What a run would break on."""
        return tuple(finding for finding in self.findings if finding.level is Level.ERROR)

    def known(self, hosts: Sequence[Host]) -> tuple[Host, ...]:
        """Return ``hosts`` with what is known of each now; one that did not answer stays as it was."""
        return tuple(
            replace(known_host(host, self.facts[host.name]), interface=self._interface(host))
            if host.name in self.facts
            else host
            for host in hosts
        )

    def _interface(self, host: Host) -> str:
        """Return the interface that leads to the other hosts; empty where there are none, or it cannot be told."""
        contact = self.contacts.get(host.name)
        return (contact.interface or "") if contact is not None and len(self.contacts) > 1 else ""


def lines_of(findings: Iterable[Finding]) -> Iterator[str]:
    """Yield findings as text, each with its remedy on a line of its own."""
    for finding in findings:
        yield f"{finding.level.value}: {finding.host}: {finding.what}"
        yield f"{' ' * len(finding.level.value)}  → {finding.remedy}"


def known_host(host: Host, facts: HostFacts) -> Host:
    """Return ``host`` with what it told about itself; this machine keeps its loopback address."""
    return replace(
        host,
        address=facts.address if host.login else host.address,
        is_known=True,
        devices=facts.devices,
        device_ids=facts.device_ids,
        device_bytes=facts.device_bytes,
        cores=facts.cores,
        memory_bytes=facts.memory_bytes,
        computes_bf16=facts.computes_bf16,
        python=facts.software.python_path,
    )
