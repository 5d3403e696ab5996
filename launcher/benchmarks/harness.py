"""Measure cases in turn, each in its own process or in a fork of every rank; profile them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.isolated import run_isolated
from launcher.config.profile import ProfileUnit, TorchProfile
from launcher.errors import JobError
from launcher.profiling.profiler import Profiler, make_profiler
from launcher.protocol.metrics import MetricsWriter
from launcher.verification.forked_ranks import ERROR_KEY, TIME_KEY, CaseAnswer, ForkedRanks

if TYPE_CHECKING:
    from launcher.config.run import Run
    from launcher.engines.context import Context


def sample_interleaved(
    function: str, cases: Mapping[str, Mapping[str, Any]], *, repeats: int, context: Context, exact_peaks: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Call ``function`` for each case in turn (A B A B), in separate processes; answers by case.

    Every number among the answers is a metric as soon as it is there. With ``profile=true`` each case is taken once
    more afterwards, under the profiler.

    Args:
        function: ``module:name``, as ``run_isolated`` takes it.
        cases: arguments by name of the case.
        repeats: rounds.
        context: of this rank, which measures alone.
        exact_peaks: as ``run_isolated`` takes it.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    done, total, heartbeat = 0, repeats * len(cases), context.heartbeat.update
    with MetricsWriter(context.run_dir.metrics) as metrics:
        for round_ in range(1, repeats + 1):
            for name, arguments in cases.items():
                progress = partial(heartbeat, "measure", done, steps=total)
                answer = run_isolated(function, arguments, heartbeat=progress, exact_peaks=exact_peaks)
                answers[name].append(answer)
                done += 1
                numbers = {key: value for key, value in answer.items() if isinstance(value, int | float)}
                metrics.record(done, **{f"benchmark/{name}/{key}": value for key, value in numbers.items()})
                figures = ", ".join(f"{key} {value:,.6g}" for key, value in numbers.items())
                print(f"round {round_}/{repeats}  {name}: {figures}", flush=True)
    profile_cases(function, cases, context=context)
    return answers


Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class DistributedCase:
    """One way of doing the work."""

    run: Run
    """The run of the ranks' contexts in the case."""
    world_size: int
    """Ranks that take part, from the first on; the others wait for their next case."""
    work: Callable[[Context], CaseAnswer]
    """Function that each rank runs; its answer can be written as JSON."""
    fold: Callable[[Sequence[CaseAnswer]], Numbers]
    """Combines the ranks' answers, in the order of ranks."""


@dataclass(frozen=True, kw_only=True)
class CaseRun:
    """A case, once."""

    answers: Sequence[CaseAnswer]
    """By rank."""
    numbers: Numbers
    """The combined answers."""


def run_interleaved(
    cases: Mapping[str, DistributedCase], *, repeats: int, limit_s: float, context: Context
) -> dict[str, list[CaseRun]]:
    """Run each case in turn (A B A B); return each round's answers on rank 0, else nothing.

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
        context,
        folder="cases",
        limit_s=limit_s,
        heartbeat=lambda: context.heartbeat.update("measure", done, steps=total),
    )
    found: dict[str, list[CaseRun]] = {name: [] for name in cases}
    with MetricsWriter(context.run_dir.metrics) if context.is_main else nullcontext() as metrics:
        for round_ in range(1, repeats + 1):
            for name, case in cases.items():
                answers = ranks.run_case(f"{name}.{round_}", case.work, run=case.run, world_size=case.world_size)
                done += 1
                if metrics is None:
                    continue
                _raise_rank_error(name, answers)
                by_rank = [answers[rank] for rank in range(case.world_size)]
                numbers = case.fold(by_rank)
                found[name].append(CaseRun(answers=by_rank, numbers=numbers))
                metrics.record(done, **{f"benchmark/{name}/{key}": value for key, value in numbers.items()})
                figures = ", ".join(f"{key} {value:,.6g}" for key, value in numbers.items())
                print(f"round {round_}/{repeats}  {name}: {figures}", flush=True)
    ranks.finish()
    return found


def largest_of_ranks(answers: Sequence[CaseAnswer]) -> Numbers:
    """Return each number as it is on the rank where it is largest."""
    names = [name for name, value in answers[0].items() if isinstance(value, int | float)]
    return {name: max(answer[name] for answer in answers) for name in names}


def _raise_rank_error(name: str, answers: Mapping[int, CaseAnswer]) -> None:
    troubled = [(answer[TIME_KEY], rank) for rank, answer in answers.items() if ERROR_KEY in answer]
    if troubled:
        _, rank = min(troubled)  # the first to fail: others fail because of it
        raise JobError(f"{name} failed on rank {rank}: {answers[rank][ERROR_KEY]}; the log of that rank says more")


def profile_cases(function: str, cases: Mapping[str, Mapping[str, Any]], *, context: Context) -> None:
    """Call ``function`` once more for each case under the profiler, if the run asks for it.

    Args:
        function: ``module:name``, as ``run_isolated`` takes it.
        cases: arguments by name of the case.
        context: of this rank.
    """
    profile = context.run.profile
    if not isinstance(profile, TorchProfile):
        return
    for name, arguments in cases.items():
        place = {"folder": str(context.run_dir.profile), "name": profile_file_name(name, context)}
        heartbeat = partial(context.heartbeat.update, "profile")
        run_isolated(function, arguments, heartbeat=heartbeat, profile={"options": asdict(profile), **place})


def case_profiler(name: str, context: Context, *, unit: ProfileUnit = "engine steps") -> Profiler:
    """Return a profiler for one more pass of a case that is measured in this process."""
    return make_profiler(
        context.run.profile, unit=unit, folder=context.run_dir.profile, name=profile_file_name(name, context)
    )


def profile_file_name(case: str, context: Context) -> str:
    """Return a case's name as files can have it."""
    rank = f"rank{context.rank}." if context.world_size > 1 else ""
    return rank + re.sub(r"[^\w.-]+", "_", case)
