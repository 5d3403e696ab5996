"""Entry of an agent's parent over ssh: ``python -m launcher.supervision.agent_supervisor``.

The session cannot see how an agent on another machine died, nor clean up behind it. The agent supervisor can: it is
the agent's parent, a subreaper, and does nothing but wait. It starts the agent by forking, so a host pays for one
interpreter.
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

_PASSED_ON = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1})
_TICK_S = 0.25
_PATIENCE_S = 30.0
"""Time an agent gets to end by itself once the connection is broken; far more than it needs unless it is stopped."""


def main() -> None:
    """Start the agent, wait for it, leave nothing of it, and say how it ended."""
    become_subreaper()
    with scratch_folder() as scratch:
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
        child = os.fork()
        if child == 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            agent_entry.serve_assignment(inbox=sys.stdin.fileno(), outbox=sys.stdout.fileno(), scratch=scratch)
            sys.stderr.flush()
            os._exit(0)
        status = _wait_for(child)
        end_descendants(os.getpid())
    code = os.waitstatus_to_exitcode(status)
    gone = AgentExited(code=code if code >= 0 else None, signal=-code if code < 0 else None)
    if code:
        with contextlib.suppress(OSError):  # the session may be gone as well
            os.write(sys.stdout.fileno(), b"\n" + gone.encode())  # the agent may have been killed inside a line
    sys.exit(code if code >= 0 else 128 - code)


def _wait_for(child: int) -> int:
    """Return the wait status of ``child``; pass signals on, and kill it if it outlives the connection."""
    hangup = select.poll()
    hangup.register(sys.stdin.fileno(), select.POLLHUP | select.POLLRDHUP)
    kill_at = None
    while True:
        arrived = signal.sigtimedwait(_PASSED_ON | {signal.SIGCHLD}, _TICK_S)
        if arrived is not None and arrived.si_signo != signal.SIGCHLD:
            os.kill(child, arrived.si_signo)  # not waited for yet, so the number is still its own
        while True:  # adopted orphans too
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == child:
                return status
            if pid == 0:
                break
        if kill_at is None and hangup.poll(0):
            kill_at = time.monotonic() + _PATIENCE_S
        elif kill_at is not None and time.monotonic() > kill_at:
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
