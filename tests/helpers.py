"""What tests of whole runs share: waiting for a condition, and the losses that a run recorded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from launcher.cli.parser import run_command
from tests.processes import left_after

T = TypeVar("T")


def launch_verb(name: str) -> Callable[[Sequence[str]], int]:
    """Return ``launch VERB`` as a function of the words behind it, which raises its errors."""
    return lambda words: run_command([name, *words])


def wait_for(
    condition: Callable[[], T],
    *,
    seconds: float = 120,
    process: Any = None,
    shown: Callable[[], object] = lambda: "",
) -> T:
    """Wait until ``condition`` returns something true, and return that; fail when it does not in time.

    Args:
        condition: called about every 20 ms.
        seconds: time limit.
        process: fail as soon as it has ended and ``condition`` is still false.
        shown: returns what a failure shows.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if process is not None and process.poll() is not None:
            if found := condition():  # met between the look and the end of the process
                return found
            pytest.fail(f"ended early:\n{shown()}")
        if time.monotonic() > deadline:
            pytest.fail(f"timed out waiting:\n{shown()}")
        time.sleep(0.02)
    return found


def wait_until_empty(look: Callable[[], object], *, seconds: float) -> None:
    """Wait until ``look`` finds nothing; fail, and show what is left, when it still does."""
    left = left_after(look, seconds=seconds)
    assert not left, left


def losses(run_dir: Path, name: str = "train/loss", *, after: int = 0) -> dict[int, float]:
    """Return what a run recorded as ``name``, by step, for the steps later than ``after``."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["train/step"]: line[name] for line in lines if name in line and line["train/step"] > after}
