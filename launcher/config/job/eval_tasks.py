"""Tasks of lm-evaluation-harness that a training run answers at every evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.config.data.base import Corpus
from launcher.config.lm_eval_tasks import TaskRequest, validate_tasks
from launcher.config.option_text import component_text
from launcher.config.paths import PathText
from launcher.config.run import BatchedJob, Run
from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir

TASK_METRICS = "lm_eval/"
"""How the names of the tasks' metrics begin, without ``eval/``."""
_DETAILS = ("eval_task_limit", "eval_task_fewshot", "eval_task_chat_template")
_SPLIT = ("tensor", "sequence", "pipeline")


@dataclass(frozen=True, kw_only=True)
class TaskAnsweringJob(BatchedJob):
    """A job whose evaluations answer tasks."""

    eval_tasks: tuple[PathText, ...] = ()
    """Tasks of lm-evaluation-harness that every evaluation answers.
    Entries are names and YAML files, as of ``benchmark.tasks``. ``eval/lm_eval/<task>/<metric>`` is recorded, which is
    what ``benchmark=lm_eval`` finds with a checkpoint."""

    eval_task_limit: int | None = None
    """Only the first documents of each task; ``null`` takes all."""

    eval_task_fewshot: int | None = None
    """Examples before each question; ``null`` is what each task says."""

    eval_task_chat_template: bool = False
    """Whether prompts are turns of the tokenizer's chat template."""

    @property
    def task_request(self) -> TaskRequest:
        """The tasks, and how they are answered."""
        return TaskRequest(
            option="job.eval_tasks",
            tasks=self.eval_tasks,
            num_fewshot=self.eval_task_fewshot,
            limit=self.eval_task_limit,
            apply_chat_template=self.eval_task_chat_template,
        )

    def unused_options(self, run: Run) -> Mapping[str, str]:
        """Add how tasks are answered, where there are none."""
        why = "job.eval_tasks names no task"
        return {**super().unused_options(run), **({} if self.eval_tasks else dict.fromkeys(_DETAILS, why))}

    def validate(self) -> Iterator[ConfigError]:
        """Reject counts that are none, and tasks named twice."""
        yield from super().validate()
        yield from self.validate_minimum(1, "eval_task_limit")
        yield from self.validate_minimum(0, "eval_task_fewshot")
        if len(set(self.eval_tasks)) < len(self.eval_tasks):
            yield self.error("eval_tasks", "has duplicates", "name each task once")

    def validate_run(self, run: Run, *, world_size: int) -> Iterator[ConfigError]:
        """Reject strategies without a whole model on a rank, and data without a tokenizer."""
        yield from super().validate_run(run, world_size=world_size)
        if not self.eval_tasks:
            return
        dims = run.parallel.dims(world_size)
        if any(getattr(dims, name) > 1 for name in _SPLIT) or getattr(run.parallel, "offload_parameters", "") == "nvme":
            why = f"under {component_text(run.parallel)} no rank can hold the whole model to answer with"
            fix = "set parallel=ddp, fsdp, zero2 or zero3, or run benchmark=lm_eval on a checkpoint"
            yield self.error("eval_tasks", why, fix)
        if not isinstance(run.data, Corpus):
            why = f"data={run.data.kind} has no tokenizer for their texts"
            yield self.error("eval_tasks", why, "leave it out, or set data=auto")
        if self.eval_task_limit is not None and self.eval_task_limit < world_size:
            why = f"leaves no document for some of the {world_size} ranks"
            yield self.error("eval_task_limit", why, f"set job.eval_task_limit={world_size}")

    def validate_machine(self, run: Run, run_dir: RunDir) -> Iterator[ConfigError]:
        """Yield a missing package, and task files that are missing or malformed."""
        yield from super().validate_machine(run, run_dir)
        if self.eval_tasks:
            user = ("job.eval_tasks", f"[{','.join(self.eval_tasks)}]")
            yield from validate_tasks("job.eval_tasks", self.eval_tasks, user=user)

    def describe(self, run: Run, *, world_size: int) -> Iterator[tuple[str, str]]:
        """Yield the tasks."""
        yield from super().describe(run, world_size=world_size)
        if self.eval_tasks:
            yield "answers tasks", f"{self.task_request.text}; at every evaluation, divided over the ranks"
