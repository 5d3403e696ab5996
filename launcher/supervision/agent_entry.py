"""Entry of the host agent: ``python -m launcher.supervision.agent_entry``.

It reads an ``Assignment`` and then orders on stdin, and writes events on stdout. When stdin ends or falls silent, or
its parent is gone, so is the session: then it ends the run by itself. Everything below it stays below it, because it is
a subreaper.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher.errors import EXIT_USER_ERROR, LauncherError
from launcher.protocol.messages import AgentIdle, AgentReady
from launcher.protocol.session_file import locate_this_process
from launcher.supervision.connection import SessionConnection
from launcher.supervision.host_agent import HostAgent, stage_run_dir, staging_failure
from launcher.supervision.socket_channel import scratch_folder
from launcher.utils.processes import become_subreaper
from launcher.utils.schema import to_tree
from launcher.utils.system import code_root


def serve_assignment(*, inbox: int, outbox: int, scratch: Path, agent: type[HostAgent] = HostAgent) -> int:
    """Carry out the assignment that comes in on ``inbox``, in this process, which must be a subreaper.

    Args:
        inbox: descriptor that orders are read from.
        outbox: descriptor that events are written to.
        scratch: folder for the sockets and files of this agent alone.
        agent: what carries it out.

    Returns:
        The exit code of the run, as the session said it.
    """
    uplink = SessionConnection(inbox=inbox, outbox=os.dup(outbox))
    if outbox == sys.stdout.fileno():
        os.dup2(sys.stderr.fileno(), outbox)  # a stray print must not look like an event
    assignment = uplink.first()
    uplink.keep_alive(assignment.heartbeat_timeout_s)
    uplink.send(AgentReady(scratch=str(scratch), place=to_tree(locate_this_process()), code=str(code_root())))
    try:
        stage_run_dir(assignment)
    except (LauncherError, OSError) as problem:
        uplink.send(staging_failure(assignment, problem))
        uplink.send(AgentIdle())
        uplink.flush_all()
        return EXIT_USER_ERROR
    return agent(assignment, uplink=uplink, scratch=scratch).run()


def main() -> None:
    """Serve the assignment on stdin."""
    become_subreaper()
    with scratch_folder() as scratch:
        serve_assignment(inbox=sys.stdin.fileno(), outbox=sys.stdout.fileno(), scratch=scratch)


if __name__ == "__main__":
    main()
