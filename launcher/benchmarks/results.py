"""What a benchmark found, and how it is kept: JSON, a Markdown table, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.benchmarks.base import Benchmark
from launcher.benchmarks.lines import draw_lines
from launcher.benchmarks.machine import describe_machine
from launcher.benchmarks.picture import draw_bars
from launcher.benchmarks.sweep import Sweep
from launcher.benchmarks.units import label, spread
from launcher.files import write_atomic, write_json
from launcher.rundir import RunDir
from launcher.schema import to_tree
from launcher.wording import value_text


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of doing the work, measured several times."""

    name: str
    samples: Mapping[str, tuple[float, ...]]
    """Values by quantity, whose name ends in its unit (``step_s``, ``peak_bytes``), in the order of rounds."""

    def median(self, quantity: str) -> float:
        """Return the middle value."""
        return statistics.median(self.samples[quantity])


def collect(name: str, answers: Sequence[Mapping[str, Any]], quantities: Sequence[str]) -> Case:
    """Return the case that these answers of its processes make."""
    return Case(name=name, samples={key: tuple(answer[key] for answer in answers) for key in quantities})


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a benchmark found."""

    benchmark: Benchmark
    cases: Sequence[Case]
    said: tuple[str, ...]
    """The findings as one would tell them, a line each."""
    metrics: Mapping[str, float]
    """What follows from the cases (``full/memory_saved``)."""
    facts: Mapping[str, Mapping[str, Any]]
    """What else was found, by case: not measured, but compared or counted."""
    sweeps: Sequence[Sweep] = ()
    """The same cases along a size: shown as lines and a column a size, instead of bars and a row a case."""
    tables: Sequence[str] = ()
    """Lines of Markdown that show more than the medians of cases."""

    def publish(self, run_dir: RunDir) -> None:
        """Write everything into the run directory and print the table."""
        machine = describe_machine()
        text = "\n".join(self.markdown(machine)) + "\n"
        write_json(run_dir.benchmark("json"), self.tree(machine))
        write_atomic(run_dir.benchmark("md"), text)
        if self.sweeps:
            draw_lines(run_dir.benchmark("png"), self.sweeps, title=self._title)
        else:
            draw_bars(run_dir.benchmark("png"), {case.name: case.samples for case in self.cases}, title=self._title)
        print(text, flush=True)
        print(f"results: {run_dir.benchmark('md')}, .json and .png", flush=True)

    def tree(self, machine: Mapping[str, str]) -> dict[str, Any]:
        """Return all of it as plain data."""
        return {
            "benchmark": to_tree(self.benchmark),
            "machine": dict(machine),
            "cases": {case.name: {key: list(values) for key, values in case.samples.items()} for case in self.cases},
            "facts": {name: dict(found) for name, found in self.facts.items()},
            "metrics": dict(self.metrics),
            "said": list(self.said),
        }

    def markdown(self, machine: Mapping[str, str]) -> Iterator[str]:
        """Yield the lines of a page: findings, medians with their spread, the machine."""
        yield from (f"# {self._title}", "")
        yield from (f"- {line}" for line in self.said)
        yield from ("", *self.tables) if self.tables else ()
        for sweep in self.sweeps:
            yield from sweep.tables()
        if not self.sweeps:
            yield from self._rows()
        yield from (
            "",
            f"Median of {self.benchmark.repeats}, least to most in brackets; {self.benchmark.how}.",
            "",
        )
        yield from (f"- {key}: {value}" for key, value in machine.items())

    def _rows(self) -> Iterator[str]:
        quantities = list(dict.fromkeys(key for case in self.cases for key in case.samples))
        yield from ("", f"| case | {' | '.join(map(label, quantities))} |", "|---" * (len(quantities) + 1) + "|")
        for case in self.cases:
            cells = [spread(key, case.samples[key]) if key in case.samples else "" for key in quantities]
            yield f"| {case.name} | {' | '.join(cells)} |"

    @property
    def _title(self) -> str:
        sizes = (f"{name} {value_text(to_tree(getattr(self.benchmark, name)))}" for name in self.benchmark.headline)
        return f"{self.benchmark.kind}: {', '.join(sizes)}"
