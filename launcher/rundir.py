"""The run directory: the names of what is in it, and how one is made so that no two runs share it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import string
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.files import write_atomic
from launcher.runfiles import read_regular

_KEYS = frozenset({"job", "model", "backend", "run"})
"""Groups that the snapshot of every version holds."""
_KEY = re.compile(r"^(\w+):", re.MULTILINE)
_EARLY = frozenset({".lock", ".submission", "logs"})
"""What a launcher makes before it writes the snapshot; all that one which was killed then leaves."""


def mint_run_id(now: float | None = None) -> str:
    """Return ``YYYYmmdd-HHMMSS-<4 letters>``; the letters keep apart runs started in the same second."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return f"{stamp}-{''.join(secrets.choice(string.ascii_lowercase) for _ in range(4))}"


def run_name_of(model_name: str) -> str:
    """Return the name of a run of a model: the last part of a local folder's path or of a hub name."""
    if "/" not in model_name and model_name not in (".", ".."):
        return model_name
    return Path(os.path.abspath(os.path.expanduser(model_name))).name or "model"  # noqa: PTH100, PTH111 (links stay)


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
        """Who runs this run: processes, or the job of a scheduler."""
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
    def failure(self) -> Path:
        """Which rank failed first, and how."""
        return self.path / "failure.json"

    @property
    def timeline(self) -> Path:
        """What happened when, on which host."""
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
        """On what it ran: machine and versions, as rank 0 found them."""
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

    @property
    def tracker(self) -> Path:
        """Folder of what a tracker keeps locally."""
        return self.path / "wandb"

    @property
    def is_run(self) -> bool:
        """Whether a run has written its snapshot here; a file of that name with other content is not one."""
        try:
            text = read_regular(self.snapshot).decode()
        except (OSError, ValueError):
            return False
        return _KEYS.issubset(_KEY.findall(text))

    def foreign(self) -> list[str]:
        """Return the names of what is here and was not put here by a run; empty for a new directory or a run's own."""
        if not self.path.is_dir() or self.is_run:
            return []
        names = sorted(entry.name for entry in self.path.iterdir())
        is_early = _EARLY.issuperset(names) and not (self.logs.is_dir() and any(self.logs.iterdir()))
        return [] if is_early else names

    def log_of(self, host: str, who: int | str) -> Path:
        """Return the log file of a rank (a number) or of the agent on ``host``."""
        return self.logs / f"{host}.{who}.log"


class StagedFiles:
    """Files and folders that this process adds to a run directory, to be taken back where nothing is started.

    ``undo`` removes only what was added through this object and was not there before, and restores what was.
    """

    def __init__(self) -> None:
        self._before: dict[Path, tuple[bytes, os.stat_result] | None] = {}
        self._folders: list[Path] = []

    def make_folder(self, folder: Path) -> None:
        """Make ``folder`` and the folders above it that are missing.

        Raises:
            OSError: one of them cannot be made.
        """
        missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
        for path in reversed(missing):
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():
                    raise
            else:  # otherwise another process made it a moment ago
                self._folders.append(path)

    def remember(self, *paths: Path) -> None:
        """Keep the content of files that are about to be written or removed."""
        for path in paths:
            if path not in self._before:
                self._before[path] = (path.read_bytes(), path.stat()) if path.is_file() else None

    def write(self, path: Path, text: str) -> None:
        """Write a file, atomically.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        self.remember(path)
        write_atomic(path, text)

    def remove(self, path: Path) -> None:
        """Remove a file that is no longer true, if it is there."""
        self.remember(path)
        path.unlink(missing_ok=True)

    def undo(self) -> None:
        """Leave everything as it was before; folders that hold files of others stay."""
        for path, before in self._before.items():
            if before is None:
                path.unlink(missing_ok=True)
            else:
                content, stat = before
                write_atomic(path, content)
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a run's age is that of its snapshot
        self._before.clear()
        while self._folders:
            with contextlib.suppress(OSError):
                self._folders.pop().rmdir()
