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
    """What can wait."""

    @property
    def priority(self) -> int:
        """Higher is sooner."""

    @property
    def arrived_s(self) -> float:
        """When it came, on the clock of whoever asks."""


Item = TypeVar("Item", bound=Queueable)


class WaitingQueue(Generic[Item]):
    """Orders by priority, which grows by one for every ``aging_s`` of waiting; then by arrival.

    All of them age alike, so what is due first never depends on when it is asked: one key for each, made once.

    Args:
        aging_s: seconds of waiting that make up for one step of priority.
    """

    def __init__(self, aging_s: float) -> None:
        self._ageing_s = aging_s
        self._heap: list[tuple[float, int, Item]] = []
        self._count = itertools.count()
        self._gone: set[int] = set()
        self._numbers: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._heap) - len(self._gone)

    def __iter__(self) -> Iterator[Item]:
        """Yield all, most due first."""
        yield from (item for _, number, item in sorted(self._heap, key=_key) if number not in self._gone)

    def add(self, item: Item) -> None:
        """Put one in; one that is put back keeps its time of arrival, and with it its place."""
        number = next(self._count)
        self._numbers[id(item)] = number
        heapq.heappush(self._heap, (item.arrived_s / self._ageing_s - item.priority, number, item))

    def most_due(self, num: int) -> list[Item]:
        """Return the ``num`` that are due most, in order, leaving them in."""
        entries = heapq.nsmallest(num + len(self._gone), self._heap, key=_key)
        return [item for _, number, item in entries if number not in self._gone][:num]

    def first(self) -> Item | None:
        """Return what is due most, leaving it in."""
        while self._heap and self._heap[0][1] in self._gone:
            self._gone.discard(heapq.heappop(self._heap)[1])
        return self._heap[0][2] if self._heap else None

    def remove(self, item: Item) -> None:
        """Take one out, wherever it stands."""
        self._gone.add(self._numbers.pop(id(item)))
        self.first()
        if len(self._gone) > len(self._heap) // 2:  # those that left from the middle hold no memory for long
            self._heap = [entry for entry in self._heap if entry[1] not in self._gone]
            heapq.heapify(self._heap)
            self._gone.clear()


def _key(entry: tuple[float, int, object]) -> tuple[float, int]:
    return entry[:2]


class BatchingPolicy:
    """Chooses from the queue.

    Args:
        limits: which way, and how many.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits

    def due(
        self, waiting: WaitingQueue[SequenceGroup], running: Sequence[SequenceGroup], now_s: float
    ) -> list[SequenceGroup]:
        """Return who should be let in now, in order."""
        if not len(waiting):
            return []
        if self._limits.batching == "continuous":
            room = self._limits.max_num_seqs - sum(task.width for task in running)
            return _fitting(waiting, room)
        if running:
            return []
        if self._limits.batching == "none":
            return waiting.most_due(1)
        if self._limits.batching == "static":
            return self._first_of(list(waiting), now_s)
        alike: dict[int, list[SequenceGroup]] = defaultdict(list)
        for task in waiting:
            alike[-(-len(task.rows[0].tokens) // self._limits.bucket_size)].append(task)
        batches = [self._first_of(tasks, now_s) for tasks in alike.values()]
        # of those that are ready, the one whose first is due most: dictionaries keep the order of the queue
        return next(filter(None, batches), [])

    def _first_of(self, tasks: Sequence[SequenceGroup], now_s: float) -> list[SequenceGroup]:
        """Return a batch if it is full or has waited long enough, else nobody."""
        oldest = min(task.arrived_s for task in tasks)
        if len(tasks) < self._limits.max_batch_size and now_s - oldest < self._limits.max_wait_s:
            return []
        return list(tasks[: self._limits.max_batch_size])


def _fitting(waiting: WaitingQueue[SequenceGroup], room: int) -> list[SequenceGroup]:
    """Return the most due that fit; one that does not holds up those behind it, or it would wait for ever."""
    chosen: list[SequenceGroup] = []
    if room <= 0:
        return chosen
    for task in waiting.most_due(room):
        if task.width > room:
            break
        room -= task.width
        chosen.append(task)
    return chosen
