"""Names and files of tasks of lm-evaluation-harness, and how they are answered."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import ConfigError

_FILE_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """Tasks to answer, and how; the options that a benchmark and a training run have in common."""

    option: str
    """That names the tasks, for messages."""
    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    include_path: tuple[str, ...] = ()
    log_samples: bool = False
    bootstrap_iters: int = 0
    run_unsafe_code: bool = False

    @property
    def text(self) -> str:
        """The tasks and how many documents and examples, for plans."""
        shots = "as each task says" if self.num_fewshot is None else str(self.num_fewshot)
        documents = "all documents" if self.limit is None else f"the first {self.limit} documents of each"
        return f"{', '.join(self.tasks)}: {documents}, examples before a question: {shots}"

    def unsafe(self, task: str) -> ConfigError:
        """Return the error of a task that runs code which the model writes, and may not."""
        fix = "set benchmark.run_unsafe_code=true if this machine may"
        if self.option != "benchmark.tasks":
            fix = "leave it out, and answer it on a checkpoint: benchmark=lm_eval benchmark.run_unsafe_code=true"
        return ConfigError(self.option, task, why="runs code that the model writes", fix=fix)


def validate_tasks(option: str, tasks: Sequence[str], *, user: tuple[str, object]) -> Iterator[ConfigError]:
    """Yield a missing package, and task files that are missing or malformed.

    Args:
        option: that names the tasks.
        tasks: names and files.
        user: option and value that need the package.
    """
    if importlib.util.find_spec("lm_eval") is None:
        fix = "install it: pip install 'launcher[eval]'"
        yield ConfigError(*user, why="the package lm_eval is not installed", fix=fix)
    for name in tasks:
        if is_task_file(name) and (why := _task_file_problem(Path(name))):
            yield ConfigError(option, name, why=why, fix="correct the file, or name another one")


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
