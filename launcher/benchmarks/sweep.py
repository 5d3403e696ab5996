"""Cases along a size: one table a quantity, sizes side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launcher.benchmarks.units import label, spread

Line = Mapping[int, Mapping[str, Sequence[float]]]
"""Samples by quantity, by size; a size that was left out is not there."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The same cases at growing size."""

    title: str
    """What all of its lines have in common (``forward``)."""
    along: str
    """What grows, in words."""
    lines: Mapping[str, Line]
    """By name of the case."""

    @property
    def sizes(self) -> list[int]:
        """All sizes at which some case was measured, in order."""
        return sorted({size for line in self.lines.values() for size in line})

    @property
    def quantities(self) -> list[str]:
        """What was measured, the same in every case."""
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
