"""Entry of the host agent: ``python -m launcher.supervision.agent_entry``.

It reads an ``Assignment`` and then orders from stdin, and writes events to stdout. When stdin ends or times out, or
its parent exits, the session is lost: then it ends the run without it. It is a subreaper, so every process that it
starts remains its descendant.
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
from launcher.utils.system import code_root


def serve_assignment(*, read_fd: int, write_fd: int, scratch: Path, agent: type[HostAgent] = HostAgent) -> int:
    """Carry out the assignment from ``read_fd`` in this process, which must be a subreaper.

    Args:
        read_fd: descriptor that orders are read from.
        write_fd: descriptor that events are written to.
        scratch: folder for the sockets and files of this agent alone.
        agent: class that carries it out.

    Returns:
        The exit code of the run.
    """
    session = SessionConnection(read_fd=read_fd, write_fd=os.dup(write_fd))
    if write_fd == sys.stdout.fileno():
        os.dup2(sys.stderr.fileno(), write_fd)  # a stray print must not look like an event
    assignment = session.receive_assignment()
    session.keep_alive(assignment.heartbeat_timeout_s)
    session.send(AgentReady(scratch=str(scratch), location=locate_this_process(), code=str(code_root())))
    try:
        stage_run_dir(assignment)
    except (LauncherError, OSError) as problem:
        session.send(staging_failure(assignment, problem))
        session.send(AgentIdle())
        session.flush_all()
        return EXIT_USER_ERROR
    return agent(assignment, session=session, scratch=scratch).run()


def main() -> None:
    """Serve the assignment on stdin."""
    become_subreaper()
    with scratch_folder() as scratch:
        serve_assignment(read_fd=sys.stdin.fileno(), write_fd=sys.stdout.fileno(), scratch=scratch)


if __name__ == "__main__":
    main()
