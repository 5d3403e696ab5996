"""The guard of a rank: a small process that waits for it and knows exactly how it ended.

torchrun and DeepSpeed flatten a rank's exit code to 1, and neither tells the rank's own children to go. So each process
they start forks at once. The child becomes the rank; the parent half stays as its guard: it passes signals on, reports
the exact exit code or signal, ends what the rank left behind, and then ends the same way.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from launcher.supervise.board import BoardLink
from launcher.supervise.link import Link
from launcher.supervise.linux import become_subreaper, die_with_parent, end_like
from launcher.supervise.processes import end_descendants

_PASSED_ON = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1})
_TICK_S = 0.25
_ALONE_S = 3.0
"""Time a rank gets to end by itself after the host agent died."""
_STRAGGLER_S = 0.1
"""Time between the signals that DeepSpeed sends to a rank and to its guard."""


def guard_rank(rank: int, link: Link | BoardLink) -> None:
    """Fork. Returns in the child only, which is killed when its guard is.

    Args:
        rank: for the report.
        link: to the host agent; the guard keeps it.
    """
    assert threading.active_count() == 1, "a fork copies only the thread that calls it"
    become_subreaper()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
    guard, started = os.getpid(), time.monotonic()
    child = os.fork()
    if child == 0:
        die_with_parent(guard)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        link.close()
        return
    link.tell(kind="hello", rank=rank, guard=guard, pid=child)
    told: set[int] = set()
    status = _wait_for(child, link, told)
    wall_s = time.monotonic() - started
    by_launcher = os.WIFSIGNALED(status) and _was_sent(os.WTERMSIG(status), told)
    link.tell(kind="exit", status=status, time=time.time(), wall_s=wall_s, by_launcher=by_launcher)
    end_descendants(guard)
    end_like(status)


def _wait_for(child: int, link: Link | BoardLink, told: set[int]) -> int:
    """Return the wait status of ``child``; pass signals on meanwhile, and end it when the agent is gone.

    ``told`` gets the signals that came from what started this rank, and our own.
    """
    kill_at = None
    while True:
        arrived = signal.sigtimedwait(_PASSED_ON | {signal.SIGCHLD}, _TICK_S)
        if arrived is not None and arrived.si_signo != signal.SIGCHLD:
            os.kill(child, arrived.si_signo)  # not waited for yet, so the number is still its own
            if arrived.si_pid == os.getppid():
                told.add(arrived.si_signo)
                link.tell(kind="told", signal=arrived.si_signo, told_at=time.time())
        for number in link.orders():
            os.kill(child, number)
        if (status := _reap(child)) is not None:
            return status
        if kill_at is None and link.lost():
            link.clean_up_after_agent()
            os.kill(child, signal.SIGTERM)
            told.add(signal.SIGTERM)
            kill_at = time.monotonic() + _ALONE_S
        elif kill_at is not None and time.monotonic() > kill_at:
            os.kill(child, signal.SIGKILL)


def _was_sent(number: int, told: set[int]) -> bool:
    """Return whether what started this rank sent it that signal; DeepSpeed sends it to the guard a little later."""
    if number in told or number not in _PASSED_ON:
        return number in told
    arrived = signal.sigtimedwait({number}, _STRAGGLER_S)
    return arrived is not None and arrived.si_pid == os.getppid()


def _reap(child: int) -> int | None:
    """Wait for whoever has ended, adopted orphans too; return the status of ``child`` once it is among them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            return status
        if pid == 0:
            return None
