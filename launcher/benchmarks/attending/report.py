"""What came of the benchmark of attention: memory saved, how it grows, errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.attending.point import Point
from launcher.benchmarks.fit import exponent
from launcher.benchmarks.results import Case, Results
from launcher.benchmarks.sweep import Sweep

if TYPE_CHECKING:
    from launcher.benchmarks.attention import AttentionBenchmark

Samples = Mapping[str, Sequence[Mapping[str, Any]]]

_AROUND_BYTES = 2**20
"""What threads and matrix products keep for themselves, at most."""
_TIMES_AROUND = 4
"""Peaks are fitted that are at least so many times what does not depend on the length."""
_BASELINE, _FLASH = "mha_weights", "sdpa_flash"


class Report:
    """Points that were measured, and what was found at each."""

    def __init__(
        self,
        benchmark: AttentionBenchmark,
        points: Sequence[Point],
        samples: Samples,
        *,
        tolerance: float,
        value_bytes: int,
        left_out: Sequence[str],
    ) -> None:
        self._benchmark, self._points, self._samples = benchmark, points, samples
        self._tolerance, self._value_bytes, self._left_out = tolerance, value_bytes, left_out
        self._cases = {point: _case(point, samples[point.name]) for point in points}

    def results(self) -> Results:
        """Return all of it."""
        several = len({point.sequence for point in self._points}) > 1
        return Results(
            benchmark=self._benchmark,
            cases=list(self._cases.values()),
            facts={point.name: self._facts(point) for point in self._points},
            said=tuple(self._said()),
            metrics=dict(self._metrics()),
            sweeps=list(self._sweeps()) if several else (),
        )

    def _lines(self) -> Iterator[tuple[str, str, dict[int, Point]]]:
        """Yield direction, kernel and points by length, in the order in which they were asked for."""
        for direction in dict.fromkeys(point.direction for point in self._points):
            for kernel in self._benchmark.kernels:
                line = {p.sequence: p for p in self._points if (p.direction, p.kernel) == (direction, kernel)}
                if line:
                    yield direction, kernel, line

    def _sweeps(self) -> Iterator[Sweep]:
        for direction in dict.fromkeys(point.direction for point in self._points):
            lines = {
                kernel: {size: self._cases[point].samples for size, point in line.items()}
                for name, kernel, line in self._lines()
                if name == direction
            }
            yield Sweep(title=_words(direction), along="sequence", lines=lines)

    def _facts(self, point: Point) -> dict[str, Any]:
        taken = self._samples[point.name]
        errors = {
            key: max(sample[key] for sample in taken) for key in taken[0] if key.endswith(("_error", "_relative"))
        }
        return {
            **errors,
            "within_rounding": self._worst(point) <= self._tolerance,
            **{key: sorted({sample[key] for sample in taken}) for key in ("weights", "inputs")},
        }

    def _worst(self, point: Point) -> float:
        samples = self._samples[point.name]
        return max(float(value) for sample in samples for key, value in sample.items() if key.endswith("_relative"))

    def _said(self) -> Iterator[str]:
        """Yield what the article prints, how memory grows, errors, and what is not among the figures."""
        yield from self._article()
        for direction, kernel, line in self._lines():
            fitted = self._above_floor(direction, line)
            if len(fitted) > 1:
                *_, before, last = fitted
                between = exponent({size: fitted[size] for size in (before, last)})
                sizes = ", ".join(f"{size:,}" for size in fitted)
                yield (
                    f"{kernel}, {_words(direction)}: extra memory grows as sequence^{exponent(fitted):.2f} "
                    f"(least squares over {sizes}; {between:.2f} between the last two)"
                )
        for direction, kernel, line in self._lines():
            yield self._error_line(direction, kernel, list(line.values()))
        starts: dict[int, set[Any]] = {}
        for point in self._points:
            starts.setdefault(point.sequence, set()).update(
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
            at = f"({_words(direction)}, sequence {size:,}, batch {self._benchmark.batch})"
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
        return [size for size in self._benchmark.sequences if all(f"{k}/{direction}/{size}" in names for k in wanted)]

    def _saved(self, direction: str, kernel: str, size: int) -> float:
        by_name = {point.name: case for point, case in self._cases.items()}
        peak, plain = (by_name[f"{name}/{direction}/{size}"].median("peak_mb") for name in (kernel, _BASELINE))
        return 1 - peak / plain

    def _above_floor(self, direction: str, line: Mapping[int, Point]) -> dict[int, float]:
        """Return peaks by length, where they say how memory grows.

        A backward pass holds the gradient of the largest weight besides, until it is added to that weight's others.
        """
        weight_bytes = 3 * self._benchmark.width**2 * self._value_bytes if direction == "backward" else 0
        floor = _TIMES_AROUND * (_AROUND_BYTES + weight_bytes)
        peaks = {size: 1e6 * self._cases[point].median("peak_mb") for size, point in sorted(line.items())}
        return {size: peak for size, peak in peaks.items() if peak >= floor}

    def _error_line(self, direction: str, kernel: str, points: Sequence[Point]) -> str:
        facts = [self._facts(point) for point in points]
        told = [
            f"{words} {max(fact[f'{name}_error'] for fact in facts):.1e} "
            f"({max(fact[f'{name}_relative'] for fact in facts):.1e} of the largest value)"
            for name, words in (("output", "output"), ("gradient", "gradient of the input"))
            if f"{name}_error" in facts[0]
        ]
        fine = all(fact["within_rounding"] for fact in facts)
        judged = f"{'within' if fine else 'NOT within'} rounding (at most {self._tolerance:g} of it)"
        return f"{kernel}, {_words(direction)}: largest error of {' and of the '.join(told)}: {judged}"

    def _metrics(self) -> Iterator[tuple[str, float]]:
        for direction, kernel, line in self._lines():
            fitted = self._above_floor(direction, line)
            if len(fitted) > 1:
                yield f"{kernel}/{direction}/memory_exponent", exponent(fitted)
            if kernel != _BASELINE and (sizes := self._shared(direction, kernel)):
                yield f"{kernel}/{direction}/memory_saved", self._saved(direction, kernel, max(sizes))
            yield f"{kernel}/{direction}/largest_relative_error", max(self._worst(point) for point in line.values())


def _words(direction: str) -> str:
    return {"forward": "forward", "backward": "forward and backward"}[direction]


def _case(point: Point, taken: Sequence[Mapping[str, Any]]) -> Case:
    return Case(
        name=point.name,
        samples={
            "peak_mb": tuple(sample["peak_bytes"] / 1e6 for sample in taken),
            "step_ms": tuple(1e3 * sample["step_s"] for sample in taken),
        },
    )
