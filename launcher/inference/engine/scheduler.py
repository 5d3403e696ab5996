"""The scheduler: admits requests, chunks prefill, preempts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace

from launcher.config.inference import EngineLimits
from launcher.inference.engine.batching import BatchingPolicy, WaitingQueue
from launcher.inference.engine.block_manager import BLOCK_SIZE, BlockManager
from launcher.inference.engine.draft_lengths import Draft, DraftLengths
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
    draft_lengths: tuple[int, ...] = ()
    """Most tokens to draft for each segment; its sequence has blocks for them. Empty: none."""
    drafts: tuple[Draft | None, ...] = ()
    """Of each segment, part of the plan; empty: of none."""

    @property
    def sampled(self) -> Iterator[tuple[Sequence, Draft | None]]:
        """Yield the sequences that get tokens and their drafts, in the order of their logits."""
        drafts = self.drafts or (None,) * len(self.sequences)
        for sequence, segment, draft in zip(self.sequences, self.plan.segments, drafts, strict=True):
            if segment.needs_logits:
                yield sequence, draft

    def is_decoding(self, index: int) -> bool:
        """Return whether a segment continues an answer, drafts aside by one token."""
        part, draft_length = self.plan.segments[index], self.draft_lengths[index] if self.draft_lengths else 0
        return draft_length > 0 or part.start >= len(self.sequences[index].group.request.prompt)

    def segment(self, index: int, *, start: int, tokens: tuple[int, ...], needs_logits: bool) -> Segment:
        """Return a segment of other tokens of the same sequence."""
        end = start + len(tokens)
        table = tuple(self.sequences[index].block_table[: -(-end // BLOCK_SIZE)])
        return replace(
            self.plan.segments[index], start=start, tokens=tokens, block_table=table, needs_logits=needs_logits
        )

    def with_drafts(self, drafts: AbstractSequence[Draft | None], *, first_layer: int) -> ScheduledStep:
        """Return the step that verifies drafts.

        Args:
            drafts: of each segment.
            first_layer: the first layer that still has to run; where others have, blocks were copied too.
        """
        segments = list(self.plan.segments)
        for index, draft in enumerate(drafts):
            if draft is not None and draft.tokens:
                part = segments[index]
                tokens = (*part.tokens, *draft.tokens)
                made = self.segment(index, start=part.start, tokens=tokens, needs_logits=True)
                segments[index] = replace(made, num_drafts=len(draft.tokens))
        copies = () if first_layer else self.plan.copies
        plan = replace(self.plan, segments=tuple(segments), first_layer=first_layer, copies=copies)
        return replace(self, plan=plan, drafts=tuple(drafts))


class Scheduler:
    """Decides what each step computes, and allocates KV blocks for it.

    Args:
        limits: sizes of steps and batches.
        num_blocks: of the KV cache.
        drafts: decides how many tokens are drafted; ``None`` drafts none.
    """

    def __init__(self, limits: EngineLimits, *, num_blocks: int, drafts: DraftLengths | None = None) -> None:
        self.waiting: WaitingQueue[SequenceGroup] = WaitingQueue(limits.aging_s)
        self.running: list[SequenceGroup] = []
        self.block_manager = BlockManager(num_blocks, share=limits.enable_prefix_caching)
        self.counts = SchedulerCounts()
        self._limits, self._drafts = limits, drafts
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
            StepPlan(segments, copies=copies, padding=padding),
            tuple(sequence for sequence, _ in parts),
            draft_lengths=self._draft_lengths([sequence for sequence, _ in parts]),
        )

    def mark_computed(self, step: ScheduledStep) -> None:
        """Record that the keys and values of a step, drafts aside, are in the cache."""
        for sequence, part in zip(step.sequences, step.plan.segments, strict=True):
            end = part.start + len(part.tokens) - part.num_drafts
            self.counts.prompt_tokens += max(0, min(end, len(sequence.group.request.prompt)) - part.start)
            self._mark(sequence, end)

    def roll_back(self, step: ScheduledStep) -> None:
        """Keep the keys and values of accepted drafts, and free the blocks of rejected ones."""
        for sequence, length in zip(step.sequences, step.draft_lengths, strict=bool(step.draft_lengths)):
            if length:
                self._mark(sequence, len(sequence.tokens) - 1)
                num_blocks = -(-sequence.num_computed // BLOCK_SIZE)
                self.block_manager.free(sequence.block_table[num_blocks:])
                del sequence.block_table[num_blocks:]

    def _mark(self, sequence: Sequence, end: int) -> None:
        """Record that a sequence is computed up to a token."""
        sequence.num_computed = end
        done = sequence.content(end)
        sequence.prefix = self.block_manager.cache_full_blocks(done, sequence.block_table, prefix=sequence.prefix)

    def _draft_lengths(self, sequences: list[Sequence]) -> tuple[int, ...]:
        """Return the most tokens to draft for each sequence of a step.

        Blocks for them are allocated. No request is preempted for a draft.
        """
        decoding = [sequence for sequence in sequences if sequence.num_uncomputed == 1]
        if self._drafts is None or not decoding or not self._drafts.begin(len(decoding)):
            return ()
        lengths = [0] * len(sequences)
        for index, sequence in enumerate(sequences):
            if sequence.num_uncomputed > 1 or sequence.group.max_num_seqs > 1:
                continue
            most = self._drafts.length(sequence)
            need = -(-(len(sequence.tokens) + most) // BLOCK_SIZE) - len(sequence.block_table)
            if need > 0 and (fresh := self.block_manager.allocate(need)) is not None:
                sequence.block_table += fresh
            lengths[index] = max(0, min(most, len(sequence.block_table) * BLOCK_SIZE - len(sequence.tokens)))
        return tuple(lengths) if any(lengths) else ()

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
            content = sequence.content(len(sequence.tokens))
            matched = self.block_manager.match_prefix(content, prefix=group.empty_prefix)
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
            done = sequence.content(sequence.num_computed)
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
                victim = max(self.running, key=self.rank)
                self._preempt(victim)
                if victim is group:
                    return
            if not private:
                copy = fresh.pop()
                self._copies[copy] = table[last]
                self.block_manager.free([table[last]])
                table[last] = copy
            sequence.block_table += fresh

    def rank(self, group: SequenceGroup) -> float:
        """Return a request's rank in the queue, smallest first."""
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
        images=sequence.group.images,
    )
