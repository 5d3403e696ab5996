"""What the memory benchmark found, in the article's words and rank by rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.benchmarks.memory import PARTS, MemoryBenchmark
from launcher.benchmarks.results import Results, collect

if TYPE_CHECKING:
    from launcher.benchmarks.ranked import Taken
    from launcher.config import Run
    from launcher.parallel.base import StateBytes

_NOTABLE = 0.05
"""Share by which a part may be off the formula before it is told: padding and step counters are less."""

Formulas = Mapping[str, tuple["StateBytes", str]]
"""Bytes of a rank by strategy, and the sum in words."""


def report(benchmark: MemoryBenchmark, run: Run, found: Mapping[str, Sequence[Taken]], formulas: Formulas) -> Results:
    """Return what was measured beside what the formulas say."""
    shape = run.model.shape()
    assert shape is not None, "refused before anything starts"
    quantities = [*(f"{part}_bytes" for part in PARTS), "peak_bytes"]
    cases = [collect(name, [taken.numbers for taken in rounds], quantities) for name, rounds in found.items()]
    last = {name: rounds[-1].answers for name, rounds in found.items()}
    return Results(
        benchmark=benchmark,
        cases=cases,
        facts={name: _facts(last[name], *formulas[name]) for name in found},
        said=tuple(_said(shape.num_params, last, formulas)),
        metrics={"num_params": float(shape.num_params), **_metrics(last, formulas)},
        tables=tuple(_table(last, formulas)),
    )


def _facts(answers: Sequence[Mapping[str, Any]], state: StateBytes, words: str) -> dict[str, Any]:
    return {
        "formula": words,
        "formula_bytes": {part: getattr(state, part) for part in PARTS},
        "ranks": [dict(answer) for answer in answers],
    }


def _said(num_params: int, last: Mapping[str, Sequence[Mapping[str, Any]]], formulas: Formulas) -> Iterator[str]:
    """Yield what the article prints, and how far off the formula is."""
    yield f"parameters: {num_params:,}"
    for name, answers in last.items():
        held, expected = max(answer["optimizer_bytes"] for answer in answers), formulas[name][0].optimizer
        yield (
            f"optimizer state memory ({name}): {held / 1e9:.4f} GB a rank, "
            f"by the formula {expected / 1e9:.4f} GB, ratio {held / expected:.4f}"
        )
    for key, ratio in _metrics(last, formulas).items():
        if key.endswith("_ratio") and abs(ratio - 1) > _NOTABLE:
            strategy, _, part = key.removesuffix("_ratio").rpartition("/")
            yield f"{strategy}: {part} are {ratio:.3f} times what the formula says"


def _metrics(last: Mapping[str, Sequence[Mapping[str, Any]]], formulas: Formulas) -> dict[str, float]:
    """Return the bytes of the rank that holds most, by strategy and part, and their ratio to the formula."""
    found = {}
    for name, answers in last.items():
        for part in PARTS:
            held = max(answer[f"{part}_bytes"] for answer in answers)
            found[f"{name}/{part}_bytes"] = float(held)
            found[f"{name}/{part}_ratio"] = held / getattr(formulas[name][0], part)
    return found


def _table(last: Mapping[str, Sequence[Mapping[str, Any]]], formulas: Formulas) -> Iterator[str]:
    """Yield a Markdown table: a row for each rank, and for each part measured, formula and their ratio."""
    yield "MB on each rank, measured / by the formula (ratio):"
    yield ""
    yield f"| strategy | rank | {' | '.join(PARTS)} | all of it | peak above the start |"
    yield "|---" * (len(PARTS) + 4) + "|"
    for name, answers in last.items():
        state = formulas[name][0]
        for rank, answer in enumerate(answers):
            cells = [_beside(answer[f"{part}_bytes"], getattr(state, part)) for part in PARTS]
            whole = _beside(sum(answer[f"{part}_bytes"] for part in PARTS), state.total)
            yield f"| {name} | {rank} | {' | '.join(cells)} | {whole} | {answer['peak_bytes'] / 1e6:,.1f} |"


def _beside(held: int, expected: int) -> str:
    return f"{held / 1e6:,.3f} / {expected / 1e6:,.3f} ({held / expected:.3f})"
