"""The scheduler: admits requests, chunks prefill, preempts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.config.inference import EngineLimits
from launcher.inference.engine.batching import BatchingPolicy, WaitingQueue
from launcher.inference.engine.block_manager import BLOCK_SIZE, BlockManager, PrefixHash
from launcher.inference.engine.sequence import Sequence, SequenceGroup
from launcher.inference.engine.step_plan import Segment, StepPlan


@dataclass(slots=True)
class SchedulerCounts:
    """What only grows."""

    prompt_tokens: int = 0
    padding_tokens: int = 0
    prefix_hits: int = 0
    prefix_queries: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A plan, and whose its segments are."""

    plan: StepPlan
    rows: tuple[Sequence, ...]
    """Of each segment."""

    @property
    def wanted(self) -> Iterator[Sequence]:
        """Yield the rows whose scores are asked for, in the order in which they come."""
        yield from (row for row, part in zip(self.rows, self.plan.segments, strict=True) if part.wanted)


class Scheduler:
    """Keeps the queue, the running and the room.

    Args:
        limits: how much at a time.
        num_pages: for keys and values.
    """

    def __init__(self, limits: EngineLimits, *, num_pages: int) -> None:
        self.waiting: WaitingQueue[SequenceGroup] = WaitingQueue(limits.aging_s)
        self.running: list[SequenceGroup] = []
        self.pages = BlockManager(num_pages, share=limits.enable_prefix_caching)
        self.counts = SchedulerCounts()
        self._limits = limits
        self._forming = BatchingPolicy(limits)
        self._batch_longest = 0
        self._batch_size = 0
        self._copies: dict[int, int] = {}

    def finish(self, task: SequenceGroup) -> None:
        """Take a task out, wherever it is, and its room back."""
        if task in self.running:
            self._give_back(task)
            self.running.remove(task)
        else:
            self.waiting.remove(task)

    def step(self, now_s: float) -> ScheduledStep | None:
        """Return what to compute, ``None`` where nothing is due."""
        self._admit(now_s)
        chosen: list[tuple[Sequence, int]] = []
        for task in list(self.running):
            if task in self.running and all(row.pending == 1 for row in task.rows):
                chosen += [(row, 1) for row in task.rows]
                self._make_room(task, dict.fromkeys(task.rows, 1))
        budget, padding = self._limits.prefill_chunk_size, self._absent
        for task in self.running:
            if all(row.pending == 1 for row in task.rows):
                continue
            for row in task.rows:
                # beams go on together: the last token of each waits until all of them have come that far
                count = min(row.pending - (len(task.rows) > 1), budget)
                if count <= 0:
                    continue
                budget -= count
                chosen.append((row, count))
                if count == row.pending and self._batch_size:
                    padding += max(0, self._batch_longest - len(row.tokens))
        parts = [(row, count) for row, count in chosen if row.task in self.running]
        copies, self._copies = tuple(self._copies.items()), {}
        if not parts:
            return None
        self.counts.padding_tokens += padding
        segments = tuple(_segment(row, count) for row, count in parts)
        return ScheduledStep(StepPlan(segments, copies=copies, padding=padding), tuple(row for row, _ in parts))

    def computed(self, step: ScheduledStep) -> None:
        """Note that the keys and values of a step are there."""
        for row, part in zip(step.rows, step.plan.segments, strict=True):
            row.computed += len(part.tokens)
            end = part.start + len(part.tokens)
            self.counts.prompt_tokens += max(0, min(end, len(row.task.request.prompt)) - part.start)
            row.noted = self.pages.remember(row.tokens[: row.computed], row.pages, noted=row.noted)

    def fork(self, row: Sequence, tokens: list[int]) -> Sequence:
        """Return a row that has what another has, without a copy of it, and goes on differently."""
        self.pages.hold(row.pages)
        return Sequence(row.task, tokens, row.computed, list(row.pages), row.noted)

    def drop(self, row: Sequence) -> None:
        """Give the room of one row back."""
        self.pages.release(row.pages)
        row.pages, row.computed, row.noted = [], 0, PrefixHash()

    @property
    def held_tokens(self) -> int:
        """Tokens whose keys and values are held for the running."""
        return sum(row.computed for task in self.running for row in task.rows)

    @property
    def _absent(self) -> int:
        """Sequences of a padded batch that have ended before the longest."""
        return max(0, self._batch_size - len(self.running))

    def _admit(self, now_s: float) -> None:
        if not self.running:
            self._batch_size = 0
        for task in self._forming.due(self.waiting, self.running, now_s):
            if not self._begin(task):
                break
        if self.running and not self._batch_size and self._limits.batching in ("static", "dynamic"):
            self._batch_size = len(self.running)
            self._batch_longest = max(len(row.tokens) for task in self.running for row in task.rows)

    def _begin(self, task: SequenceGroup) -> bool:
        """Let one in if there is room for what it has, and a page more for each that runs."""
        reserve = sum(len(other.rows) for other in self.running)
        taken: list[tuple[Sequence, list[int], int]] = []
        for row in task.rows:
            matched = self.pages.match(row.tokens)
            self.pages.hold(matched)
            need = -(-len(row.tokens) // BLOCK_SIZE) - len(matched)
            fresh = self.pages.take(need) if need + reserve <= self.pages.available else None
            if fresh is None:
                self.pages.release(matched)
                for _, pages, _ in taken:
                    self.pages.release(pages)
                return False
            taken.append((row, matched + fresh, len(matched)))
        for row, pages, matched_pages in taken:
            row.pages, row.computed = pages, matched_pages * BLOCK_SIZE
            row.noted = self.pages.remember(row.tokens[: row.computed], pages, noted=PrefixHash())
            self.counts.prefix_hits += row.computed
            self.counts.prefix_queries += len(row.tokens)
        if not task.begun:
            task.cached_tokens = task.rows[0].computed
        task.begun = True
        self.waiting.remove(task)
        self.running.append(task)
        return True

    def _make_room(self, task: SequenceGroup, counts: dict[Sequence, int]) -> None:
        """Get a running task the pages that its next tokens go into; those least due give theirs."""
        for row, count in counts.items():
            last = row.computed // BLOCK_SIZE
            private = last >= len(row.pages) or row.computed % BLOCK_SIZE == 0 or not self.pages.shared(row.pages[last])
            need = -(-(row.computed + count) // BLOCK_SIZE) - len(row.pages) + (not private)
            while (fresh := self.pages.take(need)) is None:
                victim = max(self.running, key=self._least_due)
                self._put_back(victim)
                if victim is task:
                    return
            if not private:
                copy = fresh.pop()
                self._copies[copy] = row.pages[last]
                self.pages.release([row.pages[last]])
                row.pages[last] = copy
            row.pages += fresh

    def _least_due(self, task: SequenceGroup) -> float:
        return self._limits.rank(arrived_s=task.arrived_s, priority=task.priority)

    def _put_back(self, task: SequenceGroup) -> None:
        self._give_back(task)
        self.running.remove(task)
        self.waiting.add(task)
        self.counts.preemptions += 1

    def _give_back(self, task: SequenceGroup) -> None:
        for row in task.rows:
            self.drop(row)


def _segment(row: Sequence, count: int) -> Segment:
    end = row.computed + count
    return Segment(
        start=row.computed,
        tokens=tuple(row.tokens[row.computed : end]),
        pages=tuple(row.pages[: -(-end // BLOCK_SIZE)]),
        wanted=end == len(row.tokens),
    )
