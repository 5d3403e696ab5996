"""Results of a benchmark: cases and sizes, written as JSON, Markdown tables and charts."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import launcher
from launcher.config.option_text import value_text
from launcher.config.run import Benchmark
from launcher.protocol.quantities import amount, label, spread
from launcher.protocol.rundir import RunDir
from launcher.utils.files import write_atomic, write_json
from launcher.utils.schema import to_tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def describe_machine() -> dict[str, str]:
    """Return date, processor, memory, load, GPU and versions."""
    import torch

    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    gpu = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {memory_gib:.0f} GiB",
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f} at the end",
        **gpu,
        "versions": f"Python {platform.python_version()}, {packages}, launcher {launcher.__version__}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def power_law_exponent(values: Mapping[int, float]) -> float:
    """Return p of the power law ``value ~ size^p``, fitted by least squares on log axes.

    Args:
        values: by size, at least two; all above 0.
    """
    sizes, logs = [math.log(size) for size in values], [math.log(value) for value in values.values()]
    return statistics.linear_regression(sizes, logs).slope


SamplesBySize = Mapping[int, Mapping[str, Sequence[float]]]
"""Samples by quantity, by size; a size that was left out is not there."""


@dataclass(frozen=True, kw_only=True)
class SizeSweep:
    """The same cases at growing size."""

    title: str
    """Common title of its lines (``forward``)."""
    along: str
    """Name of the size that grows."""
    lines: Mapping[str, SamplesBySize]
    """By name of the case."""

    @property
    def sizes(self) -> list[int]:
        """All sizes at which some case was measured, in order."""
        return sorted({size for line in self.lines.values() for size in line})

    @property
    def quantities(self) -> list[str]:
        """Return the measured quantities, the same in every case."""
        return list(next(samples for line in self.lines.values() for samples in line.values()))

    def tables(self) -> Iterator[str]:
        """Yield the lines of a Markdown table for each quantity."""
        for quantity in self.quantities:
            yield from ("", f"{self.title}, {label(quantity)}:", "")
            yield f"| {self.along} | {' | '.join(f'{size:,}' for size in self.sizes)} |"
            yield "|---" * (len(self.sizes) + 1) + "|"
            for name, line in self.lines.items():
                cells = [spread(quantity, line[size][quantity]) if size in line else "" for size in self.sizes]
                yield f"| {name} | {' | '.join(cells)} |"


@dataclass(frozen=True, kw_only=True)
class BenchmarkCase:
    """One way of doing the work, measured several times."""

    name: str
    samples: Mapping[str, tuple[float, ...]]
    """Values by quantity, in the order of rounds.
    A quantity's name ends in its unit (``step_s``, ``peak_bytes``)."""

    def median(self, quantity: str) -> float:
        """Return the middle value."""
        return statistics.median(self.samples[quantity])


def collect_case(name: str, answers: Sequence[Mapping[str, Any]], quantities: Sequence[str]) -> BenchmarkCase:
    """Return the case that these answers of its processes make."""
    return BenchmarkCase(name=name, samples={key: tuple(answer[key] for answer in answers) for key in quantities})


@dataclass(frozen=True, kw_only=True)
class BenchmarkResults:
    """Results of a benchmark."""

    benchmark: Benchmark
    cases: Sequence[BenchmarkCase]
    findings: tuple[str, ...]
    """The findings as one would tell them, a line each."""
    metrics: Mapping[str, float]
    """Numbers derived from the cases (``full/memory_saved``)."""
    facts: Mapping[str, Mapping[str, Any]]
    """Further facts by case, compared or counted instead of measured."""
    sweeps: Sequence[SizeSweep] = ()
    """The same cases along a size, shown as lines and one column a size."""
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
            "findings": list(self.findings),
        }

    def markdown(self, machine: Mapping[str, str]) -> Iterator[str]:
        """Yield the lines of a page: findings, medians with their spread, the machine."""
        yield from (f"# {self._title}", "")
        yield from (f"- {line}" for line in self.findings)
        yield from ("", *self.tables) if self.tables else ()
        for sweep in self.sweeps:
            yield from sweep.tables()
        if not self.sweeps:
            yield from self._rows()
        yield from (
            "",
            f"Median of {self.benchmark.repeats}, least to most in brackets; {self.benchmark.isolation}.",
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
        sizes = (
            f"{name} {value_text(to_tree(getattr(self.benchmark, name)))}" for name in self.benchmark.summary_fields
        )
        return f"{self.benchmark.kind}: {', '.join(sizes)}"


_BAR, _DOT = "#9db8d9", "#1d4ed8"


def draw_bars(picture: Path, cases: Mapping[str, Mapping[str, Sequence[float]]], *, title: str) -> None:
    """Draw one panel a quantity, one bar a case.

    Args:
        picture: the PNG to write.
        cases: samples by quantity, by name of the case; a case that lacks a quantity has no bar there.
        title: above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    names, quantities = list(cases), list(dict.fromkeys(key for samples in cases.values() for key in samples))
    figure = Figure(figsize=(4.5 * len(quantities), 1.6 + 0.6 * len(names)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    for number, quantity in enumerate(quantities):
        axes = figure.add_subplot(1, len(quantities), number + 1)
        for place, name in enumerate(names):
            values = [amount(quantity, value) for value in cases[name].get(quantity, ())]
            if not values:
                continue
            middle = statistics.median(values)
            axes.barh(place, middle, color=_BAR, height=0.6)
            axes.plot(values, [place] * len(values), "o", color=_DOT, markersize=3)
            axes.annotate(
                f"{middle:.3g}", (0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(label(quantity))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


_MARKERS = "osv^DXP*"
"""Markers distinguish lines that overlap."""


def draw_lines(picture: Path, sweeps: Sequence[SizeSweep], *, title: str) -> None:
    """Draw one row of panels a sweep, one panel a quantity, one line a case.

    Args:
        picture: the PNG to write.
        sweeps: each with the same quantities.
        title: above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    quantities = sweeps[0].quantities
    figure = Figure(figsize=(5 * len(quantities), 0.6 + 3.6 * len(sweeps)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(len(sweeps), len(quantities), squeeze=False)
    for sweep, row in zip(sweeps, panels, strict=True):
        for quantity, axes in zip(quantities, row, strict=True):
            for number, (name, line) in enumerate(sweep.lines.items()):
                _draw_line(axes, line, quantity, name=name, style=f"-{_MARKERS[number % len(_MARKERS)]}")
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(sweep.sizes, [f"{size:,}" for size in sweep.sizes], rotation=45, fontsize=7)
            axes.set_xticks([], minor=True)
            axes.set_xlabel(sweep.along)
            axes.set_ylabel(label(quantity))
            axes.set_title(sweep.title, fontsize=9)
            axes.grid(visible=True, alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(picture)


def _draw_line(axes: Axes, line: SamplesBySize, quantity: str, *, name: str, style: str) -> None:
    sizes = sorted(line)
    values = [[amount(quantity, value) for value in line[size][quantity]] for size in sizes]
    middles = [statistics.median(taken) for taken in values]
    below = [middle - min(taken) for middle, taken in zip(middles, values, strict=True)]
    above = [max(taken) - middle for middle, taken in zip(middles, values, strict=True)]
    axes.errorbar(sizes, middles, yerr=(below, above), fmt=style, label=name, markersize=4, linewidth=1, capsize=2)
