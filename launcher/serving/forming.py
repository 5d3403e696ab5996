"""Who is let in next, by the ways of batching."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from launcher.serving.limits import Limits
from launcher.serving.rows import Task
from launcher.serving.waiting import Waiting


class Forming:
    """Chooses from the queue.

    Args:
        limits: which way, and how many.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def due(self, waiting: Waiting[Task], running: Sequence[Task], now_s: float) -> list[Task]:
        """Return who should be let in now, in order."""
        if not len(waiting):
            return []
        if self._limits.batching == "continuous":
            room = self._limits.max_requests - sum(task.width for task in running)
            return _fitting(waiting, room)
        if running:
            return []
        if self._limits.batching == "none":
            return waiting.most_due(1)
        if self._limits.batching == "static":
            return self._first_of(list(waiting), now_s)
        alike: dict[int, list[Task]] = defaultdict(list)
        for task in waiting:
            alike[-(-len(task.rows[0].tokens) // self._limits.bucket)].append(task)
        batches = [self._first_of(tasks, now_s) for tasks in alike.values()]
        # of those that are ready, the one whose first is due most: dictionaries keep the order of the queue
        return next(filter(None, batches), [])

    def _first_of(self, tasks: Sequence[Task], now_s: float) -> list[Task]:
        """Return a batch if it is full or has waited long enough, else nobody."""
        oldest = min(task.arrived_s for task in tasks)
        if len(tasks) < self._limits.max_batch and now_s - oldest < self._limits.max_wait_s:
            return []
        return list(tasks[: self._limits.max_batch])


def _fitting(waiting: Waiting[Task], room: int) -> list[Task]:
    """Return the most due that fit; one that does not holds up those behind it, or it would wait for ever."""
    chosen: list[Task] = []
    if room <= 0:
        return chosen
    for task in waiting.most_due(room):
        if task.width > room:
            break
        room -= task.width
        chosen.append(task)
    return chosen
