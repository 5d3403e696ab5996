"""What one step computes: plain numbers, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence."""

    start: int
    """Position of the first of them in its sequence."""
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    """Of the whole sequence, up to the last of these tokens."""
    wanted: bool
    """Whether the scores after the last of these tokens are asked for."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass."""

    segments: tuple[Segment, ...]
    copies: tuple[tuple[int, int], ...] = ()
    """Pages that are copied first: to, from."""
    padding: int = 0
    """Tokens computed besides, for no sequence."""
    stop: bool = field(default=False)
    """Nothing more will come."""

    def encode(self) -> list[int]:
        """Return it as integers."""
        numbers = [int(self.stop), self.padding, len(self.copies), len(self.segments)]
        for pair in self.copies:
            numbers += pair
        for part in self.segments:
            numbers += (part.start, int(part.wanted), len(part.tokens), len(part.pages), *part.tokens, *part.pages)
        return numbers

    @staticmethod
    def decode(numbers: Sequence[int]) -> StepPlan:
        """Return what ``encode`` was given."""
        rest = iter(numbers)
        stop, padding, num_copies, num_segments = _take(rest, 4)
        copies = tuple((target, source) for target, source in (_take(rest, 2) for _ in range(num_copies)))
        segments = []
        for _ in range(num_segments):
            start, wanted, num_tokens, num_pages = _take(rest, 4)
            tokens, pages = _take(rest, num_tokens), _take(rest, num_pages)
            segments.append(Segment(start=start, tokens=tokens, pages=pages, wanted=bool(wanted)))
        return StepPlan(segments=tuple(segments), copies=copies, padding=padding, stop=bool(stop))


def _take(numbers: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(next(numbers) for _ in range(count))
