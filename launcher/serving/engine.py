"""The launcher's own engine: many sequences in one forward pass, each as if it were alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from launcher.serving.admission import check
from launcher.serving.base import Generator
from launcher.serving.continuing import Continuing, Outcome
from launcher.serving.limits import Limits
from launcher.serving.pages import PAGE
from launcher.serving.plan import StepPlan
from launcher.serving.rows import Task
from launcher.serving.scheduler import Counts, Scheduler, Step
from launcher.serving.values import Finish, Request, Sampling, Stats, Token, Update

if TYPE_CHECKING:
    from torch import Tensor


class Runs(Protocol):
    """What computes plans."""

    @property
    def isolates(self) -> bool:
        """Whether another plan may be tried after one that failed."""

    def run(self, plan: StepPlan) -> Tensor:
        """Return the scores that are asked for, in order; (wanted, vocabulary), fp32."""

    def close(self) -> None:
        """Give everything back."""


class Slots(Generator):
    """Schedules, has computed, samples.

    Args:
        runner: computes.
        limits: how much at a time.
        num_pages: room for keys and values.
        context: most tokens of a sequence that the model takes.
        vocab_size: of the model.
        ends: tokens that end a sequence.
        clock: seconds.
    """

    def __init__(
        self,
        runner: Runs,
        *,
        limits: Limits,
        num_pages: int,
        context: int,
        vocab_size: int,
        ends: Sequence[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._limits, self._clock = runner, limits, clock
        self._context = min(context, num_pages * PAGE)
        self._num_pages, self._vocab_size = num_pages, vocab_size
        self._scheduler = Scheduler(limits, num_pages=num_pages)
        self._continuing = Continuing(self._scheduler, context=self._context, ends=ends)
        self._tasks: dict[str, Task] = {}
        self._cancelled: set[str] = set()
        self._steps = self._generated = 0
        self._stepped_s = clock()

    @property
    def context(self) -> int:
        """Most tokens of a sequence: what the model takes, or the room where that is less."""
        return self._context

    def add(self, request: Request) -> None:
        """Queue a request, or refuse it."""
        check(
            request,
            known=self._tasks,
            context=self._context,
            vocab_size=self._vocab_size,
            num_pages=self._num_pages,
            max_requests=self._limits.max_requests,
        )
        if not self._tasks:
            self._stepped_s = self._clock()
        task = Task(request, self._clock())
        self._tasks[request.id] = task
        self._scheduler.waiting.add(task)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step."""
        if request_id in self._tasks:
            self._cancelled.add(request_id)

    def step(self) -> Sequence[Update]:
        """Go one step further."""
        updates = self._overdue()
        step = self._scheduler.step(self._clock())
        if step is not None:
            with self.profiler.step():
                updates += self._compute(step)
            self._steps += 1
        self._stepped_s = self._clock()
        return updates

    def stats(self) -> Stats:
        """Return where it stands."""
        counts = self._scheduler.counts
        return Stats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            kv_tokens=self._scheduler.held_tokens,
            kv_capacity=self._num_pages * PAGE,
            steps_total=self._steps,
            prompt_tokens_total=counts.prompt_tokens,
            generated_tokens_total=self._generated,
            padding_tokens_total=counts.padding_tokens,
            prefix_hit_tokens_total=counts.prefix_hits,
            prefix_query_tokens_total=counts.prefix_queries,
            preemptions_total=counts.preemptions,
            since_step_s=self._clock() - self._stepped_s if self._tasks else 0.0,
        )

    def warm_up(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Have sequences of each shape go through, one shape after the other, cut to what fits."""
        assert not self._tasks, "warming up is for before the first request"
        for number, (sequences, tokens) in enumerate(shapes):
            for index in range(min(sequences, self._limits.max_requests)):
                prompt = tuple(
                    (number + index + place) % self._vocab_size for place in range(min(tokens, self._context - 2))
                )
                sampling = Sampling(max_tokens=2, ignore_end=True)
                self.add(Request(id=f"warm-up {number} {index}", prompt=prompt or (0,), sampling=sampling))
            while self._tasks:
                self.step()
        self._scheduler.counts = Counts()
        self._steps = self._generated = 0

    def close(self) -> None:
        """Give everything back."""
        self._runner.close()

    def _overdue(self) -> list[Update]:
        """End what was cancelled or is out of time."""
        now = self._clock()
        updates = []
        for name, task in list(self._tasks.items()):
            request, age_s = task.request, now - task.arrived_s
            limits = (request.deadline_s, None if task.begun else request.queue_deadline_s)
            if name in self._cancelled:
                updates.append(self._end(task, "cancelled"))
            elif any(limit is not None and age_s > limit for limit in limits):
                updates.append(self._end(task, "timeout"))
        self._cancelled.clear()
        return updates

    def _compute(self, step: Step) -> list[Update]:
        """Run a step; where it fails, run what each request has in it alone, to tell whose fault it is."""
        try:
            scores = self._runner.run(step.plan)
        except Exception as error:  # whatever it is, the other requests go on
            if not self._runner.isolates:
                raise
            tasks = list(dict.fromkeys(row.task for row in step.rows))
            if len(tasks) == 1:
                return [self._end(tasks[0], "error", f"{type(error).__name__}: {error}")]
            return [update for task in tasks for update in self._compute(_part(step, task))]
        self._scheduler.computed(step)
        return [self._report(outcome) for outcome in self._continuing.go_on(step, scores)]

    def _report(self, outcome: Outcome) -> Update:
        task = outcome.task
        self._generated += len(outcome.tokens)
        if outcome.finish is not None:
            return self._end(task, outcome.finish, outcome.problem, field=outcome.field, tokens=outcome.tokens)
        return self._update(task, tokens=outcome.tokens)

    def _end(
        self, task: Task, finish: Finish, problem: str = "", *, field: str = "", tokens: tuple[Token, ...] = ()
    ) -> Update:
        self._scheduler.finish(task)
        self._continuing.forget(task)
        del self._tasks[task.request.id]
        return self._update(task, tokens=tokens, finish=finish, problem=problem, field=field)

    def _update(self, task: Task, *, tokens: tuple[Token, ...], finish: Finish | None = None, **why: str) -> Update:
        cached = 0 if task.told else task.cached_tokens
        task.told = True
        return Update(request=task.request.id, tokens=tokens, finish=finish, cached_tokens=cached, **why)


def _part(step: Step, task: Task) -> Step:
    """Return what one task has in a step; pages have been copied by then, or are copied once more."""
    pairs = [(row, part) for row, part in zip(step.rows, step.plan.segments, strict=True) if row.task is task]
    plan = StepPlan(tuple(part for _, part in pairs), copies=step.plan.copies)
    return Step(plan, tuple(row for row, _ in pairs))
