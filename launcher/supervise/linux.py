"""Three things that only the kernel can promise about a process. Linux only."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

from launcher.errors import EnvironmentProblem

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Let every orphan among the descendants of this process become its child, however it detached itself."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process as soon as ``parent``, which just forked it, is gone."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the promise was made
        os.kill(os.getpid(), signal.SIGKILL)


def end_like(status: int) -> None:
    """End this process the way ``status`` (of ``waitpid``) says another one ended: same code or same signal.

    No second core is dumped for a signal that made the other process dump one.
    """
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _prctl(option: int, value: int) -> None:
    if sys.platform != "linux":
        raise EnvironmentProblem(f"runs are supervised with prctl, which {sys.platform} lacks: use Linux")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"prctl({option})")
