"""Benchmarks of memory: activation checkpointing, and model state by strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from launcher.config.job.verify import SINGLE_PROCESS, Strategy
from launcher.config.job.verify import STRATEGIES as CATALOGUE
from launcher.config.run import COMPUTING_GROUPS, Benchmark, Run
from launcher.errors import ConfigError
from launcher.utils.text import did_you_mean

NO_CHECKPOINTING = "none"


@dataclass(frozen=True, kw_only=True)
class ActivationBenchmark(Benchmark):
    """One forward and backward pass of torch's TransformerEncoderLayers in fp32.

    Weights and inputs are the same in every case.

    The defaults are a BERT-base encoder on 32 sequences of 512 tokens: without checkpointing about 11 GB.
    """

    kind: ClassVar[str] = "activation"
    summary_fields: ClassVar[tuple[str, ...]] = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "batch_size",
        "sequence_length",
        "every",
        "repeats",
    )

    num_hidden_layers: int = 12
    """Encoder layers."""

    hidden_size: int = 768
    """Size of a token's vector."""

    num_attention_heads: int = 12
    """Attention heads; they divide hidden_size."""

    intermediate_size: int = 3072
    """Width of the hidden layer of each feed-forward block."""

    batch_size: int = 32
    """Sequences."""

    sequence_length: int = 512
    """Tokens in each of them."""

    every: int = 2
    """The case between all and none: one of so many layers is recomputed, from the first on."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject sizes that make no encoder, and a case that is another one again."""
        yield from super().validate()
        yield from self.validate_minimum(
            1,
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "batch_size",
            "sequence_length",
        )
        yield from self.validate_minimum(2, "every")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            fitting = max(heads for heads in range(1, self.num_attention_heads + 1) if self.hidden_size % heads == 0)
            why = f"{self.num_attention_heads} heads do not divide hidden_size={self.hidden_size}"
            yield self.error("num_attention_heads", why, f"set benchmark.num_attention_heads={fitting}")

    @property
    def policies(self) -> Mapping[str, int]:
        """Name of each case, and every how many layers it recomputes one; 0 is never."""
        return {NO_CHECKPOINTING: 0, f"every_{self.every}": self.every, "full": 1}

    @property
    def num_measurements(self) -> int:
        """Each policy in each round."""
        return self.repeats * len(self.policies)


SINGLE_STRATEGY: Final = "single"

STRATEGIES: Final[dict[str, Strategy]] = {
    SINGLE_STRATEGY: SINGLE_PROCESS,
    # DeepSpeed's pipeline takes a step in one call, with no moment at which all of the state is there to be seen
    **{name: case for name, case in CATALOGUE.items() if case.parallel.kind != "deepspeed_pipeline"},
}
"""Strategies that can be measured: those of job=verify, and one process."""


@dataclass(frozen=True, kw_only=True)
class MemoryBenchmark(Benchmark):
    """Bytes of model state under each strategy, counted in real steps of the run's model.

    State is counted between the backward pass and the update of the last step, when all of it is there.
    """

    kind: ClassVar[str] = "memory"
    used_groups: ClassVar[frozenset[str]] = COMPUTING_GROUPS - {"schedule"}
    summary_fields: ClassVar[tuple[str, ...]] = ("strategies", "batch_size", "sequence_length")
    max_ranks: ClassVar[int | None] = None
    isolation: ClassVar[str] = "largest of all ranks, which are forks of the run's"
    needs_model: ClassVar[bool] = True

    repeats: int = 1
    """Measurements of each strategy, in turn; state is the same each time, peaks vary a little."""

    warmup: int = 1
    """Optimizer steps before the measured one, at least 1: the first one allocates the moments."""

    strategies: tuple[str, ...] = (SINGLE_STRATEGY, "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")
    """Strategies to measure, by their names in job=verify; ``single`` uses one rank."""

    batch_size: int = 4
    """Sequences in a step, over all ranks."""

    sequence_length: int = 64
    """Tokens in each of them."""

    case_timeout_s: float = 600.0
    """Time limit of one strategy, from building the model to its last step."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject names that are no strategy, and steps that are none."""
        yield from super().validate()
        yield from self.validate_minimum(1, "warmup", "batch_size", "case_timeout_s")
        yield from self.validate_minimum(2, "sequence_length")
        if not self.strategies or len(set(self.strategies)) < len(self.strategies):
            yield self.error("strategies", "is empty or has duplicates", "leave benchmark.strategies out")
        for name in self.strategies:
            if name not in STRATEGIES:
                why = f"there is no strategy {name} to measure"
                yield self.error("strategies", why, did_you_mean(name, STRATEGIES))

    @property
    def train_options(self) -> Mapping[str, Any]:
        """Steps of the whole batch; each strategy shares it out."""
        sizes = {
            "micro_batch": self.batch_size,
            "global_batch": self.batch_size,
            "sequence_length": self.sequence_length,
        }
        return {**sizes, "steps": self.warmup + 1}

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject models without a formula, sequences too long for them, and unfit strategies."""
        shape = run.model.shape()
        if shape is None:
            why = "its sizes, and so the formula, are known only once it is downloaded"
            yield ConfigError("model", run.model.kind, why=why, fix="choose another model")
            return
        yield from run.model.validate_length(benchmark__sequence_length=self.sequence_length)
        for name in self.strategies:
            why_not = next(
                STRATEGIES[name].validate(run, world_size=num_ranks(name, world_size), sequences=self.batch_size), None
            )
            if why_not is not None:
                yield self.error("strategies", f"{name}: {why_not}", "leave it out, or change what it names")

    @property
    def num_measurements(self) -> int:
        """Each strategy in each round."""
        return self.repeats * len(self.strategies)

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the strategies."""
        shape = run.model.shape()
        count = f", {shape.num_params:,} parameters" if shape is not None else ""
        yield "model", f"{run.model.name}{count}, precision={run.precision.kind}"
        yield "strategies", ", ".join(self.strategies)


def num_ranks(name: str, world_size: int) -> int:
    """Return the ranks that a strategy runs on."""
    return 1 if name == SINGLE_STRATEGY else world_size
