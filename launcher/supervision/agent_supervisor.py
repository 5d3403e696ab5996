"""Entry of an agent's parent over ssh: ``python -m launcher.supervision.agent_supervisor``.

The session cannot see how an agent on another machine died, nor clean up after it. The agent supervisor can: it is the
agent's parent and a subreaper. It forks the agent, so a host starts one interpreter only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

from launcher.protocol.messages import AgentExited
from launcher.supervision import agent_entry
from launcher.supervision.socket_channel import scratch_folder
from launcher.utils.processes import become_subreaper, end_descendants

_FORWARDED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1})
_TICK_S = 0.25
_EXIT_TIMEOUT_S = 30.0
"""Seconds for an agent to exit once the connection is closed.
Enough unless it is suspended."""


def main() -> None:
    """Start the agent, wait for it, kill its descendants, and report how it exited."""
    become_subreaper()
    with scratch_folder() as scratch:
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED | {signal.SIGCHLD})
        child = os.fork()
        if child == 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            agent_entry.serve_assignment(read_fd=sys.stdin.fileno(), write_fd=sys.stdout.fileno(), scratch=scratch)
            sys.stderr.flush()
            os._exit(0)
        status = _wait_for(child)
        end_descendants(os.getpid())
    code = os.waitstatus_to_exitcode(status)
    exited = AgentExited(code=code if code >= 0 else None, signal=-code if code < 0 else None)
    if code:
        with contextlib.suppress(OSError):  # the session may be gone as well
            os.write(sys.stdout.fileno(), b"\n" + exited.encode())  # the agent may have been killed inside a line
    sys.exit(code if code >= 0 else 128 - code)


def _wait_for(child: int) -> int:
    """Return the wait status of ``child``, which is killed if it outlives the connection."""
    hangup = select.poll()
    hangup.register(sys.stdin.fileno(), select.POLLHUP | select.POLLRDHUP)
    kill_at = None
    while True:
        arrived = signal.sigtimedwait(_FORWARDED | {signal.SIGCHLD}, _TICK_S)
        if arrived is not None and arrived.si_signo != signal.SIGCHLD:
            os.kill(child, arrived.si_signo)  # not waited for yet, so the PID is still its own
        while True:  # adopted orphans too
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child:
                return status
            if pid == 0:
                break
        if kill_at is None and hangup.poll(0):
            kill_at = time.monotonic() + _EXIT_TIMEOUT_S
        elif kill_at is not None and time.monotonic() > kill_at:
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
