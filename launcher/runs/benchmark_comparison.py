"""Compare two runs of one benchmark: what changed beyond the spread of the samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.protocol.results import BenchmarkRecord, Samples

Verdict = Literal["worse", "better", "changed", "within spread", "within threshold"]

_HIGHER_IS_BETTER = ("_per_s",)
_LOWER_IS_BETTER = ("_s", "_ms", "_us", "_bytes", "_mb")
_NOT_OF_THE_CASES = ("repeats", "warmup")
"""Options that change the precision of a measurement, not its object."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One quantity of one case, before (A) and after (B)."""

    case: str
    quantity: str
    before: Samples
    after: Samples

    @property
    def ratio(self) -> float:
        """Median of B divided by the median of A."""
        one, other = statistics.median(self.before), statistics.median(self.after)
        if one == other:
            return 1.0
        return other / one if one else math.copysign(math.inf, other)

    @property
    def agrees(self) -> bool:
        """Return whether each median is within the range of the other side."""
        return _holds(self.before, self.after) and _holds(self.after, self.before)

    @property
    def is_beyond_spread(self) -> bool:
        """Return whether neither median is within the range of the other side."""
        return not _holds(self.before, self.after) and not _holds(self.after, self.before)

    def verdict(self, threshold: float) -> Verdict:
        """Return the result of the comparison.

        Args:
            threshold: accepted change of the median, as a share of A.
        """
        if not self.is_beyond_spread:
            return "within spread"
        if abs(self.ratio - 1) <= threshold:
            return "within threshold"
        sign = improvement_sign(self.quantity)
        if sign == 0:
            return "changed"
        return "better" if sign * (statistics.median(self.after) - statistics.median(self.before)) > 0 else "worse"


def improvement_sign(quantity: str) -> int:
    """Return 1 if higher is better, -1 if lower is, 0 if the unit does not say.

    The unit is the end of the name.
    """
    if quantity.endswith(_HIGHER_IS_BETTER):
        return 1
    return -1 if quantity.endswith(_LOWER_IS_BETTER) else 0


@dataclass(frozen=True, kw_only=True)
class BenchmarkComparison:
    """Differences of two runs of a benchmark, and what only one of them has."""

    differences: tuple[Difference, ...]
    only_before: tuple[str, ...]
    """Cases, or a case's quantities as ``case/quantity``, that B does not have."""
    only_after: tuple[str, ...]
    options: tuple[tuple[str, Any, Any], ...]
    """Options of the benchmark that differ: name, A, B."""
    machine: tuple[tuple[str, Any, Any], ...]
    """The same for the machine; dates and loads are left out."""


def compare_measurements(before: BenchmarkRecord, after: BenchmarkRecord) -> BenchmarkComparison:
    """Return the comparison of two runs of the same benchmark."""
    common = [case for case in before.cases if case in after.cases]
    return BenchmarkComparison(
        differences=tuple(
            Difference(case=case, quantity=quantity, before=values, after=after.cases[case][quantity])
            for case in common
            for quantity, values in before.cases[case].items()
            if quantity in after.cases[case]
        ),
        only_before=tuple(_missing(before, after)),
        only_after=tuple(_missing(after, before)),
        options=tuple(_apart(before.options, after.options, _NOT_OF_THE_CASES)),
        machine=tuple(_apart(before.machine, after.machine, ("date", "load"))),
    )


def _missing(one: BenchmarkRecord, other: BenchmarkRecord) -> Iterator[str]:
    for case, quantities in one.cases.items():
        if case not in other.cases:
            yield case
        else:
            yield from (f"{case}/{quantity}" for quantity in quantities if quantity not in other.cases[case])


def _apart(
    one: Mapping[str, Any], other: Mapping[str, Any], leave_out: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    for name in dict.fromkeys((*one, *other)):
        if name not in leave_out and one.get(name) != other.get(name):
            yield name, one.get(name), other.get(name)


def _holds(values: Samples, other: Samples) -> bool:
    return min(values) <= statistics.median(other) <= max(values)
