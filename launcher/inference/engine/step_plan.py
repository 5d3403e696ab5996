"""Plan of one step, as plain numbers that are the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from launcher.inference.engine.block_manager import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one sequence."""

    start: int
    """Position of the first of them in its sequence."""
    tokens: tuple[int, ...]
    block_table: tuple[int, ...]
    """Blocks of the sequence, up to that of the last of these tokens."""
    needs_logits: bool
    """Whether the logits of the last of these tokens are returned."""
    adapter: int = 0
    """Number of the sequence's adapter, from 1; 0 is the base model."""
    images: int = 0
    """Number of the images of its request, from 1; 0 is none."""
    num_drafts: int = 0
    """Of the last tokens, how many are drafts: the logits before each are returned too."""

    @property
    def num_logits(self) -> int:
        """Tokens whose logits are returned, the last ones."""
        return 1 + self.num_drafts if self.needs_logits else 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass, through all layers or some."""

    segments: tuple[Segment, ...]
    copies: tuple[tuple[int, int], ...] = ()
    """Blocks that are copied first: target, source."""
    padding: int = 0
    """Padding tokens, which belong to no sequence."""
    first_layer: int = 0
    """The first layer that runs.
    It takes what layers before it gave for the same tokens in the plans just before."""
    exit_layer: int = 0
    """The first layer that does not run: norm and head follow the one before it; 0 runs all."""
    stop: bool = field(default=False)
    """Whether this is the last plan."""

    def encode(self) -> list[int]:
        """Return it as integers."""
        layers = (self.first_layer, self.exit_layer)
        numbers = [int(self.stop), self.padding, *layers, len(self.copies), len(self.segments)]
        for pair in self.copies:
            numbers += pair
        for part in self.segments:
            numbers += (
                part.start,
                int(part.needs_logits),
                part.adapter,
                part.num_drafts,
                part.images,
                len(part.tokens),
                len(part.block_table),
                *part.tokens,
                *part.block_table,
            )
        return numbers

    @staticmethod
    def decode(numbers: Sequence[int]) -> StepPlan:
        """Return the value that was encoded."""
        rest = iter(numbers)
        stop, padding, first_layer, exit_layer, num_copies, num_segments = _take(rest, 6)
        copies = tuple((target, source) for target, source in (_take(rest, 2) for _ in range(num_copies)))
        segments = []
        for _ in range(num_segments):
            start, needs_logits, adapter, num_drafts, images, num_tokens, num_blocks = _take(rest, 7)
            tokens, block_table = _take(rest, num_tokens), _take(rest, num_blocks)
            segments.append(
                Segment(
                    start=start,
                    tokens=tokens,
                    block_table=block_table,
                    needs_logits=bool(needs_logits),
                    adapter=adapter,
                    num_drafts=num_drafts,
                    images=images,
                )
            )
        return StepPlan(
            segments=tuple(segments),
            copies=copies,
            padding=padding,
            first_layer=first_layer,
            exit_layer=exit_layer,
            stop=bool(stop),
        )


def _take(numbers: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(next(numbers) for _ in range(count))


_MIN_TOKENS = 16
"""Least tokens of a part.
With fewer, reading the weights once more takes longer than the overlap saves."""


def split_plan(plan: StepPlan, count: int) -> list[StepPlan]:
    """Return at most ``count`` plans that do together, one after the other, what ``plan`` does.

    They have about as many tokens each; a sequence that is cut attends in the later part to what the earlier one wrote.
    """
    assert not any(segment.num_drafts for segment in plan.segments), "the plan of a run refuses drafts in a pipeline"
    total = sum(len(segment.tokens) for segment in plan.segments)
    count = max(1, min(count, total // _MIN_TOKENS))
    bounds = [total * number // count for number in range(count + 1)]
    parts = [tuple(_segments_between(plan.segments, begin, end)) for begin, end in pairwise(bounds)]
    return [
        StepPlan(segments, copies=plan.copies if not number else (), padding=plan.padding if not number else 0)
        for number, segments in enumerate(parts)
    ]


def _segments_between(segments: tuple[Segment, ...], begin: int, end: int) -> Iterator[Segment]:
    """Yield the parts of segments between two tokens, counted through all of them."""
    at = 0
    for segment in segments:
        size = len(segment.tokens)
        low, high = max(begin - at, 0), min(end - at, size)
        at += size
        if low < high:
            yield Segment(
                start=segment.start + low,
                tokens=segment.tokens[low:high],
                block_table=segment.block_table[: -(-(segment.start + high) // BLOCK_SIZE)],
                needs_logits=segment.needs_logits and high == size,
                adapter=segment.adapter,
                images=segment.images,
            )
