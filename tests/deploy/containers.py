"""Containers played by processes of this machine: command and variables as rendered, paths below a test's folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import Start, Started
from tests.processes import MARK, kill_marked, new_mark

_PASSED = ("PATH", "PYTHONPATH", "XDG_CACHE_HOME")
"""Variables of an image, which here are those of this machine."""


@dataclass(frozen=True)
class Container:
    """A folder that stands for the root of a container, and what is mounted in it."""

    root: Path
    mounts: tuple[str, ...]

    def here(self, text: str) -> str:
        """Return a path of the container as one of this machine; other words as they are."""
        inside = any(text == mount or text.startswith(f"{mount}/") for mount in self.mounts)
        return f"{self.root}{text}" if inside else text

    def write_run(self, path: str, text: str) -> None:
        """Write a container's ``run.yaml``, with folders of this machine in it."""
        file = Path(self.here(path))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(self._moved(yaml.safe_load(text))))

    def _moved(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._moved(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._moved(each) for each in value]
        return self.here(value) if isinstance(value, str) else value

    @property
    def log(self) -> str:
        """What its process printed."""
        return (self.root / "log").read_text()

    @contextmanager
    def running(
        self, command: Iterable[str], env: Mapping[str, str], *, cwd: str, start_process: Start
    ) -> Iterator[Started]:
        """Run a command in it; kill in the end what is left."""
        for mount in self.mounts:
            Path(self.here(mount)).mkdir(parents=True, exist_ok=True)
        mark = new_mark()
        words: Sequence[str] = [self.here(word) for word in command]
        given = {name: os.environ[name] for name in _PASSED if name in os.environ}
        given |= {name: self.here(value) for name, value in env.items()} | {MARK: mark}
        with (self.root / "log").open("wb") as output:
            process = start_process(words, cwd=Path(self.here(cwd)), env=given, stdout=output, stderr=output)
        try:
            yield process
        finally:
            kill_marked(mark)
            process.wait()
