"""The attention benchmark: measure each kernel at each length, and report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.harness import sample_interleaved
from launcher.benchmarks.isolated import run_isolated
from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults, SizeSweep, power_law_exponent
from launcher.config.benchmark.attention import TOLERANCES, AttentionPoint
from launcher.config.run import Run
from launcher.engines.context import Context
from launcher.errors import JobError
from launcher.utils.text import bytes_text

if TYPE_CHECKING:
    from launcher.config.benchmark.attention import AttentionBenchmark


_PROBE, _MEASURE, _EXACT = (
    "launcher.benchmarks.attention_kernels:probe_kernels",
    "launcher.benchmarks.attention_kernels:measure_kernel",
    "launcher.benchmarks.attention_kernels:write_reference",
)


def run_attention_benchmark(benchmark: AttentionBenchmark, context: Context) -> BenchmarkResults:
    """Measure every point in turn and compare it with the formula in fp64."""
    asked = {"kernels": benchmark.kernels, "passes": benchmark.chosen_passes, **_sizes(benchmark, context)}
    here = run_isolated(_PROBE, asked, heartbeat=lambda: context.heartbeat.update("probe"))
    points, left_out = choose_points(benchmark, context.run, **here)
    if not points:
        raise JobError(f"there is nothing to measure; {'; '.join(left_out)}")
    with tempfile.TemporaryDirectory(dir=context.run_dir.path, prefix="references-") as folder:
        files = _references(benchmark, context, points, Path(folder))
        arguments = {
            point.name: {
                **_sizes(benchmark, context),
                "kernel": point.kernel,
                "backward": point.direction == "backward",
                "sequence_length": point.sequence_length,
                "warmup": benchmark.warmup,
                "reference": files[point.sequence_length],
            }
            for point in points
        }
        repeats = benchmark.repeats
        samples = sample_interleaved(_MEASURE, arguments, repeats=repeats, context=context, exact_peaks=True)
    precision = context.run.precision
    report = AttentionReport(
        benchmark,
        points,
        samples,
        tolerance=benchmark.tolerance or TOLERANCES[precision.kind],
        value_bytes=precision.compute_bytes,
        left_out=left_out,
    )
    return report.results()


def _references(
    benchmark: AttentionBenchmark, context: Context, points: Sequence[AttentionPoint], folder: Path
) -> dict[int, str]:
    """Compute the formula at each length; return the files."""
    files = {point.sequence_length: str(folder / f"{point.sequence_length}.safetensors") for point in points}
    backward = any(point.direction == "backward" for point in points)
    asked = {**_sizes(benchmark, context), "keep": files, "backward": backward}
    run_isolated(_EXACT, asked, heartbeat=lambda: context.heartbeat.update("reference"))
    return files


def _sizes(benchmark: AttentionBenchmark, context: Context) -> dict[str, Any]:
    return {
        **{name: getattr(benchmark, name) for name in ("batch_size", "hidden_size", "num_attention_heads")},
        "precision": context.run.precision.kind,
        "seed": context.run.job.seed,
        "rank": context.local_rank,
    }


def choose_points(
    benchmark: AttentionBenchmark, run: Run, *, free_bytes: int, lacking: Mapping[str, str]
) -> tuple[list[AttentionPoint], list[str]]:
    """Return the points that can be measured, and a line for each kernel and pass that cannot.

    Args:
        run: this benchmark's.
        free_bytes: memory that a process may take.
        lacking: why a kernel has no such pass here, by ``kernel/pass``.
    """
    chosen: list[AttentionPoint] = []
    left_out: dict[str, None] = {}
    for point in benchmark.points:
        needed = benchmark.bytes_needed(point, run)
        if why := lacking.get(f"{point.kernel}/{point.direction}"):
            left_out[f"left out: {point.kernel}, {point.direction}: {why}"] = None
        elif needed > free_bytes:
            sizes = f"takes about {bytes_text(needed)}, and {bytes_text(free_bytes)} are free"
            left_out[f"left out: {point.name}: {sizes}"] = None
        else:
            chosen.append(point)
    return chosen, list(left_out)


Samples = Mapping[str, Sequence[Mapping[str, Any]]]
_AROUND_BYTES = 2**20
"""Most bytes that threads and matrix products keep for themselves."""
_TIMES_AROUND = 4
"""Peaks are fitted that are at least so many times what does not depend on the length."""
_BASELINE, _FLASH = "mha_weights", "sdpa_flash"


class AttentionReport:
    """Points that were measured, and what was found at each."""

    def __init__(
        self,
        benchmark: AttentionBenchmark,
        points: Sequence[AttentionPoint],
        samples: Samples,
        *,
        tolerance: float,
        value_bytes: int,
        left_out: Sequence[str],
    ) -> None:
        self._benchmark, self._points, self._samples = benchmark, points, samples
        self._tolerance, self._value_bytes, self._left_out = tolerance, value_bytes, left_out
        self._cases = {point: _case(point, samples[point.name]) for point in points}

    def results(self) -> BenchmarkResults:
        """Return all of it."""
        several = len({point.sequence_length for point in self._points}) > 1
        return BenchmarkResults(
            benchmark=self._benchmark,
            cases=list(self._cases.values()),
            facts={point.name: self._facts(point) for point in self._points},
            findings=tuple(self._findings()),
            metrics=dict(self._metrics()),
            sweeps=list(self._sweeps()) if several else (),
        )

    def _lines(self) -> Iterator[tuple[str, str, dict[int, AttentionPoint]]]:
        """Yield direction, kernel and points by length, in the order in which they were asked for."""
        for direction in dict.fromkeys(point.direction for point in self._points):
            for kernel in self._benchmark.kernels:
                line = {p.sequence_length: p for p in self._points if (p.direction, p.kernel) == (direction, kernel)}
                if line:
                    yield direction, kernel, line

    def _sweeps(self) -> Iterator[SizeSweep]:
        for direction in dict.fromkeys(point.direction for point in self._points):
            lines = {
                kernel: {size: self._cases[point].samples for size, point in line.items()}
                for name, kernel, line in self._lines()
                if name == direction
            }
            yield SizeSweep(title=_pass_words(direction), along="sequence", lines=lines)

    def _facts(self, point: AttentionPoint) -> dict[str, Any]:
        taken = self._samples[point.name]
        errors = {
            key: max(sample[key] for sample in taken) for key in taken[0] if key.endswith(("_error", "_relative"))
        }
        return {
            **errors,
            "within_rounding": self._worst(point) <= self._tolerance,
            **{key: sorted({sample[key] for sample in taken}) for key in ("weights", "inputs")},
        }

    def _worst(self, point: AttentionPoint) -> float:
        samples = self._samples[point.name]
        return max(float(value) for sample in samples for key, value in sample.items() if key.endswith("_relative"))

    def _findings(self) -> Iterator[str]:
        """Yield the article's figures, memory growth, errors and what was not measured."""
        yield from self._article()
        for direction, kernel, line in self._lines():
            fitted = self._above_floor(direction, line)
            if len(fitted) > 1:
                *_, before, last = fitted
                between = power_law_exponent({size: fitted[size] for size in (before, last)})
                sizes = ", ".join(f"{size:,}" for size in fitted)
                yield (
                    f"{kernel}, {_pass_words(direction)}: extra memory grows as "
                    f"sequence^{power_law_exponent(fitted):.2f} (least squares over "
                    f"{sizes}; {between:.2f} between the last two)"
                )
        for direction, kernel, line in self._lines():
            yield self._error_line(direction, kernel, list(line.values()))
        starts: dict[int, set[Any]] = {}
        for point in self._points:
            starts.setdefault(point.sequence_length, set()).update(
                (sample["weights"], sample["inputs"]) for sample in self._samples[point.name]
            )
        same = "the same in every process" if all(len(found) == 1 for found in starts.values()) else "NOT the same"
        yield f"weights and inputs: {same}"
        yield from self._left_out

    def _article(self) -> Iterator[str]:
        by_name = {point.name: point for point in self._points}
        for direction in dict.fromkeys(point.direction for point in self._points):
            sizes = self._shared(direction, _FLASH)
            if not sizes:
                continue
            size = max(sizes)
            at = f"({_pass_words(direction)}, sequence {size:,}, batch {self._benchmark.batch_size})"
            for kernel, words in ((_BASELINE, "nn.MultiheadAttention"), (_FLASH, "flash attention")):
                peak = self._cases[by_name[f"{kernel}/{direction}/{size}"]].median("peak_mb")
                yield f"peak of {words} {at}: {peak:,.2f} MB"
            yield f"memory saved {at}: {self._saved(direction, _FLASH, size):.1%}"
            if size in self._shared(direction, "mha"):
                alone = self._saved(direction, "mha", size)
                yield f"memory saved by need_weights=False alone {at}: {alone:.1%}"

    def _shared(self, direction: str, kernel: str) -> list[int]:
        """Return the lengths at which both a kernel and the baseline were measured."""
        names = {point.name for point in self._points}
        wanted = (kernel, _BASELINE)
        return [
            size for size in self._benchmark.sequence_lengths if all(f"{k}/{direction}/{size}" in names for k in wanted)
        ]

    def _saved(self, direction: str, kernel: str, size: int) -> float:
        by_name = {point.name: case for point, case in self._cases.items()}
        peak, plain = (by_name[f"{name}/{direction}/{size}"].median("peak_mb") for name in (kernel, _BASELINE))
        return 1 - peak / plain

    def _above_floor(self, direction: str, line: Mapping[int, AttentionPoint]) -> dict[int, float]:
        """Return peaks by length, where they say how memory grows.

        A backward pass holds the gradient of the largest weight besides, until it is added to that weight's others.
        """
        weight_bytes = 3 * self._benchmark.hidden_size**2 * self._value_bytes if direction == "backward" else 0
        floor = _TIMES_AROUND * (_AROUND_BYTES + weight_bytes)
        peaks = {size: 1e6 * self._cases[point].median("peak_mb") for size, point in sorted(line.items())}
        return {size: peak for size, peak in peaks.items() if peak >= floor}

    def _error_line(self, direction: str, kernel: str, points: Sequence[AttentionPoint]) -> str:
        facts = [self._facts(point) for point in points]
        errors = [
            f"{words} {max(fact[f'{name}_error'] for fact in facts):.1e} "
            f"({max(fact[f'{name}_relative'] for fact in facts):.1e} of the largest value)"
            for name, words in (("output", "output"), ("gradient", "gradient of the input"))
            if f"{name}_error" in facts[0]
        ]
        fine = all(fact["within_rounding"] for fact in facts)
        judged = f"{'within' if fine else 'NOT within'} rounding (at most {self._tolerance:g} of it)"
        return f"{kernel}, {_pass_words(direction)}: largest error of {' and of the '.join(errors)}: {judged}"

    def _metrics(self) -> Iterator[tuple[str, float]]:
        for direction, kernel, line in self._lines():
            fitted = self._above_floor(direction, line)
            if len(fitted) > 1:
                yield f"{kernel}/{direction}/memory_exponent", power_law_exponent(fitted)
            if kernel != _BASELINE and (sizes := self._shared(direction, kernel)):
                yield f"{kernel}/{direction}/memory_saved", self._saved(direction, kernel, max(sizes))
            yield f"{kernel}/{direction}/largest_relative_error", max(self._worst(point) for point in line.values())


def _pass_words(direction: str) -> str:
    return {"forward": "forward", "backward": "forward and backward"}[direction]


def _case(point: AttentionPoint, taken: Sequence[Mapping[str, Any]]) -> BenchmarkCase:
    return BenchmarkCase(
        name=point.name,
        samples={
            "peak_mb": tuple(sample["peak_bytes"] / 1e6 for sample in taken),
            "step_ms": tuple(1e3 * sample["step_s"] for sample in taken),
        },
    )
