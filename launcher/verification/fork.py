"""A case in a process of its own: forked behind the slow imports, timed, and unable to take the rank along."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.files import write_json
from launcher.supervise.failure import name_of_signal
from launcher.supervise.linux import die_with_parent

Answer = dict[str, Any]

TROUBLE = "trouble"
"""Key of an answer that says why there is none."""

AT = "at"
"""Key beside it: when, in seconds since 1970."""

_TICK_S = 0.1
_STACKS_S = 0.5
"""Time between asking a hung process for its stacks, which go into the log, and ending it."""


def in_fork(
    work: Callable[[], Answer], answer: Path, *, limit_s: float, beat: Callable[[], None], give_up: Callable[[], str]
) -> None:
    """Do ``work`` in a forked process and wait for it; ``answer`` is written whatever happens to it.

    Args:
        work: done in the child, where nothing of it is kept but what it returns.
        answer: gets what ``work`` returns as JSON, or an object with ``TROUBLE`` and ``AT``.
        limit_s: after which the child is killed.
        beat: called all the while.
        give_up: asked all the while; a reason ends the child.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with_parent(parent)
        _be_the_child(work, answer)
    deadline = time.monotonic() + limit_s
    trouble = ""
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        beat()
        trouble = give_up() or (f"was not done after {limit_s:g} s" if time.monotonic() > deadline else "")
        if trouble:
            ended = _end(child)
            break
        time.sleep(_TICK_S)
    if not answer.exists():
        write_json(answer, {TROUBLE: trouble or f"ended by {_how(ended[1])}", AT: time.time()})


def _be_the_child(work: Callable[[], Answer], answer: Path) -> None:
    """Do the work and end this process, without any of the parent's own clearing up."""
    code = 0
    try:
        write_json(answer, work())
    except BaseException as error:  # noqa: BLE001 (a strategy that fails is a result, whatever it raises)
        traceback.print_exc()
        words = " ".join("".join(traceback.format_exception_only(error)).split())  # one line of a table
        write_json(answer, {TROUBLE: words, AT: time.time()})
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end(child: int) -> tuple[int, int]:
    os.kill(child, signal.SIGUSR2)  # not waited for yet, so the number is still its own
    time.sleep(_STACKS_S)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)


def _how(status: int) -> str:
    return name_of_signal(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"
