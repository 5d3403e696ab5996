"""What a run directory was generating: another input or other options must not continue its answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigError, JobError
from launcher.files import read_json, write_atomic, write_json
from launcher.schema import to_tree

if TYPE_CHECKING:
    from launcher.config import Run
    from launcher.generation.source import Source
    from launcher.jobs.generate import Generate

_FREE = frozenset(
    (
        *("input", "output", "batching", "max_requests", "kv_tokens", "prefill_chunk"),
        *("prefix_cache", "max_batch", "max_wait_s", "bucket", "ageing_s", "echo_step_s"),
    )
)
"""Options of the job that no answer depends on."""


_CLAIM = "output"
"""File in the folder of parts that names the file of answers, written before that is."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Kept in the run directory from the first start on."""

    digest: str
    """SHA-256 of the input file."""
    options: Mapping[str, Any]
    """All that answers depend on, by option."""

    def problems(self, stored: Task, job: Generate) -> Iterator[ConfigError]:
        """Yield what keeps this task from continuing a stored one."""
        if self.digest != stored.digest:
            why = "is another file than the one this run directory holds answers to"
            yield job.refuse("input", why, "give the same file, or start a new run")
        for option in sorted(self.options.keys() | stored.options.keys()):
            now, then = self.options.get(option), stored.options.get(option)
            if now != then:
                why = f"the answers that are there were made with {then}"
                yield ConfigError(option, now, why=why, fix=f"set {option}={then}, or start a new run")


def task_of(run: Run, job: Generate, source: Source, *, digest: str) -> Task:
    """Return the task of a run."""
    tree = {f"job.{name}": value for name, value in to_tree(job).items() if name not in _FREE}
    tree["job.format"] = source.format
    for group in ("model", "precision", *(["data"] if job.tokenizer == "data" else [])):
        tree |= {f"{group}.{name}": value for name, value in to_tree(getattr(run, group)).items()}
    return Task(digest=digest, options=tree)


def stored_task(folder: Path) -> Task | None:
    """Return the task that a folder of parts was begun with, if it was."""
    file = folder / "task.json"
    return Task(**read_json(file)) if file.exists() else None


def keep_task(folder: Path, task: Task) -> None:
    """Write it down; every rank may, for all write the same."""
    write_json(folder / "task.json", to_tree(task))


def owns_output(folder: Path, output: Path) -> bool:
    """Whether a file of answers was begun by the run with this folder of parts."""
    claim = folder / _CLAIM
    return claim.is_file() and claim.read_text(encoding="utf-8") == str(output.absolute())


def claim_output(folder: Path, output: Path) -> None:
    """Write down that the file of answers is this run's from here on.

    Raises:
        JobError: another process made it meanwhile.
    """
    if output.exists() and not owns_output(folder, output):
        why = f"another process made this file while this run was working. All answers are kept in {folder}"
        raise JobError(f"job.output={output}: {why}: move the file away and type launch resume {folder.parent}")
    write_atomic(folder / _CLAIM, str(output.absolute()))
