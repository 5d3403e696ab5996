"""Benchmarks of reading and writing: the run's data, and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from launcher.config.data.base import Corpus
from launcher.config.option_text import component_text
from launcher.config.run import COMPUTING_GROUPS, Benchmark, Run
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataBenchmark(Benchmark):
    """Tokenisation of the run's corpus into an empty cache, and batches read from the cache.

    Batches are made in the rank's own thread when a step asks for them: ``load`` says how many it gets a second.
    """

    kind: ClassVar[str] = "data"
    summary_fields: ClassVar[tuple[str, ...]] = ("threads", "sequence_length", "micro_batch")
    needs_model: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    threads: tuple[int, ...] = (1, 0)
    """Tokenizer threads, each a case; 0 is one per core that the process may use."""

    sequence_length: int = 128
    """Tokens of a sequence that is loaded."""

    micro_batch: int = 8
    """Sequences of a batch."""

    duration_s: float = 1.0
    """How long batches are loaded, in each round."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts that measure nothing."""
        yield from super().validate()
        yield from self.validate_minimum(1, "micro_batch")
        yield from self.validate_minimum(2, "sequence_length")
        if self.duration_s <= 0:
            yield self.error("duration_s", "must be above 0", "set benchmark.duration_s=1")
        if not self.threads or len(set(self.threads)) < len(self.threads) or min(self.threads) < 0:
            yield self.error("threads", "needs distinct numbers of at least 0", "set benchmark.threads=[1,0]")

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject data without text, and what its model would refuse of it."""
        if not isinstance(run.data, Corpus):
            why = "its tokens are made up, and no text is read"
            yield ConfigError("data", run.data.kind, why=why, fix="set data=text or data=hf")
            return
        shape = run.model.shape()
        if shape is None:
            return
        yield from run.model.validate_length(benchmark__sequence_length=self.sequence_length)
        if run.data.trains_tokenizer and run.data.vocab_size > shape.vocab_size:
            why = f"{run.model.name} has {shape.vocab_size} embedding rows, one per token"
            yield run.data.error("vocab_size", why, f"set data.vocab_size={shape.vocab_size}")

    @property
    def num_measurements(self) -> int:
        """Each number of threads, and loading, in each round."""
        return self.repeats * (len(self.threads) + 1)

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the data and its measurements."""
        yield "data", component_text(run.data)
        yield "tokenised", f"whole, into an empty cache, by {', '.join(map(thread_words, self.threads))}"
        yield "loaded", f"batches of {self.micro_batch} x {self.sequence_length} tokens for {self.duration_s:g} s"


def thread_words(count: int) -> str:
    """Return a number of threads as text."""
    return {0: "a thread a core", 1: "1 thread"}.get(count, f"{count} threads")


SavingMode = Literal["none", "disabled", "async", "dcp_save", "dcp_async_save", "deepspeed"]
NO_SAVING: Final[SavingMode] = "none"
_COPIED = ("single", "ddp", "fsdp")
"""Strategies of the torch engine, whose tensors torch.distributed.checkpoint takes."""


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchmark(Benchmark):
    """The same training loop without saving, and with each way to save.

    ``disabled`` and ``async`` are those of ``checkpoint.async_mode``. ``dcp_save`` and ``dcp_async_save`` are
    torch.distributed.checkpoint with the same tensors, ``deepspeed`` is DeepSpeed's ``save_checkpoint``.
    """

    kind: ClassVar[str] = "checkpoint"
    uses_parallel: ClassVar[bool] = True
    used_groups: ClassVar[frozenset[str]] = COMPUTING_GROUPS - {"schedule"}
    summary_fields: ClassVar[tuple[str, ...]] = ("modes", "saves", "every", "micro_batch", "sequence_length")
    max_ranks: ClassVar[int | None] = None
    isolation: ClassVar[str] = "on forks of the run's ranks"
    needs_model: ClassVar[bool] = True

    modes: tuple[SavingMode, ...] = ("none", "disabled", "async")
    """Ways to save that are compared.
    The seconds that saves add to the loop are known only if ``none`` is measured too."""

    saves: int = 3
    """Saves in a loop, and a further one that is restored."""

    every: int = 4
    """Optimizer steps before each save, and after the last."""

    micro_batch: int = 2
    """Sequences of each rank in a step."""

    sequence_length: int = 64
    """Tokens in each of them."""

    case_timeout_s: float = 600.0
    """Time limit of one loop, from building the model to restoring the checkpoint."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject loops without saves, and ways that are none or twice there."""
        yield from super().validate()
        yield from self.validate_minimum(1, "saves", "every", "micro_batch", "case_timeout_s")
        yield from self.validate_minimum(2, "sequence_length")
        if not self.modes or len(set(self.modes)) < len(self.modes):
            yield self.error("modes", "is empty or has duplicates", "leave benchmark.modes out")
        elif self.modes == (NO_SAVING,):
            yield self.error("modes", "saves nothing", "leave benchmark.modes out")

    @property
    def train_options(self) -> Mapping[str, Any]:
        """The loop."""
        steps = self.warmup + self.every * (self.saves + 2)
        return {"micro_batch": self.micro_batch, "sequence_length": self.sequence_length, "steps": steps}

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject strategies that only DeepSpeed can save, and sequences too long for the model."""
        kind, shape = run.parallel.kind, run.model.shape()
        peers = {mode for mode in self.modes if mode.startswith("dcp")}
        if peers and kind not in _COPIED:
            why = f"parallel={kind} has no tensors by name that torch.distributed.checkpoint could save"
            yield self.error("modes", why, f"leave {' and '.join(sorted(peers))} out, or set parallel=ddp")
        if "deepspeed" in self.modes and run.parallel.engine != "deepspeed":
            why = f"parallel={kind} does not train with DeepSpeed"
            yield self.error("modes", why, "leave deepspeed out, or set parallel=zero1")
        if shape is None:
            why = "its sizes are known only once it is downloaded"
            yield ConfigError("model", run.model.kind, why=why, fix="choose another model")
        else:
            yield from run.model.validate_length(benchmark__sequence_length=self.sequence_length)
        yield from run.parallel.validate_batch(run.batched_job.batch(run, world_size=world_size))

    @property
    def num_measurements(self) -> int:
        """Each way in each round."""
        return self.repeats * len(self.modes)

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the loop."""
        yield "model", f"{run.model.name}, parallel={run.parallel.kind}, precision={run.precision.kind}"
        steps = self.every * (self.saves + 1)
        yield "loop", f"{steps} steps, a save after every {self.every} of them but the last"
        yield "compared", ", ".join(self.modes)
