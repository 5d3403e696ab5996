"""Benchmark lm_eval: tasks of lm-evaluation-harness on the run's model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from launcher.config.lm_eval_tasks import TaskRequest, validate_tasks
from launcher.config.paths import PathText
from launcher.config.run import COMPUTING_GROUPS, LEARNING_GROUPS, Benchmark, Run
from launcher.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LmEvalBenchmark(Benchmark):
    """Tasks of lm-evaluation-harness (the package ``lm_eval``) on the run's model.

    Each rank holds the whole model and answers a share of each task's documents.
    """

    kind: ClassVar[str] = "lm_eval"
    used_groups: ClassVar[frozenset[str]] = COMPUTING_GROUPS - LEARNING_GROUPS - {"compile"}
    summary_fields: ClassVar[tuple[str, ...]] = ("tasks", "num_fewshot", "limit")
    max_ranks: ClassVar[int | None] = None
    isolation: ClassVar[str] = "documents divided over the ranks"
    needs_model: ClassVar[bool] = True
    supports_quantized: ClassVar[bool] = True

    tasks: tuple[PathText, ...] = ()
    """Names of tasks or groups (``arc_easy``, ``mmlu``), and YAML files of your own tasks."""

    num_fewshot: int | None = None
    """Examples before each question; ``null`` is what each task says."""

    limit: int | None = None
    """Only the first documents of each task, for a try; ``null`` takes all."""

    batch_size: int = 8
    """Requests in one forward pass of one rank."""

    apply_chat_template: bool = False
    """Whether prompts are turns of the tokenizer's chat template."""

    include_path: tuple[PathText, ...] = ()
    """Folders with further tasks that ``tasks`` can name."""

    tokenizer: PathText = "model"
    """Tokenizer of the texts: ``model`` (its own) or a folder."""

    log_samples: bool = False
    """Whether to write each document with its answers to ``samples_<task>.jsonl``."""

    bootstrap_iters: int = 100_000
    """Samples drawn for the standard errors that have no formula; 0 prints no standard errors."""

    run_unsafe_code: bool = False
    """Whether tasks may run code that the model writes (``humaneval``), on this machine."""

    repeats: int = 1
    """Always 1: the answers of a second round would be the same."""

    warmup: int = 0
    """Always 0: nothing is timed."""

    def validate(self) -> Iterator[ConfigError]:
        """Reject a run without tasks, and counts that are none."""
        yield from super().validate()
        yield from self.validate_minimum(1, "limit", "batch_size")
        yield from self.validate_minimum(0, "num_fewshot", "bootstrap_iters")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            yield self.error("tasks", "is empty or has duplicates", "set benchmark.tasks=[arc_easy]")
        for field, only in (("repeats", 1), ("warmup", 0)):
            if getattr(self, field) != only:
                yield self.error(field, "has no effect on tasks of lm_eval", f"leave benchmark.{field} out")

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject more ranks than documents."""
        yield from super().validate_run(run, world_size=world_size)
        if self.limit is not None and self.limit < world_size:
            why = f"leaves no document for some of the {world_size} ranks"
            yield self.error("limit", why, f"set benchmark.limit={world_size}, or backend.ranks={self.limit}")

    def validate_machine(self) -> Iterator[ConfigError]:
        """Yield a missing package, and task files that are missing or malformed."""
        yield from validate_tasks("benchmark.tasks", self.tasks, user=("benchmark", self.kind))
        for folder in self.include_path:
            if not Path(folder).is_dir():
                yield ConfigError(
                    "benchmark.include_path", folder, why="is no folder", fix="name a folder of YAML files"
                )

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the tasks."""
        yield "model", f"{run.model.name}, weights={run.model.weights}, precision={run.precision.kind}"
        yield "tasks", self.request.text

    @property
    def request(self) -> TaskRequest:
        """The tasks, and how they are answered."""
        return TaskRequest(
            option="benchmark.tasks",
            tasks=self.tasks,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            apply_chat_template=self.apply_chat_template,
            include_path=self.include_path,
            log_samples=self.log_samples,
            bootstrap_iters=self.bootstrap_iters,
            run_unsafe_code=self.run_unsafe_code,
        )
