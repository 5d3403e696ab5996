"""Measuring cases in turn on the ranks of a run, each in a fork of every rank that takes part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.errors import JobError
from launcher.training.metrics import MetricsWriter
from launcher.verification.fork import AT, TROUBLE, Answer
from launcher.verification.forked import ForkedRanks

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.context import Context

Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class RankedCase:
    """One way of doing the work."""

    run: Run
    """What the ranks' contexts hold there."""
    world_size: int
    """Ranks that take part, from the first on; the others wait for their next case."""
    work: Callable[[Context], Answer]
    """What each of them does; its answer is what JSON can hold."""
    fold: Callable[[Sequence[Answer]], Numbers]
    """What the ranks' answers come to, in the order of ranks."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A case, once."""

    answers: Sequence[Answer]
    """By rank."""
    numbers: Numbers
    """What they come to."""


def take_in_turn(
    cases: Mapping[str, RankedCase], *, repeats: int, limit_s: float, context: Context
) -> dict[str, list[Taken]]:
    """Take each case in turn, A B A B; return on rank 0 what was found in each round, and nothing elsewhere.

    What answers come to are metrics as soon as they are there.

    Args:
        cases: by name.
        repeats: rounds.
        limit_s: time that a case gets.
        context: of this rank in the run.

    Raises:
        JobError: on rank 0, a case failed on some rank; the message names both.
    """
    done, total = 0, repeats * len(cases)
    ranks = ForkedRanks(
        context, folder="cases", limit_s=limit_s, beat=lambda: context.heartbeat.beat("measure", done, steps=total)
    )
    found: dict[str, list[Taken]] = {name: [] for name in cases}
    with MetricsWriter(context.run_dir.metrics) if context.is_main else nullcontext() as metrics:
        for round_ in range(1, repeats + 1):
            for name, case in cases.items():
                answers = ranks.take(f"{name}.{round_}", case.work, run=case.run, world_size=case.world_size)
                done += 1
                if metrics is None:
                    continue
                _refuse_trouble(name, answers)
                by_rank = [answers[rank] for rank in range(case.world_size)]
                numbers = case.fold(by_rank)
                found[name].append(Taken(answers=by_rank, numbers=numbers))
                metrics.record(done, **{f"benchmark/{name}/{key}": value for key, value in numbers.items()})
                told = ", ".join(f"{key} {value:,.6g}" for key, value in numbers.items())
                print(f"round {round_}/{repeats}  {name}: {told}", flush=True)
    ranks.leave()
    return found


def largest(answers: Sequence[Answer]) -> Numbers:
    """Return each number as it is on the rank where it is largest."""
    names = [name for name, value in answers[0].items() if isinstance(value, int | float)]
    return {name: max(answer[name] for answer in answers) for name in names}


def _refuse_trouble(name: str, answers: Mapping[int, Answer]) -> None:
    troubled = [(answer[AT], rank) for rank, answer in answers.items() if TROUBLE in answer]
    if troubled:
        _, rank = min(troubled)  # the first to fail: others fail because of it
        raise JobError(f"{name} failed on rank {rank}: {answers[rank][TROUBLE]}; the log of that rank says more")
