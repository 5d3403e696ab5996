"""What tests of whole runs share: waiting for something, and the losses that a run recorded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from launcher.cli.parser import run_command

T = TypeVar("T")


def launch_verb(name: str) -> Callable[[Sequence[str]], int]:
    """Return ``launch VERB`` as a function of the words behind it, which raises its errors."""
    return lambda words: run_command([name, *words])


def wait_for(condition: Callable[[], T], *, seconds: float = 120) -> T:
    """Wait until ``condition`` returns something true, and return that; fail when it does not in time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def wait_until_empty(look: Callable[[], object], *, seconds: float) -> None:
    """Wait until ``look`` finds nothing; fail, and show what is left, when it still does."""
    deadline = time.monotonic() + seconds
    while found := look():
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def losses(run_dir: Path, name: str = "train/loss", *, after: int = 0) -> dict[int, float]:
    """Return what a run recorded as ``name``, by step, for the steps later than ``after``."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["train/step"]: line[name] for line in lines if name in line and line["train/step"] > after}
