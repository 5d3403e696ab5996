"""Reading the Python stack of a rank: which line it is at, and which collective it waits in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NATIVE = "py-spy dump --native:"
"""Line after which C frames follow too, where py-spy is installed."""

_THREAD = re.compile(r"(Current thread|Thread) 0x[0-9a-f]+.*\(most recent call first\):")
_DUMPED = re.compile(r' *File "(.+)", line (\d+) in (.+)')
_TRACED = re.compile(r' *File "(.+)", line (\d+), in (.+)')

_PACKAGE = Path(__file__).resolve().parent.parent
_LIBRARY = re.compile(r"^<|/(site|dist)-packages/(?!launcher/)|/lib\d*/python3\.\d+/(?!(site|dist)-packages/launcher/)")
_COLLECTIVES = re.compile(r"/(torch/distributed/(distributed_c10d|_functional_collectives)|deepspeed/comm/\w+)\.py$")
_WRAPPERS = ("wrapper", "log_wrapper")
_WAITS = {
    ("torch/autograd/graph.py", "_engine_run_backward"): "backward",  # DDP and ZeRO reduce gradients in it
    ("launcher/engines/distributed.py", "total"): "all_reduce",
}
"""Functions that wait for other ranks without a Python frame that says so: end of the file's path, name, what in."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Where the main thread of a rank was."""

    text: str
    """The stacks of all its threads, or its traceback."""
    where: str = ""
    """Innermost line that is not a library's: ``launcher/training/loop.py:88 in train_step``; empty when unknown."""
    collective: str = ""
    """What it waited for other ranks in (``all_reduce``); empty when it did not."""
    is_stopped: bool = False
    """A signal had stopped it (SIGSTOP), as a debugger does."""

    @property
    def python(self) -> str:
        """The text without C frames."""
        return self.text.partition(NATIVE)[0]

    @property
    def place(self) -> str:
        """Where it was, in words."""
        return f"{self.collective} ({self.where})" if self.collective else self.where


@dataclass(frozen=True)
class _Frame:
    file: str
    line: str
    function: str

    @property
    def is_library(self) -> bool:
        return _LIBRARY.search(self.file) is not None

    @property
    def wait(self) -> str:
        """What the function waits for others in, if it does."""
        for (file, function), name in _WAITS.items():
            if self.function == function and self.file.endswith(f"/{file}"):
                return name
        is_public = not self.function.startswith("_") and self.function not in _WRAPPERS
        return self.function if is_public and _COLLECTIVES.search(self.file) else ""

    def __str__(self) -> str:
        return f"{_shown_path(self.file)}:{self.line} in {self.function}"


def _shown_path(file: str) -> str:
    """Return ``launcher/…`` for a module of this package and the bare name for any other file.

    The folder's name decides nothing: a clone, or a user's own folder, may be named ``launcher`` too. The package may
    lie elsewhere on the rank's host, so the module is looked up in the copy at hand.
    """
    _, separator, inside = file.rpartition("/launcher/")
    if separator and (_PACKAGE / inside).is_file():
        return f"launcher/{inside}"
    return file.rpartition("/")[2]


def read_dump(text: str, *, is_stopped: bool = False) -> Stack:
    """Return what faulthandler's dump of all threads tells of the main thread; other lines may be in between.

    Args:
        text: the dump; of several the last counts.
        is_stopped: what the kernel said of the process before.
    """
    threads: list[tuple[bool, list[_Frame]]] = []
    for line in text.splitlines():
        if thread := _THREAD.search(line):
            threads.append((thread[1] != "Thread", []))
        elif threads and (frame := _DUMPED.fullmatch(line)):
            threads[-1][1].append(_Frame(*frame.groups()))
    # signals go to the main thread, which therefore is the current one; else it is the oldest, which comes last
    frames = next((found for current, found in reversed(threads) if current), threads[-1][1] if threads else [])
    return _stack_of(text, frames, is_stopped=is_stopped)


def read_traceback(text: str) -> Stack:
    """Return where the exception that a traceback tells of was raised."""
    frames = [_Frame(*frame.groups()) for line in text.splitlines() if (frame := _TRACED.fullmatch(line))]
    return _stack_of(text, frames[::-1])


def _stack_of(text: str, frames: Sequence[_Frame], *, is_stopped: bool = False) -> Stack:
    """Return the stack of ``frames``, innermost first."""
    own = next((number for number, frame in enumerate(frames) if not frame.is_library), len(frames))
    waits = [wait for frame in frames[: own + 1] if (wait := frame.wait)]
    shown = frames[own] if own < len(frames) else frames[0] if frames else ""
    return Stack(text=text, where=str(shown), collective=waits[-1] if waits else "", is_stopped=is_stopped)
