"""The scheduler: admits requests, chunks prefill, preempts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launcher.config.inference import EngineLimits
from launcher.inference.engine.batching import BatchingPolicy, WaitingQueue
from launcher.inference.engine.block_manager import BLOCK_SIZE, BlockManager
from launcher.inference.engine.sequence import Sequence, SequenceGroup
from launcher.inference.engine.step_plan import Segment, StepPlan


@dataclass(slots=True)
class SchedulerCounts:
    """Totals since the start."""

    prompt_tokens: int = 0
    padding_tokens: int = 0
    prefix_hits: int = 0
    prefix_queries: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A plan, and the sequences that its segments belong to."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]
    """Of each segment."""

    @property
    def sampled(self) -> Iterator[Sequence]:
        """Yield the sequences that get a token, in the order of their logits."""
        segments = zip(self.sequences, self.plan.segments, strict=True)
        yield from (sequence for sequence, segment in segments if segment.needs_logits)


class Scheduler:
    """Decides what each step computes, and allocates KV blocks for it.

    Args:
        limits: sizes of steps and batches.
        num_blocks: of the KV cache.
    """

    def __init__(self, limits: EngineLimits, *, num_blocks: int) -> None:
        self.waiting: WaitingQueue[SequenceGroup] = WaitingQueue(limits.aging_s)
        self.running: list[SequenceGroup] = []
        self.block_manager = BlockManager(num_blocks, share=limits.enable_prefix_caching)
        self.counts = SchedulerCounts()
        self._limits = limits
        self._policy = BatchingPolicy(limits)
        self._batch_longest = 0
        self._batch_size = 0
        self._copies: dict[int, int] = {}

    def finish(self, group: SequenceGroup) -> None:
        """Remove a request, wherever it is, and free its blocks."""
        if group in self.running:
            self._free_group(group)
            self.running.remove(group)
        else:
            self.waiting.remove(group)

    def schedule(self, now_s: float) -> ScheduledStep | None:
        """Return the plan of the next step; ``None`` without work."""
        self._admit(now_s)
        chosen: list[tuple[Sequence, int]] = []
        for group in list(self.running):
            if group in self.running and all(sequence.num_uncomputed == 1 for sequence in group.sequences):
                chosen += [(sequence, 1) for sequence in group.sequences]
                self._allocate(group, dict.fromkeys(group.sequences, 1))
        budget, padding = self._limits.prefill_chunk_size, self._num_ended
        for group in self.running:
            if all(sequence.num_uncomputed == 1 for sequence in group.sequences):
                continue
            for sequence in group.sequences:
                # beams advance together: the last token of each waits until all others are computed
                count = min(sequence.num_uncomputed - (len(group.sequences) > 1), budget)
                if count <= 0:
                    continue
                budget -= count
                chosen.append((sequence, count))
                if count == sequence.num_uncomputed and self._batch_size:
                    padding += max(0, self._batch_longest - len(sequence.tokens))
        parts = [(sequence, count) for sequence, count in chosen if sequence.group in self.running]
        copies, self._copies = tuple(self._copies.items()), {}
        if not parts:
            return None
        self.counts.padding_tokens += padding
        segments = tuple(_segment(sequence, count) for sequence, count in parts)
        return ScheduledStep(
            StepPlan(segments, copies=copies, padding=padding), tuple(sequence for sequence, _ in parts)
        )

    def mark_computed(self, step: ScheduledStep) -> None:
        """Record that the keys and values of a step are in the cache."""
        for sequence, part in zip(step.sequences, step.plan.segments, strict=True):
            sequence.num_computed += len(part.tokens)
            end = part.start + len(part.tokens)
            self.counts.prompt_tokens += max(0, min(end, len(sequence.group.request.prompt)) - part.start)
            done = sequence.tokens[: sequence.num_computed]
            sequence.prefix = self.block_manager.cache_full_blocks(done, sequence.block_table, prefix=sequence.prefix)

    def fork(self, sequence: Sequence, tokens: list[int]) -> Sequence:
        """Return a sequence that shares the blocks of another one and continues differently."""
        self.block_manager.acquire(sequence.block_table)
        return Sequence(sequence.group, tokens, sequence.num_computed, list(sequence.block_table), sequence.prefix)

    def free(self, sequence: Sequence) -> None:
        """Free the blocks of one sequence."""
        self.block_manager.free(sequence.block_table)
        sequence.block_table, sequence.num_computed, sequence.prefix = [], 0, sequence.group.empty_prefix

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens whose keys and values are cached for running requests."""
        return sum(sequence.num_computed for group in self.running for sequence in group.sequences)

    @property
    def _num_ended(self) -> int:
        """Sequences of a padded batch that ended before the longest one."""
        return max(0, self._batch_size - len(self.running))

    def _admit(self, now_s: float) -> None:
        if not self.running:
            self._batch_size = 0
        for group in self._policy.select(self.waiting, self.running, now_s):
            if not self._start(group):
                break
        if self.running and not self._batch_size and self._limits.batching in ("static", "dynamic"):
            self._batch_size = len(self.running)
            self._batch_longest = max(len(sequence.tokens) for group in self.running for sequence in group.sequences)

    def _start(self, group: SequenceGroup) -> bool:
        """Start a request if its tokens fit in free blocks, with one spare per running sequence."""
        reserve = sum(len(other.sequences) for other in self.running)
        allocated: list[tuple[Sequence, list[int], int]] = []
        for sequence in group.sequences:
            matched = self.block_manager.match_prefix(sequence.tokens, prefix=group.empty_prefix)
            self.block_manager.acquire(matched)
            need = -(-len(sequence.tokens) // BLOCK_SIZE) - len(matched)
            fresh = self.block_manager.allocate(need) if need + reserve <= self.block_manager.num_free else None
            if fresh is None:
                self.block_manager.free(matched)
                for _, blocks, _ in allocated:
                    self.block_manager.free(blocks)
                return False
            allocated.append((sequence, matched + fresh, len(matched)))
        for sequence, blocks, num_matched in allocated:
            sequence.block_table, sequence.num_computed = blocks, num_matched * BLOCK_SIZE
            done = sequence.tokens[: sequence.num_computed]
            sequence.prefix = self.block_manager.cache_full_blocks(done, blocks, prefix=group.empty_prefix)
            self.counts.prefix_hits += sequence.num_computed
            self.counts.prefix_queries += len(sequence.tokens)
        if not group.is_started:
            group.num_cached_tokens = group.sequences[0].num_computed
        group.is_started = True
        self.waiting.remove(group)
        self.running.append(group)
        return True

    def _allocate(self, group: SequenceGroup, counts: dict[Sequence, int]) -> None:
        """Allocate blocks for a running request's next tokens; preempt others, the last first."""
        for sequence, count in counts.items():
            table, last = sequence.block_table, sequence.num_computed // BLOCK_SIZE
            is_boundary = last >= len(table) or sequence.num_computed % BLOCK_SIZE == 0
            private = is_boundary or not self.block_manager.is_shared(table[last])
            need = -(-(sequence.num_computed + count) // BLOCK_SIZE) - len(table) + (not private)
            while (fresh := self.block_manager.allocate(need)) is None:
                victim = max(self.running, key=self._rank)
                self._preempt(victim)
                if victim is group:
                    return
            if not private:
                copy = fresh.pop()
                self._copies[copy] = table[last]
                self.block_manager.free([table[last]])
                table[last] = copy
            sequence.block_table += fresh

    def _rank(self, group: SequenceGroup) -> float:
        return self._limits.rank(arrived_s=group.arrived_s, priority=group.priority)

    def _preempt(self, group: SequenceGroup) -> None:
        self._free_group(group)
        self.running.remove(group)
        self.waiting.add(group)
        self.counts.preemptions += 1

    def _free_group(self, group: SequenceGroup) -> None:
        for sequence in group.sequences:
            self.free(sequence)


def _segment(sequence: Sequence, count: int) -> Segment:
    end = sequence.num_computed + count
    return Segment(
        start=sequence.num_computed,
        tokens=tuple(sequence.tokens[sequence.num_computed : end]),
        block_table=tuple(sequence.block_table[: -(-end // BLOCK_SIZE)]),
        needs_logits=end == len(sequence.tokens),
        adapter=sequence.group.adapter,
    )
