"""Benchmark lm_eval: tasks of lm-evaluation-harness on the run's model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from launcher.config.paths import PathText
from launcher.config.run import COMPUTING_GROUPS, LEARNING_GROUPS, Benchmark, Run
from launcher.errors import ConfigError

_FILE_ENDINGS = (".yaml", ".yml")


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
        if importlib.util.find_spec("lm_eval") is None:
            fix = "install it: pip install 'launcher[eval]'"
            yield ConfigError("benchmark", self.kind, why="the package lm_eval is not installed", fix=fix)
        for name in self.tasks:
            if is_task_file(name) and (why := _task_file_problem(Path(name))):
                yield ConfigError("benchmark.tasks", name, why=why, fix="correct the file, or name another one")
        for folder in self.include_path:
            if not Path(folder).is_dir():
                yield ConfigError(
                    "benchmark.include_path", folder, why="is no folder", fix="name a folder of YAML files"
                )

    def describe(self, run: Run) -> Iterator[tuple[str, str]]:
        """Yield the model and the tasks."""
        yield "model", f"{run.model.name}, weights={run.model.weights}, precision={run.precision.kind}"
        shots = "as each task says" if self.num_fewshot is None else str(self.num_fewshot)
        documents = "all documents" if self.limit is None else f"the first {self.limit} documents of each"
        yield "tasks", f"{', '.join(self.tasks)}: {documents}, examples before a question: {shots}"


def is_task_file(name: str) -> bool:
    """Return whether an entry of ``tasks`` is a file, and not the name of a task."""
    return name.endswith(_FILE_ENDINGS)


class _TaskLoader(yaml.SafeLoader):
    """Reads task files without importing the functions that they name."""


_TaskLoader.add_constructor("!function", lambda loader, node: str(node.value))


def _task_file_problem(file: Path) -> str:
    """Return what is wrong with a task file; empty if nothing is."""
    try:
        text = file.read_text(encoding="utf-8")
        found: Any = yaml.load(text, Loader=_TaskLoader)  # noqa: S506  (a safe loader)
    except FileNotFoundError:
        return f"there is no such file (relative to {Path.cwd()})"
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read: {error}"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        return f"is not YAML: {where}{getattr(error, 'problem', error)}"
    if not isinstance(found, dict) or not {"task", "group", "include"} & found.keys():
        return "is no task of lm_eval: it has no key task, group or include"
    return _data_file_problem(found)


def _data_file_problem(task: dict[str, Any]) -> str:
    """Return which local data file of a task is missing; empty if none is."""
    options = task.get("dataset_kwargs")
    named = options.get("data_files") if isinstance(options, dict) else None
    for value in named.values() if isinstance(named, dict) else [named]:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and "://" not in each and "*" not in each and not Path(each).exists():
                return f"names the data file {each}, which does not exist (relative to {Path.cwd()})"
    return ""
