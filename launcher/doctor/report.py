"""Report of an examination: findings, facts and measurements, as values and as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median

from launcher.doctor.protocol import Contact, GroupMeasurement, HostFacts, PairMeasurement
from launcher.protocol.plan import Host
from launcher.utils.text import bytes_text, counted, format_table

_MAX_IN_MATRIX = 8
"""Number of hosts up to which all pairs are shown; of more, the slowest pairs."""
_NUM_SLOWEST = 8

_HEAD = (
    "host",
    "address",
    "interface",
    "python",
    "torch",
    "CUDA",
    "GPUs",
    "cores",
    "RAM",
    "disk",
    "shm",
    "round trip",
)


class Level(StrEnum):
    """Severity of a finding."""

    ERROR = "error"
    """A run would fail, so none is started."""
    WARNING = "warning"
    """A run would work, but not well."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem and its remedy."""

    host: str
    level: Level
    what: str
    remedy: str


def error(host: str, what: str, remedy: str) -> Finding:
    """Return a finding that prevents a run."""
    return Finding(host=host, level=Level.ERROR, what=what, remedy=remedy)


def warning(host: str, what: str, remedy: str) -> Finding:
    """Return a finding that does not prevent a run."""
    return Finding(host=host, level=Level.WARNING, what=what, remedy=remedy)


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """Findings, facts and measurements of all hosts."""

    findings: tuple[Finding, ...]
    """Errors first, then in the order of hosts."""
    hosts: tuple[Host, ...]
    """In the order of the hostfile."""
    facts: dict[str, HostFacts]
    """Facts of the hosts that answered, by name."""
    skews_s: dict[str, float]
    """Seconds by which each clock is ahead of this machine's."""
    contacts: dict[str, Contact]
    """Contact of each host with the first one that answered, which comes first."""
    port: int | None
    """Free port for the rendezvous on the first host; ``None`` if none is free."""
    is_full: bool
    """Whether all-reduces were to be measured."""
    pairs: tuple[PairMeasurement, ...] = ()
    group: dict[str, GroupMeasurement]
    """All-reduces among all hosts, by the host that measured."""
    elapsed_s: float

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that prevent a run."""
        return tuple(finding for finding in self.findings if finding.level is Level.ERROR)

    def probed(self, hosts: Sequence[Host]) -> tuple[Host, ...]:
        """Return ``hosts`` with the facts of each; a host that did not answer is unchanged."""
        return tuple(
            replace(probed_host(host, self.facts[host.name]), interface=self._interface(host))
            if host.name in self.facts
            else host
            for host in hosts
        )

    def _interface(self, host: Host) -> str:
        """Return the interface of the route to other hosts; empty without any, or when unknown."""
        contact = self.contacts.get(host.name)
        return (contact.interface or "") if contact is not None and len(self.contacts) > 1 else ""


def lines_of(findings: Iterable[Finding]) -> Iterator[str]:
    """Yield findings as text, each followed by a line with its remedy."""
    for finding in findings:
        yield f"{finding.level.value}: {finding.host}: {finding.what}"
        yield f"{' ' * len(finding.level.value)}  → {finding.remedy}"


def probed_host(host: Host, facts: HostFacts) -> Host:
    """Return ``host`` with its facts; this machine keeps its loopback address."""
    return replace(
        host,
        address=facts.address if host.ssh_destination else host.address,
        is_probed=True,
        devices=facts.devices,
        device_ids=facts.device_ids,
        device_bytes=facts.device_bytes,
        cores=facts.cores,
        memory_bytes=facts.memory_bytes,
        computes_bf16=facts.computes_bf16,
        python=facts.software.python_path,
    )


def render_report(report: DoctorReport) -> str:
    """Return the report as lines of text."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: DoctorReport) -> Iterator[str]:
    yield from format_table([_HEAD, *(_row(report, host.name) for host in report.hosts)])
    yield from _pairs(report)
    if report.findings:
        yield ""
    yield from lines_of(report.findings)
    yield ""
    yield _conclusion(report)


def _row(report: DoctorReport, name: str) -> tuple[str, ...]:
    facts, contact = report.facts.get(name), report.contacts.get(name)
    if facts is None:
        return (name, "-", *("" for _ in _HEAD[2:]))
    latency = contact.latency_s if contact is not None else None
    return (
        name,
        facts.address,
        (contact and contact.interface) or "-",
        facts.software.python,
        facts.software.packages.get("torch", "-"),
        facts.software.cuda or "-",
        _gpus(facts),
        str(facts.cores),
        bytes_text(facts.memory_bytes),
        bytes_text(facts.storage.free_bytes),
        bytes_text(facts.storage.shm_free_bytes),
        "-" if latency is None else f"{latency * 1e3:.2f} ms",
    )


def _gpus(facts: HostFacts) -> str:
    kinds = sorted(set(facts.devices))
    return " + ".join(f"{facts.devices.count(kind)} {kind}" for kind in kinds) or "-"


def _pairs(report: DoctorReport) -> Iterator[str]:
    measured = [pair for pair in report.pairs if pair.problem is None]
    if not measured:
        if report.is_full and report.errors and not report.pairs:
            yield from ("", "all-reduces were not measured: correct the errors first")
        return
    yield ""
    names = list(dict.fromkeys(name for pair in report.pairs for name in pair.hosts))
    latency = median(pair.latency_s or 0.0 for pair in measured)
    speed = median(pair.bytes_per_s or 0.0 for pair in measured)
    latencies = [found.latency_s for found in report.group.values() if found.latency_s is not None]
    group = f", {max(latencies) * 1e3:.2f} ms among all" if latencies else ""
    figures = f"median {latency * 1e3:.2f} ms and {bytes_text(speed)}/s{group}"
    yield f"all-reduce of {counted(len(measured), 'pair')}: {figures}"
    if len(names) > 2:
        yield from _matrix(report, names) if len(names) <= _MAX_IN_MATRIX else _slowest(measured)


def _matrix(report: DoctorReport, names: list[str]) -> Iterator[str]:
    names = [host.name for host in report.hosts if host.name in names]
    cells = {frozenset(pair.hosts): _figures(pair) for pair in report.pairs}
    rows = [(row, *(cells.get(frozenset((row, column)), "") for column in names[1:])) for row in names[:-1]]
    upper = [
        (row[0], *(cell if place >= number else "" for place, cell in enumerate(row[1:])))
        for number, row in enumerate(rows)
    ]
    yield from format_table([("", *names[1:]), *upper], indent="  ")


def _slowest(pairs: list[PairMeasurement]) -> Iterator[str]:
    slow = sorted(pairs, key=lambda pair: pair.bytes_per_s or 0.0)[:_NUM_SLOWEST]
    yield from format_table([("slowest", *pair.hosts, _figures(pair)) for pair in slow], indent="  ")


def _figures(pair: PairMeasurement) -> str:
    if pair.latency_s is None or pair.bytes_per_s is None:
        return "fails"
    return f"{pair.latency_s * 1e3:.2f} ms {bytes_text(pair.bytes_per_s)}/s"


def _conclusion(report: DoctorReport) -> str:
    num_errors = len(report.errors)
    hosts = counted(len(report.hosts), "host")
    if num_errors:
        effect = "a run would fail, so nothing was started"
        return f"{counted(num_errors, 'error')} on {hosts} after {report.elapsed_s:.1f} s: {effect}"
    found = counted(len(report.findings), "warning") if report.findings else "no problems"
    return f"{found}: {hosts} examined in {report.elapsed_s:.1f} s"
