"""Measuring cases in turn, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.isolated import run_isolated
from launcher.benchmarks.profiled import profile_cases
from launcher.training.metrics import MetricsWriter

if TYPE_CHECKING:
    from launcher.context import Context


def sample_in_turn(
    function: str, cases: Mapping[str, Mapping[str, Any]], *, repeats: int, context: Context, exact_peaks: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Call ``function`` for each case in turn, A B A B, each time in a process of its own; return the answers by case.

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
    done, total, beat = 0, repeats * len(cases), context.heartbeat.beat
    with MetricsWriter(context.run_dir.metrics) as metrics:
        for round_ in range(1, repeats + 1):
            for name, arguments in cases.items():
                progress = partial(beat, "measure", done, steps=total)
                answer = run_isolated(function, arguments, beat=progress, exact_peaks=exact_peaks)
                answers[name].append(answer)
                done += 1
                numbers = {key: value for key, value in answer.items() if isinstance(value, int | float)}
                metrics.record(done, **{f"benchmark/{name}/{key}": value for key, value in numbers.items()})
                told = ", ".join(f"{key} {value:,.6g}" for key, value in numbers.items())
                print(f"round {round_}/{repeats}  {name}: {told}", flush=True)
    profile_cases(function, cases, context=context)
    return answers
