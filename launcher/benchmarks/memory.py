"""The memory benchmark: bytes of model state that a rank holds, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from launcher.benchmarks.harness import DistributedCase, largest_of_ranks, run_interleaved
from launcher.benchmarks.instruments import PeakMemory, random_batches
from launcher.benchmarks.results import BenchmarkResults, collect_case
from launcher.config.benchmark.memory import STRATEGIES, MemoryBenchmark, num_ranks
from launcher.engines.base import make_engine
from launcher.profiling.performance import StepClock
from launcher.protocol.plan import StateBytes
from launcher.utils.heap import mmap_large_allocations
from launcher.verification.forked_ranks import preload_modules

if TYPE_CHECKING:
    from launcher.benchmarks.harness import CaseRun
    from launcher.config.run import Run
    from launcher.engines.context import Context
    from launcher.protocol.plan import StateBytes
    from launcher.verification.forked_ranks import CaseAnswer


STATE_PARTS = ("parameters", "gradients", "optimizer")


def run_memory_benchmark(benchmark: MemoryBenchmark, context: Context) -> BenchmarkResults | None:
    """Take the steps of each strategy in turn, on all ranks."""
    cases = {name: _make_case(benchmark, name, context) for name in benchmark.strategies}
    preload_modules(context, deepspeed=any(case.run.parallel.engine == "deepspeed" for case in cases.values()))
    found = run_interleaved(cases, repeats=benchmark.repeats, limit_s=benchmark.case_timeout_s, context=context)
    return memory_report(benchmark, context.run, found, _formulas(benchmark, cases)) if context.is_main else None


def _make_case(benchmark: MemoryBenchmark, name: str, context: Context) -> DistributedCase:

    world_size = num_ranks(name, context.world_size)
    run = STRATEGIES[name].apply(context.run, world_size=world_size, sequences=benchmark.batch_size)
    return DistributedCase(
        run=run, world_size=world_size, work=partial(measure_state, warmup=benchmark.warmup), fold=largest_of_ranks
    )


def _formulas(benchmark: MemoryBenchmark, cases: Mapping[str, DistributedCase]) -> dict[str, tuple[StateBytes, str]]:
    """Return each strategy's bytes on a rank, and the formula that plans print."""
    found = {}
    for name, case in cases.items():
        shape, parallel, precision = case.run.model.shape(), case.run.parallel, case.run.precision
        assert shape is not None, "refused before anything starts"
        words = parallel.state_formula(case.world_size, precision)
        found[name] = (parallel.state_bytes(shape, case.world_size, precision), words)
    return found


def measure_state(context: Context, *, warmup: int) -> CaseAnswer:
    """Build the model under its strategy and take steps; return bytes by part, and peak bytes.

    Args:
        context: of this rank.
        warmup: steps before the one that is looked at; the first makes the moments, so there is one at least.
    """
    cuda = torch.cuda.is_available()
    mmap_large_allocations()
    peak = PeakMemory(torch.device("cuda", context.local_rank) if cuda else torch.device("cpu"))
    samples: list[StateBytes] = []
    clock = UpdateClock(context, cuda=cuda)
    with make_engine(context, clock) as engine:
        clock.before_update = lambda: samples.append(engine.state_bytes())
        batches = random_batches(context)
        for _ in range(warmup + 1):
            result = engine.step(batches, lr=context.run.optimizer.lr)
            assert not result.skipped, "a step without an update"
        # parameters that DeepSpeed has partitioned are empty, and know their size
        num_params = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
        above = peak.above_before()
    last = samples[-1]
    return {
        "num_params": num_params,
        "parameters_bytes": last.parameters,
        "gradients_bytes": last.gradients,
        "optimizer_bytes": last.optimizer,
        "host_bytes": last.host,
        "peak_bytes": above,
    }


class UpdateClock(StepClock):
    """A clock by which one looks in between the backward pass and the update."""

    def __init__(self, context: Context, *, cuda: bool) -> None:
        super().__init__(context.heartbeat, cuda=cuda)
        self.before_update: Callable[[], None] = lambda: None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; look first where it is the update."""
        if name == "optimizer":
            self.before_update()
        with super().phase(name):
            yield


_NOTABLE = 0.05
"""Relative difference from the formula that is reported: padding and step counters are less."""
Formulas = Mapping[str, tuple["StateBytes", str]]
"""Bytes of a rank by strategy, and the formula as text."""


def memory_report(
    benchmark: MemoryBenchmark, run: Run, found: Mapping[str, Sequence[CaseRun]], formulas: Formulas
) -> BenchmarkResults:
    """Return the measured bytes and those by the formulas."""
    shape = run.model.shape()
    assert shape is not None, "refused before anything starts"
    quantities = [*(f"{part}_bytes" for part in STATE_PARTS), "peak_bytes"]
    cases = [collect_case(name, [taken.numbers for taken in rounds], quantities) for name, rounds in found.items()]
    last = {name: rounds[-1].answers for name, rounds in found.items()}
    return BenchmarkResults(
        benchmark=benchmark,
        cases=cases,
        facts={name: _facts(last[name], *formulas[name]) for name in found},
        findings=tuple(_findings(shape.num_params, last, formulas)),
        metrics={"num_params": float(shape.num_params), **_metrics(last, formulas)},
        tables=tuple(_table(last, formulas)),
    )


def _facts(answers: Sequence[Mapping[str, Any]], state: StateBytes, words: str) -> dict[str, Any]:
    return {
        "formula": words,
        "formula_bytes": {part: getattr(state, part) for part in STATE_PARTS},
        "ranks": [dict(answer) for answer in answers],
    }


def _findings(num_params: int, last: Mapping[str, Sequence[Mapping[str, Any]]], formulas: Formulas) -> Iterator[str]:
    """Yield the article's figures, and the error of the formula."""
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
    """Return by strategy and part the largest rank's bytes, and their ratio to the formula."""
    found = {}
    for name, answers in last.items():
        for part in STATE_PARTS:
            held = max(answer[f"{part}_bytes"] for answer in answers)
            found[f"{name}/{part}_bytes"] = float(held)
            found[f"{name}/{part}_ratio"] = held / getattr(formulas[name][0], part)
    return found


def _table(last: Mapping[str, Sequence[Mapping[str, Any]]], formulas: Formulas) -> Iterator[str]:
    """Yield a Markdown table, a row per rank: measured bytes, formula and ratio of each part."""
    yield "MB on each rank, measured / by the formula (ratio):"
    yield ""
    yield f"| strategy | rank | {' | '.join(STATE_PARTS)} | all of it | peak above the start |"
    yield "|---" * (len(STATE_PARTS) + 4) + "|"
    for name, answers in last.items():
        state = formulas[name][0]
        for rank, answer in enumerate(answers):
            cells = [_beside(answer[f"{part}_bytes"], getattr(state, part)) for part in STATE_PARTS]
            whole = _beside(sum(answer[f"{part}_bytes"] for part in STATE_PARTS), state.total)
            yield f"| {name} | {rank} | {' | '.join(cells)} | {whole} | {answer['peak_bytes'] / 1e6:,.1f} |"


def _beside(held: int, expected: int) -> str:
    return f"{held / 1e6:,.3f} / {expected / 1e6:,.3f} ({held / expected:.3f})"
