"""What the checkpoint benchmark found."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from launcher.benchmarks.checkpoint import NONE, CheckpointBenchmark
from launcher.benchmarks.results import Case, Results
from launcher.benchmarks.units import spread

if TYPE_CHECKING:
    from launcher.benchmarks.ranked import Numbers, Taken
    from launcher.verification.fork import Answer


def fold(answers: Sequence[Answer]) -> Numbers:
    """Return what the ranks of a loop found together; each second is that of the slowest rank."""
    found = {"loop_s": max(answer["loop_s"] for answer in answers)}
    if "restore_s" in answers[0]:
        stalls = [max(by_rank) for by_rank in zip(*(answer["stalls_s"] for answer in answers), strict=True)]
        num_bytes, durable_s = answers[0]["checkpoint_bytes"], statistics.median(answers[0]["durable_s"])
        found |= {
            "stall_s": statistics.median(stalls),
            "durable_s": durable_s,
            "checkpoint_bytes": num_bytes,
            "written_mb_per_s": num_bytes / durable_s / 1e6,
            "restore_s": max(answer["restore_s"] for answer in answers),
        }
    return found


def report(benchmark: CheckpointBenchmark, found: Mapping[str, Sequence[Taken]]) -> Results:
    """Return the findings of all ways."""
    added = _added(benchmark, found)
    cases = [
        Case(
            name=way,
            samples={key: tuple(taken.numbers[key] for taken in rounds) for key in rounds[0].numbers}
            | ({"added_per_save_s": added[way]} if way in added else {}),
        )
        for way, rounds in found.items()
    ]
    return Results(
        benchmark=benchmark,
        cases=cases,
        facts={way: {"rounds": [list(taken.answers) for taken in rounds]} for way, rounds in found.items()},
        said=tuple(_said(cases)),
        metrics={f"{case.name}/{key}": case.median(key) for case in cases for key in case.samples},
    )


def _added(benchmark: CheckpointBenchmark, found: Mapping[str, Sequence[Taken]]) -> dict[str, tuple[float, ...]]:
    """Return by how much a save made the loop longer, in each round: standing still, and slower steps."""
    if NONE not in found:
        return {}
    plain = [taken.numbers["loop_s"] for taken in found[NONE]]
    return {
        way: tuple(
            (taken.numbers["loop_s"] - before) / benchmark.saves for taken, before in zip(rounds, plain, strict=True)
        )
        for way, rounds in found.items()
        if way != NONE
    }


def _said(cases: Sequence[Case]) -> Iterator[str]:
    for case in cases:
        of = case.samples
        if case.name == NONE:
            continue
        yield f"{case.name}: training stands still for {spread('stall_s', of['stall_s'])} s a save"
        if "added_per_save_s" in of:
            yield f"{case.name}: the loop is longer by {spread('added_per_save_s', of['added_per_save_s'])} s a save"
        yield (
            f"{case.name}: {case.median('checkpoint_bytes'):,.0f} bytes on the disk after "
            f"{case.median('durable_s'):.3f} s, {case.median('written_mb_per_s'):,.0f} MB/s; "
            f"restored in {case.median('restore_s'):.3f} s, weights equal bit for bit"
        )
    if any(case.name == "asynchronous" for case in cases):
        yield "asynchronous: by torch's async_save of the same tensors; job=train saves in the way of blocking"
