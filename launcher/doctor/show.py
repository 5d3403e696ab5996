"""A report as text: a line a host, what is wrong with remedies, and who talks how fast with whom."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from launcher.doctor.facts import HostFacts, Pair
from launcher.doctor.report import Report, lines_of
from launcher.table import table
from launcher.wording import bytes_text, times

_MOST_IN_MATRIX = 8
"""Hosts up to which all pairs are shown; of more, the slowest pairs."""
_NUM_SLOWEST = 8


def show(report: Report) -> str:
    """Return the report as lines of text."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield from table([_HEAD, *(_row(report, host.name) for host in report.hosts)])
    yield from _pairs(report)
    if report.findings:
        yield ""
    yield from lines_of(report.findings)
    yield ""
    yield _verdict(report)


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


def _row(report: Report, name: str) -> tuple[str, ...]:
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


def _pairs(report: Report) -> Iterator[str]:
    measured = [pair for pair in report.pairs if pair.problem is None]
    if not measured:
        if report.is_full and report.errors and not report.pairs:
            yield from ("", "all-reduces were not measured: mend the errors first")
        return
    yield ""
    names = list(dict.fromkeys(name for pair in report.pairs for name in pair.hosts))
    latency = median(pair.latency_s or 0.0 for pair in measured)
    speed = median(pair.bytes_per_s or 0.0 for pair in measured)
    together = [found.latency_s for found in report.everyone.values() if found.latency_s is not None]
    everyone = f", {max(together) * 1e3:.2f} ms among all" if together else ""
    figures = f"median {latency * 1e3:.2f} ms and {bytes_text(speed)}/s{everyone}"
    yield f"all-reduce of {times(len(measured), 'pair')}: {figures}"
    if len(names) > 2:
        yield from _matrix(report, names) if len(names) <= _MOST_IN_MATRIX else _slowest(measured)


def _matrix(report: Report, names: list[str]) -> Iterator[str]:
    names = [host.name for host in report.hosts if host.name in names]
    cells = {frozenset(pair.hosts): _figures(pair) for pair in report.pairs}
    rows = [(row, *(cells.get(frozenset((row, column)), "") for column in names[1:])) for row in names[:-1]]
    upper = [
        (row[0], *(cell if place >= number else "" for place, cell in enumerate(row[1:])))
        for number, row in enumerate(rows)
    ]
    yield from table([("", *names[1:]), *upper], indent="  ")


def _slowest(pairs: list[Pair]) -> Iterator[str]:
    slow = sorted(pairs, key=lambda pair: pair.bytes_per_s or 0.0)[:_NUM_SLOWEST]
    yield from table([("slowest", *pair.hosts, _figures(pair)) for pair in slow], indent="  ")


def _figures(pair: Pair) -> str:
    if pair.latency_s is None or pair.bytes_per_s is None:
        return "fails"
    return f"{pair.latency_s * 1e3:.2f} ms {bytes_text(pair.bytes_per_s)}/s"


def _verdict(report: Report) -> str:
    num_errors = len(report.errors)
    hosts = times(len(report.hosts), "host")
    if num_errors:
        verdict = "a run would break, and nothing was started"
        return f"{times(num_errors, 'error')} on {hosts} after {report.elapsed_s:.1f} s: {verdict}"
    found = times(len(report.findings), "warning") if report.findings else "all is well"
    return f"{found}: {hosts} examined in {report.elapsed_s:.1f} s"
