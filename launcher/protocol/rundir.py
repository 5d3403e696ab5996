"""The run directory: the names of its files, and its exclusive creation."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import secrets
import shutil
import string
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.utils.files import is_regular, read_regular

_SNAPSHOT_GROUPS = frozenset({"job", "model", "backend", "run"})
"""Groups that the snapshot of every version holds."""
_PENDING_CHECKPOINT = re.compile(r"\.step_\d{8,}\.(tmp|old|gone)")
"""Hidden names that a save uses before its last rename."""
_TOP_LEVEL_KEY = re.compile(r"^(\w+):", re.MULTILINE)
_PRE_SNAPSHOT_ENTRIES = frozenset({".lock", ".submission", "logs"})
"""Entries that a launcher makes before the snapshot: all that one killed early leaves."""

_OWN_ENTRIES = frozenset(
    {
        *(
            "run.yaml",
            "plan.json",
            "session.json",
            "reference.safetensors",
            "metrics.jsonl",
            "result.json",
            "failure.json",
            "timeline.jsonl",
        ),
        *("environment.json", "sample.txt", "samples.jsonl", "loss.png", "report.html", "hostfile", "job.sbatch"),
        *(
            "logs",
            "checkpoints",
            "generated",
            "profile",
            "wandb",
            "mlflow",
            "tensorboard",
            "prometheus",
            "channel",
            "server",
            "saved",
        ),
        *("quantize.json", "quantize.md", "sparsify.json", "sparsify.md", "verify.json", "verify.md", "verify.png"),
        *("benchmark.json", "benchmark.md", "benchmark.png"),
    }
)
"""Names of a run's own files in its directory, besides its output."""


def new_run_id(now: float | None = None) -> str:
    """Return ``YYYYmmdd-HHMMSS-<4 letters>``; the letters distinguish runs of one second."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return f"{stamp}-{''.join(secrets.choice(string.ascii_lowercase) for _ in range(4))}"


@dataclass(frozen=True)
class RunDir:
    """Paths inside one run directory."""

    path: Path

    @property
    def snapshot(self) -> Path:
        """The resolved configuration that ranks load."""
        return self.path / "run.yaml"

    @property
    def plan(self) -> Path:
        """The plan this run was started from."""
        return self.path / "plan.json"

    @property
    def session(self) -> Path:
        """Processes of this run, or the job of a scheduler."""
        return self.path / "session.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line; the source of truth for every tracker."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """How the run ended."""
        return self.path / "result.json"

    @property
    def reference(self) -> Path:
        """Log-probabilities of preferences in the reference model."""
        return self.path / "reference.safetensors"

    @property
    def failure(self) -> Path:
        """Which rank failed first, and how."""
        return self.path / "failure.json"

    @property
    def timeline(self) -> Path:
        """Events of the run, with time and host."""
        return self.path / "timeline.jsonl"

    @property
    def stacks(self) -> Path:
        """Where every rank was when the run failed."""
        return self.logs / "stacks.txt"

    @property
    def sample(self) -> Path:
        """Text the model generated at the end."""
        return self.path / "sample.txt"

    @property
    def curve(self) -> Path:
        """Picture of the loss curve."""
        return self.path / "loss.png"

    @property
    def generated(self) -> Path:
        """Folder of answers that are there while others are not."""
        return self.path / "generated"

    @property
    def profile(self) -> Path:
        """Folder of traces, tables and memory that ``profile=true`` leaves."""
        return self.path / "profile"

    @property
    def environment(self) -> Path:
        """Machine and versions of the run, as rank 0 found them."""
        return self.path / "environment.json"

    def benchmark(self, ending: str) -> Path:
        """Results of a benchmark as ``json``, ``md`` or ``png``."""
        return self.path / f"benchmark.{ending}"

    @property
    def logs(self) -> Path:
        """Folder of ``<host>.<rank>.log``."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """Folder of ``step_00000010/``."""
        return self.path / "checkpoints"

    def tracker(self, kind: str) -> Path:
        """Folder of what a tracker keeps locally."""
        return self.path / kind

    @property
    def samples(self) -> Path:
        """Texts that the model generated at evaluations; one JSON object a line."""
        return self.path / "samples.jsonl"

    @property
    def is_run(self) -> bool:
        """Whether the folder holds the snapshot of a run, not another file of that name."""
        try:
            text = read_regular(self.snapshot).decode()
        except (OSError, ValueError):
            return False
        return _SNAPSHOT_GROUPS.issubset(_TOP_LEVEL_KEY.findall(text))

    def unexpected_files(self) -> list[str]:
        """Return the names of files that no run has written; empty for a new directory."""
        if not self.path.is_dir() or self.is_run:
            return []
        names = sorted(entry.name for entry in self.path.iterdir())
        is_early = _PRE_SNAPSHOT_ENTRIES.issuperset(names) and not (self.logs.is_dir() and any(self.logs.iterdir()))
        return [] if is_early else names

    def irregular_files(self) -> list[str]:
        """Return the links, FIFOs and the like among a run's appended files.

        No run creates such.
        """
        found = []
        for folder in (self.path, self.logs, self.generated):
            with contextlib.suppress(OSError):
                entries = sorted(folder.iterdir())
                found += [
                    str(path.relative_to(self.path)) for path in entries if not (path.is_dir() or is_regular(path))
                ]
        return found

    def reserves(self, path: Path) -> bool:
        """Return whether ``path`` is this directory, above it, or something a run writes in it."""
        own, other = self.path.absolute().resolve(), path.absolute().resolve()
        if own.is_relative_to(other):
            return True
        first = other.relative_to(own).parts[0] if other.is_relative_to(own) else ""
        return first in _OWN_ENTRIES or first.startswith(".")

    def log_of(self, host: str, who: int | str) -> Path:
        """Return the log file of a rank (a number) or of the agent on ``host``."""
        return self.logs / f"{host}.{who}.log"


def remove_unfinished_checkpoints(folder: Path) -> None:
    """Remove the files of interrupted saves; no process may be writing to the folder."""
    for leftover in sorted(folder.glob(".step_*")):
        if _PENDING_CHECKPOINT.fullmatch(leftover.name):
            final = folder / leftover.name.split(".")[1]
            if leftover.suffix == ".old" and not final.exists():
                leftover.rename(final)  # the crash fell between the two renames of a commit
            else:
                shutil.rmtree(leftover, ignore_errors=True)


RUN_INDEX = ".index.jsonl"
_ENCODED_PREFIX = "dir."


def encode_run_dir(run_dir: str) -> str:
    """Return the path of a run directory as a word that no shell changes."""
    return _ENCODED_PREFIX + base64.urlsafe_b64encode(os.fsencode(run_dir)).decode()


def decode_run_dir(word: str) -> RunDir:
    """Return the run directory that ``encode_run_dir`` made ``word`` of."""
    return RunDir(Path(os.fsdecode(base64.urlsafe_b64decode(word.removeprefix(_ENCODED_PREFIX)))))
