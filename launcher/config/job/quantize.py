"""Job quantize: store a model's weights in fewer bits and report what that saves and costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launcher.config.data.base import Corpus
from launcher.config.model.base import FOLDER_WITH_TOKENIZER
from launcher.config.paths import PathText
from launcher.config.quantization import Quantization
from launcher.config.run import BatchedJob, Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir

QUANTIZE_STAGES = ("build", "save", "compare", "measure", "sample")


@dataclass(frozen=True, kw_only=True)
class Quantize(BatchedJob):
    """Quantize by the group ``quantization``, and compare with the original model.

    It compares bytes, held-out loss, speed and a sample.
    """

    kind: ClassVar[str] = "quantize"
    trains: ClassVar[bool] = False

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
    """Repetitions of the speed measurement, original and quantized in turn."""

    def unused_strategy(self, run: Run) -> str:
        """Return that no strategy shards quantized weights."""
        return "job=quantize holds the whole model on one rank"

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
        return len(QUANTIZE_STAGES)

    def num_sequences(self, run: Run, *, world_size: int) -> None:
        """Stages are no batches; ``describe`` says what the models are compared on."""
        return

    def max_ranks(self, run: Run) -> int | None:
        """One rank holds both models."""
        return 1

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject a run that names no method, or has ranks that would have nothing to do."""
        yield from super().validate_run(run, world_size=world_size)
        if not isinstance(run.quantization, Quantization):
            why = "job=quantize needs a quantization method"
            yield ConfigError("quantization", "none", why=why, fix="set quantization=int8_weight")
        if world_size > 1:
            why = "one rank holds the original and the quantized model"
            yield ConfigError("backend.ranks", world_size, why=why, fix="set backend.ranks=1 parallel=single")
        if run.model.weights == "pretrained" and isinstance(run.data, Corpus) and run.data.trains_tokenizer:
            why = f"the perplexity of {run.model.name} is meaningful for its own tokenizer only"
            own = "model" if run.model.has_own_tokenizer else FOLDER_WITH_TOKENIZER
            yield ConfigError("data.tokenizer", run.data.tokenizer, why=why, fix=f"set data.tokenizer={own}")
        if run.precision.kind in ("fp8", "fp16", "tf32"):
            why = "layers that are not quantized must be in fp32 or bf16"
            yield ConfigError("precision", run.precision.kind, why=why, fix="set precision=bf16")
        if self.rate_batches:
            yield from run.model.validate_length(job__rate_prompt=self.rate_prompt, job__rate_tokens=self.rate_tokens)
        prompt = len(self.prompt.encode()) if self.tokenizer == "bytes" else 1  # at least: a rank counts its tokens
        yield from run.model.validate_length(job__sample_tokens=self.sample_tokens, spare=prompt)

    def folder(self, run_dir: RunDir) -> Path:
        """Return where the weights go."""
        return Path(self.output).expanduser() if self.output else run_dir.path / "model"

    def validate_machine(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield a package that is missing, and an output that would be overwritten."""
        yield from super().validate_machine(run, run_dir)
        if isinstance(run.quantization, Quantization):
            yield from run.quantization.validate_machine("quantization")
        folder = self.folder(run_dir)
        if run_dir.reserves(folder):
            fix = "name a folder outside the run directory, or leave it out"
            yield self.error("output", f"belongs to the run itself, whose directory is {run_dir.path}", fix)
        elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            yield self.error("output", "exists and is not empty, and nothing is overwritten", "name a new folder")

    def files(self) -> Iterator[str]:
        """Yield the weights and the report."""
        yield from ("quantize.json", "quantize.md")
        if self.output is None:
            yield "model/"

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the method and the comparisons."""
        if isinstance(run.quantization, Quantization):
            doc = type(run.quantization).__doc__ or ""
            yield "method", f"{run.quantization.kind}: {doc.strip().splitlines()[0].rstrip('.')}"
        yield "compared on", f"{self.eval_sequences} held-out sequences of {self.sequence_length} tokens"
        if self.output is not None:
            yield "output", self.output
