"""Benchmarks of memory: activation checkpointing, and model state by strategy."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from launcher.config.job.verify import SINGLE_PROCESS, Strategy
from launcher.config.job.verify import STRATEGIES as CATALOGUE
from launcher.config.run import Benchmark
from launcher.errors import ConfigError
from launcher.protocol.plan import StateBytes
from launcher.utils.text import did_you_mean

if TYPE_CHECKING:
    from launcher.benchmarks.harness import DistributedCase
    from launcher.benchmarks.results import BenchmarkCase, BenchmarkResults
    from launcher.config.run import Run
    from launcher.engines.context import Context


_NO_CHECKPOINTING = "none"


_ENCODER_STEP, _COMPARE_GRADIENTS = (
    "launcher.benchmarks.activation:encoder_step",
    "launcher.benchmarks.activation:compare_gradients",
)


@dataclass(frozen=True, kw_only=True)
class ActivationBenchmark(Benchmark):
    """One forward and backward pass of torch's TransformerEncoderLayers in fp32, on the same weights and inputs.

    The defaults are a BERT-base encoder on 32 sequences of 512 tokens: without checkpointing about 11 GB.
    """

    kind: ClassVar[str] = "activation"
    headline: ClassVar[tuple[str, ...]] = ("layers", "width", "heads", "batch", "sequence", "every", "repeats")

    layers: int = 12
    """Encoder layers."""

    width: int = 768
    """Size of a token's vector."""

    heads: int = 12
    """Attention heads; they divide the width."""

    feedforward: int = 3072
    """Width of the hidden layer of each feed-forward block."""

    batch: int = 32
    """Sequences."""

    sequence: int = 512
    """Tokens in each of them."""

    every: int = 2
    """The case between all and none: every so many layers one is recomputed, from the first one on."""

    def validate(self) -> Iterator[ConfigError]:
        """Refuse sizes that make no encoder, and a case that is another one again."""
        yield from super().validate()
        yield from self.validate_minimum(1, "layers", "width", "heads", "feedforward", "batch", "sequence")
        yield from self.validate_minimum(2, "every")
        if self.heads > 0 and self.width % self.heads:
            fitting = max(heads for heads in range(1, self.heads + 1) if self.width % heads == 0)
            why = f"{self.heads} heads do not divide width {self.width}"
            yield self.error("heads", why, f"set benchmark.heads={fitting}")

    @property
    def policies(self) -> Mapping[str, int]:
        """Name of each case, and every how many layers it recomputes one; 0 is never."""
        return {_NO_CHECKPOINTING: 0, f"every_{self.every}": self.every, "full": 1}

    @property
    def num_measurements(self) -> int:
        """Each policy in each round."""
        return self.repeats * len(self.policies)

    def run(self, context: Context) -> BenchmarkResults:
        """Measure all policies in turn and compare their gradients with those of the one that keeps everything."""
        from launcher.benchmarks.harness import sample_interleaved
        from launcher.benchmarks.results import BenchmarkResults, collect_case

        with tempfile.TemporaryDirectory(dir=context.run_dir.path, prefix="gradients-") as folder:
            files = {name: str(Path(folder) / f"{name}.safetensors") for name in self.policies}
            asked = {name: self._arguments(context, every, files[name]) for name, every in self.policies.items()}
            samples = sample_interleaved(_ENCODER_STEP, asked, repeats=self.repeats, context=context, exact_peaks=True)
            compared = {name: compare_files(files[_NO_CHECKPOINTING], files[name], context) for name in self.policies}
        cases = [collect_case(name, samples[name], ("peak_bytes", "step_s")) for name in self.policies]
        return BenchmarkResults(
            benchmark=self,
            cases=cases,
            facts={name: {**compared[name], **_sameness(samples[name])} for name in self.policies},
            said=tuple(self._said(cases, compared, samples)),
            metrics=_activation_metrics(cases, compared),
        )

    def _arguments(self, context: Context, every: int, gradients: str) -> dict[str, Any]:
        sizes = {key: value for key, value in asdict(self).items() if key not in ("repeats", "every")}
        return {**sizes, "every": every, "seed": context.run.job.seed, "rank": context.local_rank, "keep": gradients}

    def _said(
        self,
        cases: Sequence[BenchmarkCase],
        compared: Mapping[str, Any],
        samples: Mapping[str, Sequence[Mapping[str, Any]]],
    ) -> Iterator[str]:
        """Yield what the article prints, for each policy that recomputes something."""
        plain = cases[0]
        yield f"peak without checkpointing: {_peak_gb(plain):.2f} GB above the level before the step"
        for case in cases[1:]:
            saved, added = _memory_saved(plain, case), _time_added(plain, case)
            found = compared[case.name]
            yield f"peak with checkpointing ({case.name}): {_peak_gb(case):.2f} GB"
            yield f"memory saved ({case.name}): {saved:.1%}"
            yield f"time added ({case.name}): {added:.1%}"
            equal = f"{found['equal_tensors']} of {found['tensors']} gradient tensors equal bit for bit"
            yield f"largest difference ({case.name}): {found['largest_difference']:.3e}, {equal}"
        starts = {(sample["weights"], sample["inputs"]) for taken in samples.values() for sample in taken}
        same = "the same in every process" if len(starts) == 1 else f"NOT the same: {len(starts)} different ones"
        yield f"weights and inputs: {same}"


def compare_files(plain: str, other: str, context: Context) -> dict[str, Any]:
    """Return how the gradients in two files differ: tensors, those equal bit for bit, largest absolute difference."""
    from launcher.benchmarks.isolated import run_isolated

    return run_isolated(
        _COMPARE_GRADIENTS, {"one": plain, "other": other}, heartbeat=lambda: context.heartbeat.update("compare")
    )


def _sameness(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the digests of a case: one each where all its repeats computed the same."""
    return {key: sorted({sample[key] for sample in samples}) for key in ("weights", "inputs", "gradients")}


def _peak_gb(case: BenchmarkCase) -> float:
    return case.median("peak_bytes") / 1e9


def _memory_saved(plain: BenchmarkCase, case: BenchmarkCase) -> float:
    return 1 - case.median("peak_bytes") / plain.median("peak_bytes")


def _time_added(plain: BenchmarkCase, case: BenchmarkCase) -> float:
    """Return the median over rounds of the share of time added: a slow minute hits both sides of a round."""
    pairs = zip(plain.samples["step_s"], case.samples["step_s"], strict=True)
    return statistics.median(after / before for before, after in pairs) - 1


def _activation_metrics(cases: Sequence[BenchmarkCase], compared: Mapping[str, Any]) -> dict[str, float]:
    metrics = {}
    for case in cases[1:]:
        metrics[f"{case.name}/memory_saved"] = _memory_saved(cases[0], case)
        metrics[f"{case.name}/time_added"] = _time_added(cases[0], case)
        metrics[f"{case.name}/largest_difference"] = compared[case.name]["largest_difference"]
    return metrics


SINGLE_STRATEGY: Final = "single"


STRATEGIES: Final[dict[str, Strategy]] = {
    SINGLE_STRATEGY: SINGLE_PROCESS,
    # DeepSpeed's pipeline takes a step in one call, with no moment at which all of the state is there to be seen
    **{name: case for name, case in CATALOGUE.items() if case.parallel.kind != "deepspeed_pipeline"},
}
"""What can be measured: the strategies that job=verify compares, and one process."""


STATE_PARTS: Final = ("parameters", "gradients", "optimizer")


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

    strategies: tuple[str, ...] = (SINGLE_STRATEGY, "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")
    """What is measured: ``single`` on one rank, others on all; the names are those of job=verify."""

    batch: int = 4
    """Sequences in a step, over all ranks."""

    sequence: int = 64
    """Tokens in each of them."""

    case_timeout_s: float = 600.0
    """Time that one strategy gets, from building the model to its last step."""

    def validate(self) -> Iterator[ConfigError]:
        """Refuse names that are no strategy, and steps that are none."""
        yield from super().validate()
        yield from self.validate_minimum(1, "warmup", "batch", "case_timeout_s")
        yield from self.validate_minimum(2, "sequence")
        if not self.strategies or len(set(self.strategies)) < len(self.strategies):
            yield self.error("strategies", "names nothing, or something twice", "leave benchmark.strategies out")
        for name in self.strategies:
            if name not in STRATEGIES:
                why = f"there is no strategy {name} to measure"
                yield self.error("strategies", why, did_you_mean(name, STRATEGIES))

    @property
    def train_options(self) -> Mapping[str, Any]:
        """Steps of the whole batch; each strategy shares it out."""
        sizes = {"micro_batch": self.batch, "global_batch": self.batch, "sequence_length": self.sequence}
        return {**sizes, "steps": self.warmup + 1}

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Refuse models without a formula, sequences they do not take, and strategies that do not fit."""
        shape = run.model.shape()
        if shape is None:
            why = "its sizes, and so the formula, are known only once it is downloaded"
            yield ConfigError("model", run.model.kind, why=why, fix="choose another model")
            return
        if self.sequence > shape.max_position_embeddings:
            why = f"{run.model.name} takes at most {shape.max_position_embeddings} tokens"
            yield self.error("sequence", why, f"set benchmark.sequence={shape.max_position_embeddings}")
        for name in self.strategies:
            why_not = next(
                STRATEGIES[name].validate(run, world_size=_num_ranks(name, world_size), sequences=self.batch), None
            )
            if why_not is not None:
                yield self.error("strategies", f"{name}: {why_not}", "leave it out, or change what it names")

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

    def run(self, context: Context) -> BenchmarkResults | None:
        """Take the steps of each strategy in turn, on all ranks."""
        from launcher.benchmarks.harness import run_interleaved
        from launcher.benchmarks.memory import memory_report
        from launcher.verification.forked_ranks import preload_modules

        cases = {name: self._case(name, context) for name in self.strategies}
        preload_modules(context, deepspeed=any(case.run.parallel.engine == "deepspeed" for case in cases.values()))
        found = run_interleaved(cases, repeats=self.repeats, limit_s=self.case_timeout_s, context=context)
        return memory_report(self, context.run, found, self._formulas(cases)) if context.is_main else None

    def _case(self, name: str, context: Context) -> DistributedCase:
        from launcher.benchmarks.harness import DistributedCase, largest_of_ranks
        from launcher.benchmarks.memory import measure_state

        world_size = _num_ranks(name, context.world_size)
        run = STRATEGIES[name].apply(context.run, world_size=world_size, sequences=self.batch)
        return DistributedCase(
            run=run, world_size=world_size, work=partial(measure_state, warmup=self.warmup), fold=largest_of_ranks
        )

    def _formulas(self, cases: Mapping[str, DistributedCase]) -> dict[str, tuple[StateBytes, str]]:
        """Return what plans print of each strategy: bytes of a rank, and how they come about."""
        found = {}
        for name, case in cases.items():
            shape, parallel, precision = case.run.model.shape(), case.run.parallel, case.run.precision
            assert shape is not None, "refused before anything starts"
            words = parallel.formula(case.world_size, precision)
            found[name] = (parallel.state_bytes(shape, case.world_size, precision), words)
        return found


def _num_ranks(name: str, world_size: int) -> int:
    return 1 if name == SINGLE_STRATEGY else world_size
