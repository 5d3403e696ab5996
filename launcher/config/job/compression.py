"""Base of the jobs that save a smaller model and compare it with the original."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launcher.config.data.base import Corpus
from launcher.config.model.base import FOLDER_WITH_TOKENIZER
from launcher.config.paths import PathText
from launcher.config.run import BatchedJob, Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class CompressionJob(BatchedJob):
    """A job that changes the matrices of a model, saves it, and compares it with the original.

    It compares bytes, held-out loss, speed and a sample.
    """

    trains: ClassVar[bool] = False

    stages: ClassVar[tuple[str, ...]]
    """Stages of the work."""

    output: PathText | None = None
    """Folder of the weights; ``null`` is ``model`` in the run directory.
    A folder that has files in it is never overwritten."""

    eval_sequences: int = 64
    """Held-out sequences that both models are compared on."""

    prompt: str = "The capital of France is"
    """Text that both models continue, greedily."""

    sample_tokens: int = 32
    """Number of tokens that they generate."""

    tokenizer: PathText = "model"
    """``model`` (its own), ``data`` (the data group's), ``bytes`` (a token each), or a folder."""

    rate_batches: tuple[int, ...] = (1, 8)
    """Batch sizes of the speed measurement; ``[]`` skips it."""

    rate_prompt: int = 128
    """Prompt tokens of each sequence in the speed measurement."""

    rate_tokens: int = 32
    """Tokens generated for each sequence in the speed measurement."""

    repeats: int = 3
    """Repetitions of the speed measurement, after one that warms up."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts that measure nothing."""
        yield from super().validate()
        yield from self.validate_minimum(1, "eval_sequences", "sample_tokens", "rate_prompt", "rate_tokens", "repeats")
        if any(batch < 1 for batch in self.rate_batches):
            yield self.error("rate_batches", "each must be at least 1", "set job.rate_batches=[1,8]")
        if not self.prompt:
            yield self.error("prompt", "there is nothing to continue", "leave it out")

    def num_steps(self, run: Run, *, world_size: int) -> int:
        """Return the stages of the work."""
        return len(self.stages)

    def num_sequences(self, run: Run, *, world_size: int) -> None:
        """Stages are no batches; ``describe`` says what the models are compared on."""
        return

    def max_ranks(self, run: Run) -> int | None:
        """One rank holds the whole model."""
        return 1

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject ranks that would have nothing to do, and what the comparison cannot take."""
        yield from super().validate_run(run, world_size=world_size)
        if world_size > 1:
            why = f"one rank does all the work of job={self.kind}"
            yield ConfigError("backend.ranks", world_size, why=why, fix="set backend.ranks=1 parallel=single")
        if run.model.weights == "pretrained" and isinstance(run.data, Corpus) and run.data.trains_tokenizer:
            why = f"the perplexity of {run.model.name} is meaningful for its own tokenizer only"
            own = "model" if run.model.has_own_tokenizer else FOLDER_WITH_TOKENIZER
            yield ConfigError("data.tokenizer", run.data.tokenizer, why=why, fix=f"set data.tokenizer={own}")
        if self.rate_batches:
            yield from run.model.validate_length(job__rate_prompt=self.rate_prompt, job__rate_tokens=self.rate_tokens)
        prompt = len(self.prompt.encode()) if self.tokenizer == "bytes" else 1  # at least: a rank counts its tokens
        yield from run.model.validate_length(job__sample_tokens=self.sample_tokens, spare=prompt)

    def folder(self, run_dir: RunDir) -> Path:
        """Return where the weights go."""
        return Path(self.output).expanduser() if self.output else run_dir.path / "model"

    def validate_machine(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield an output that would be overwritten."""
        yield from super().validate_machine(run, run_dir)
        folder = self.folder(run_dir)
        if run_dir.reserves(folder):
            fix = "name a folder outside the run directory, or leave it out"
            yield self.error("output", f"belongs to the run itself, whose directory is {run_dir.path}", fix)
        elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            yield self.error("output", "exists and is not empty, and nothing is overwritten", "name a new folder")

    def files(self) -> Iterator[str]:
        """Yield the weights and the report."""
        yield from (f"{self.kind}.json", f"{self.kind}.md")
        if self.output is None:
            yield "model/"

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the comparisons."""
        yield "compared on", f"{self.eval_sequences} held-out sequences of {self.sequence_length} tokens"
        if self.output is not None:
            yield "output", self.output
