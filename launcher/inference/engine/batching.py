"""The queue of waiting requests, and the policies that form batches from it."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from launcher.config.inference import EngineLimits
from launcher.inference.engine.sequence import SequenceGroup


class Queueable(Protocol):
    """An item that can wait in the queue."""

    @property
    def priority(self) -> int:
        """Higher is sooner."""

    @property
    def arrived_s(self) -> float:
        """Time of arrival, in seconds on the engine's clock."""


Item = TypeVar("Item", bound=Queueable)


class WaitingQueue(Generic[Item]):
    """Ordered by priority, which grows by one for every ``aging_s`` of waiting; then by arrival.

    All items age buckets, so their order never changes: one key for each, computed once.

    Args:
        aging_s: seconds of waiting that make up for one step of priority.
    """

    def __init__(self, aging_s: float) -> None:
        self._ageing_s = aging_s
        self._heap: list[tuple[float, int, Item]] = []
        self._count = itertools.count()
        self._removed: set[int] = set()
        self._numbers: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._heap) - len(self._removed)

    def __iter__(self) -> Iterator[Item]:
        """Yield all, the next one first."""
        yield from (item for _, number, item in sorted(self._heap, key=_key) if number not in self._removed)

    def add(self, item: Item) -> None:
        """Add an item; one that was preempted keeps its time of arrival, and with it its place."""
        number = next(self._count)
        self._numbers[id(item)] = number
        heapq.heappush(self._heap, (item.arrived_s / self._ageing_s - item.priority, number, item))

    def peek(self, num: int) -> list[Item]:
        """Return the next ``num`` items, in order, without removing them."""
        entries = heapq.nsmallest(num + len(self._removed), self._heap, key=_key)
        return [item for _, number, item in entries if number not in self._removed][:num]

    def first(self) -> Item | None:
        """Return the next item without removing it."""
        while self._heap and self._heap[0][1] in self._removed:
            self._removed.discard(heapq.heappop(self._heap)[1])
        return self._heap[0][2] if self._heap else None

    def remove(self, item: Item) -> None:
        """Remove an item from anywhere in the queue."""
        self._removed.add(self._numbers.pop(id(item)))
        self.first()
        if len(self._removed) > len(self._heap) // 2:  # removed items from the middle must not hold memory for long
            self._heap = [entry for entry in self._heap if entry[1] not in self._removed]
            heapq.heapify(self._heap)
            self._removed.clear()


def _key(entry: tuple[float, int, object]) -> tuple[float, int]:
    return entry[:2]


class BatchingPolicy:
    """Selects requests from the queue.

    Args:
        limits: batching mode and sizes.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits

    def select(
        self, waiting: WaitingQueue[SequenceGroup], running: Sequence[SequenceGroup], now_s: float
    ) -> list[SequenceGroup]:
        """Return the requests to start now, in order."""
        if not len(waiting):
            return []
        if self._limits.batching == "continuous":
            free = self._limits.max_num_seqs - sum(group.max_num_seqs for group in running)
            return _fitting(waiting, free)
        if running:
            return []
        if self._limits.batching == "none":
            return waiting.peek(1)
        if self._limits.batching == "static":
            return self._batch_of(list(waiting), now_s)
        buckets: dict[int, list[SequenceGroup]] = defaultdict(list)
        for group in waiting:
            buckets[-(-len(group.sequences[0].tokens) // self._limits.bucket_size)].append(group)
        batches = [self._batch_of(groups, now_s) for groups in buckets.values()]
        # the ready batch whose first request comes first in the queue: dictionaries keep its order
        return next(filter(None, batches), [])

    def _batch_of(self, groups: Sequence[SequenceGroup], now_s: float) -> list[SequenceGroup]:
        """Return a batch if it is full or has waited long enough, else nothing."""
        oldest = min(group.arrived_s for group in groups)
        if len(groups) < self._limits.max_batch_size and now_s - oldest < self._limits.max_wait_s:
            return []
        return list(groups[: self._limits.max_batch_size])


def _fitting(waiting: WaitingQueue[SequenceGroup], free: int) -> list[SequenceGroup]:
    """Return the next requests that fit.

    One that does not fit blocks those behind it, or it would starve.
    """
    chosen: list[SequenceGroup] = []
    if free <= 0:
        return chosen
    for group in waiting.peek(free):
        if group.max_num_seqs > free:
            break
        free -= group.max_num_seqs
        chosen.append(group)
    return chosen
