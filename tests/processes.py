"""Marks: all that a test starts inherits a variable of its environment, and is found by it, whatever its parent."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")

MARK = "LAUNCHER_TEST_MARK"


def new_mark() -> str:
    """Return a mark that no other process has."""
    return uuid.uuid4().hex


def marked_environment(mark: str, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of this process with ``env`` and ``mark``."""
    return {**os.environ, **(env or {}), MARK: mark}


def marked(mark: str) -> Iterator[psutil.Process]:
    """Yield the live processes that inherited ``mark``."""
    needle = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, psutil.Error):
            if needle in (entry / "environ").read_bytes() and b") Z " not in (entry / "stat").read_bytes():
                yield psutil.Process(int(entry.name))


def wait_for_marked(mark: str, *, seconds: float) -> list[str]:
    """Return the command lines of what is still there once ``seconds`` have passed; empty as soon as nothing is."""
    return [repr(process) for process in left_after(lambda: list(marked(mark)), seconds=seconds)]


def left_after(look: Callable[[], T], *, seconds: float) -> T:
    """Return what ``look`` still finds once ``seconds`` have passed; what is empty as soon as it finds nothing."""
    deadline = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def kill_marked(mark: str) -> None:
    """Kill every process that inherited ``mark``."""
    while left := list(marked(mark)):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
