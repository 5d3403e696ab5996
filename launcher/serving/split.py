"""A step in parts that follow each other through the stages of a pipeline, so that these work at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from launcher.serving.pages import PAGE
from launcher.serving.plan import Segment, StepPlan

_LEAST = 16
"""Tokens of a part: with fewer, reading the weights once more takes longer than the overlap saves."""


def split(plan: StepPlan, count: int) -> list[StepPlan]:
    """Return at most ``count`` plans that do together, one after the other, what ``plan`` does.

    They have about as many tokens each; a sequence that is cut attends in the later part to what the earlier one wrote.
    """
    total = sum(len(segment.tokens) for segment in plan.segments)
    count = max(1, min(count, total // _LEAST))
    bounds = [total * number // count for number in range(count + 1)]
    parts = [tuple(_between(plan.segments, begin, end)) for begin, end in pairwise(bounds)]
    return [
        StepPlan(segments, copies=plan.copies if not number else (), padding=plan.padding if not number else 0)
        for number, segments in enumerate(parts)
    ]


def _between(segments: tuple[Segment, ...], begin: int, end: int) -> Iterator[Segment]:
    """Yield what of segments lies between two tokens, counted through all of them."""
    at = 0
    for segment in segments:
        size = len(segment.tokens)
        low, high = max(begin - at, 0), min(end - at, size)
        at += size
        if low < high:
            yield Segment(
                start=segment.start + low,
                tokens=segment.tokens[low:high],
                pages=segment.pages[: -(-(segment.start + high) // PAGE)],
                wanted=segment.wanted and high == size,
            )
