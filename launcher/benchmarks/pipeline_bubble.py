"""The idle share (bubble) of a pipeline, by formula and by its order of passes.

Forward pass, gradient of the input and gradient of the weight take equally long.

Forward pass, gradient of the input and gradient of the weight take equally long.

With p ranks, m micro-batches and v model chunks on each rank:

- GPipe (arXiv:1811.06965, sec. 2) and 1F1B (arXiv:2104.04473, sec. 2.2.1): (p - 1) / (m + p - 1)
- interleaved 1F1B (arXiv:2104.04473, sec. 2.2.2), m >= p: (p - 1) / (v m + p - 1)
- zero bubble: a rank waits (p - 1) (T_F + T_B - T_W), T_B being that of the input (ZB-H1, arXiv:2401.10241, sec. 2 and
  table 2). With equal times and v chunks this is (p - 1) / (3 v m + p - 1), interleaved for m >= p, in a V for
  m >= 2p - 1. The zero of the title needs an optimizer step that does not wait for all ranks, which is not how steps
  are taken here.

With fewer micro-batches a pipeline is never full and no formula holds; there it is the longest path through the
schedule's own order of passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.config.benchmark.distributed import PipelineCase
from launcher.errors import JobError

SchedulePass = tuple[int, str, int]
"""Chunk, kind (F forward, B backward, I and W its two halves), micro-batch."""
_SAME = 1e-9


def theory_of(one: PipelineCase, order: Mapping[Any, Any]) -> float | None:
    """Return the idle share by formula, or by the longest path where no formula holds.

    Raises:
        JobError: both are there and differ.
    """
    by_formula = formula_of(one)
    by_path = longest_path(order, chunks=one.stages * one.num_chunks) if order else None
    if by_path is not None and by_formula is not None and abs(by_path - by_formula) > _SAME:
        raise JobError(f"{one.description}: idle {by_formula:.2%} by the formula, {by_path:.2%} by the longest path")
    return by_formula if by_path is None else by_path


def formula_of(one: PipelineCase) -> float | None:
    """Return the idle share by formula; ``None`` if too few micro-batches fill the pipeline."""
    return bubble_fraction(one.schedule, ranks=one.stages, micro_batches=one.micro_batches, chunks=one.num_chunks)


def bubble_fraction(schedule: str, *, ranks: int, micro_batches: int, chunks: int) -> float | None:
    """Return the idle share by formula; ``None`` if too few micro-batches fill the pipeline."""
    ramp = ranks - 1
    if schedule in ("gpipe", "1f1b"):
        return ramp / (micro_batches + ramp)
    if micro_batches < (2 * ranks - 1 if schedule == "zbv" else ranks):
        return None
    return ramp / ((1 if schedule == "interleaved_1f1b" else 3) * chunks * micro_batches + ramp)


def longest_path(order: Mapping[int, Sequence[SchedulePass]], *, chunks: int) -> float:
    """Return the idle share of an order of passes, each started once its inputs exist."""
    done: dict[tuple[str, int, int], float] = {}
    clock, left = dict.fromkeys(order, 0.0), {rank: list(passes) for rank, passes in order.items()}
    work = sum(_length(kind) for passes in order.values() for _, kind, _ in passes)
    while any(left.values()):
        before = len(done)
        for rank, passes in left.items():
            while passes and all(need in done for need in _needs(passes[0], chunks)):
                chunk, kind, number = passes.pop(0)
                ready = max([done[need] for need in _needs((chunk, kind, number), chunks)], default=0.0)
                clock[rank] = max(clock[rank], ready) + _length(kind)
                done["gradient" if kind in "BI" else kind, chunk, number] = clock[rank]
        assert len(done) > before, "an order that waits for itself"
    return 1 - work / (len(order) * max(clock.values()))


def _length(kind: str) -> float:
    return 2.0 if kind == "B" else 1.0


def _needs(one: SchedulePass, chunks: int) -> list[tuple[str, int, int]]:
    chunk, kind, number = one
    if kind == "F":
        return [("F", chunk - 1, number)] if chunk else []
    if kind == "W":
        return [("gradient", chunk, number)]
    behind = [("gradient", chunk + 1, number)] if chunk < chunks - 1 else []
    return [("F", chunk, number), *behind]
