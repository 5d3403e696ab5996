"""Bytes of model state on each rank by strategy, measured beside the formula that plans print."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final

from launcher.benchmarks.base import Benchmark
from launcher.errors import ConfigError
from launcher.parallel.base import StateBytes
from launcher.suggest import did_you_mean
from launcher.verification.case import REFERENCE, Case
from launcher.verification.catalogue import CATALOGUE

if TYPE_CHECKING:
    from launcher.benchmarks.ranked import RankedCase
    from launcher.benchmarks.results import Results
    from launcher.config import Run
    from launcher.context import Context

SINGLE: Final = "single"
STRATEGIES: Final[dict[str, Case]] = {
    SINGLE: REFERENCE,
    # DeepSpeed's pipeline takes a step in one call, with no moment at which all of the state is there to be seen
    **{name: case for name, case in CATALOGUE.items() if case.parallel.kind != "deepspeed_pipeline"},
}
"""What can be measured: the strategies that job=verify compares, and one process."""

PARTS: Final = ("parameters", "gradients", "optimizer")


@dataclass(frozen=True, kw_only=True)
class MemoryBenchmark(Benchmark):
    """Each strategy takes real steps on the run's ranks, with the run's model, and counts what its tensors take.

    State is counted between the backward pass and the update of the last step, when all of it is there.
    """

    kind: ClassVar[str] = "memory"
    headline: ClassVar[tuple[str, ...]] = ("strategies", "batch", "sequence")
    max_ranks: ClassVar[int | None] = None
    how: ClassVar[str] = "largest of all ranks, which are forks of the run's"
    needs_model: ClassVar[bool] = True

    repeats: int = 1
    """Times each strategy is measured, all in turn; state takes the same each time, peaks vary a little."""

    warmup: int = 1
    """Optimiser steps before the one that is looked at, at least 1: the first one makes the moments."""

    strategies: tuple[str, ...] = (SINGLE, "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")
    """What is measured: ``single`` on one rank, others on all; the names are those of job=verify."""

    batch: int = 4
    """Sequences in a step, over all ranks."""

    sequence: int = 64
    """Tokens in each of them."""

    case_timeout_s: float = 600.0
    """Time that one strategy gets, from building the model to its last step."""

    def problems(self) -> Iterator[ConfigError]:
        """Refuse names that are no strategy, and steps that are none."""
        yield from super().problems()
        yield from self.below(1, "warmup", "batch", "case_timeout_s")
        yield from self.below(2, "sequence")
        if not self.strategies or len(set(self.strategies)) < len(self.strategies):
            yield self.refuse("strategies", "names nothing, or something twice", "leave benchmark.strategies out")
        for name in self.strategies:
            if name not in STRATEGIES:
                why = f"there is no strategy {name} to measure"
                yield self.refuse("strategies", why, did_you_mean(name, STRATEGIES))

    @property
    def train_options(self) -> Mapping[str, Any]:
        """Steps of the whole batch; each strategy shares it out."""
        sizes = {"micro_batch": self.batch, "global_batch": self.batch, "sequence_length": self.sequence}
        return {**sizes, "steps": self.warmup + 1}

    def refusals(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Refuse models without a formula, sequences they do not take, and strategies that do not fit."""
        shape = run.model.shape()
        if shape is None:
            why = "its sizes, and so the formula, are known only once it is downloaded"
            yield ConfigError("model", run.model.kind, why=why, fix="choose another model")
            return
        if self.sequence > shape.context:
            why = f"{run.model.name} takes at most {shape.context} tokens"
            yield self.refuse("sequence", why, f"set benchmark.sequence={shape.context}")
        for name in self.strategies:
            why_not = STRATEGIES[name].misfit(run, world_size=_ranks(name, world_size), sequences=self.batch)
            if why_not is not None:
                yield self.refuse("strategies", f"{name}: {why_not}", "leave it out, or change what it names")

    @property
    def num_measurements(self) -> int:
        """Each strategy in each round."""
        return self.repeats * len(self.strategies)

    def outline(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the strategies."""
        shape = run.model.shape()
        count = f", {shape.num_params:,} parameters" if shape is not None else ""
        yield "model", f"{run.model.name}{count}, precision={run.precision.kind}"
        yield "strategies", ", ".join(self.strategies)

    def run(self, context: Context) -> Results | None:
        """Take the steps of each strategy in turn, on all ranks."""
        from launcher.benchmarks.ranked import take_in_turn
        from launcher.benchmarks.report_of_memory import report
        from launcher.verification.preload import preload

        cases = {name: self._case(name, context) for name in self.strategies}
        preload(context, deepspeed=any(case.run.parallel.engine == "deepspeed" for case in cases.values()))
        found = take_in_turn(cases, repeats=self.repeats, limit_s=self.case_timeout_s, context=context)
        return report(self, context.run, found, self._formulas(cases)) if context.is_main else None

    def _case(self, name: str, context: Context) -> RankedCase:
        from launcher.benchmarks.ranked import RankedCase, largest
        from launcher.benchmarks.state import hold_state

        world_size = _ranks(name, context.world_size)
        run = STRATEGIES[name].apply(context.run, world_size=world_size, sequences=self.batch)
        return RankedCase(run=run, world_size=world_size, work=partial(hold_state, warmup=self.warmup), fold=largest)

    def _formulas(self, cases: Mapping[str, RankedCase]) -> dict[str, tuple[StateBytes, str]]:
        """Return what plans print of each strategy: bytes of a rank, and how they come about."""
        found = {}
        for name, case in cases.items():
            shape, parallel, precision = case.run.model.shape(), case.run.parallel, case.run.precision
            assert shape is not None, "refused before anything starts"
            words = parallel.formula(case.world_size, precision)
            found[name] = (parallel.state_bytes(shape, case.world_size, precision), words)
        return found


def _ranks(name: str, world_size: int) -> int:
    return 1 if name == SINGLE else world_size
