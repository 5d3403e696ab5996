"""The host agents of all hosts: connect, start, message, and detect those that are lost."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import EXIT_STALLED
from launcher.protocol.messages import (
    AgentExited,
    AgentMessage,
    AgentReady,
    Assignment,
    Ping,
    SessionSuspended,
    StartRanks,
    with_short_texts,
)
from launcher.protocol.outcome import Failure
from launcher.protocol.plan import HostPlan, Plan
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import (
    AgentLocation,
    ProcessLocation,
    locate_this_process,
)
from launcher.protocol.wire import MalformedMessage
from launcher.supervision.connection import AgentConnection, Keepalive
from launcher.supervision.socket_channel import is_scratch_folder, remove_scratch
from launcher.utils.files import open_append
from launcher.utils.logs import LogTail
from launcher.utils.processes import describe_exit, shell_exit_code

_TICK_S = 0.1
_CONNECT_S = 60.0
"""Seconds until an agent's first message.
It ends logins that hang, and is enough for a slow disk."""
_TAIL_LINES = 30
_MAX_PROBLEM_CHARS = 200
Connect = Callable[[HostPlan], AgentConnection]


@dataclass(eq=False)
class _Agent:
    """State of one agent."""

    host: HostPlan
    connection: AgentConnection
    log: LogTail
    """Holds the stderr of the agent, or of ssh."""
    started_at: float
    last_message_at: float
    last_event_at: float
    """Time of its last message that is no keepalive."""
    write_fd: int | None = None
    """Descriptor of the connection that the selector watches for writability."""
    location: ProcessLocation | None = None
    scratch: Path | None = None
    """Its temporary folder, to remove when it cannot; ``None`` when it is on another machine."""
    is_ready: bool = False
    is_prepared: bool = False
    is_working: bool = True
    """It has, or may start, processes of the run."""
    is_finishing: bool = False
    """It is expected to exit."""
    exited: AgentExited | None = None


class AgentGroup:
    """The agents of all hosts. Single-threaded but for the keepalive: it waits in ``poll`` only.

    Args:
        plan: what to run.
        on_message: called with a host's name and each message from its agent, keepalives excepted.
        on_lost: called with a host's name and why its agent is lost.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        on_message: Callable[[str, AgentMessage], None],
        on_lost: Callable[[str, Failure], None],
    ) -> None:
        self._plan, self._run_dir = plan, RunDir(Path(plan.run_dir))
        self._on_message, self._on_lost = on_message, on_lost
        self._selector = selectors.DefaultSelector()
        self._agents: dict[str, _Agent] = {}
        self._has_started = False
        self._launched: set[str] = set()
        """Hosts whose agents have started the launcher of their ranks."""
        self._keepalive = Keepalive(self._ping)
        self.lost: list[str] = []
        """Hosts whose agents exited unexpectedly."""

    @property
    def is_working(self) -> bool:
        """Whether some host has, or may start, processes of the run."""
        return any(agent.is_working for agent in self._agents.values())

    @property
    def is_ready(self) -> bool:
        """Whether every agent is ready."""
        return all(agent.is_ready for agent in self._agents.values())

    @property
    def is_gone(self) -> bool:
        """Whether no agent is left."""
        return not self._agents

    @property
    def locations(self) -> tuple[AgentLocation, ...]:
        """Locations of the agents that are ready."""
        return tuple(
            AgentLocation(
                host=agent.host.host.name, ssh_destination=agent.host.host.ssh_destination, location=agent.location
            )
            for agent in self._agents.values()
            if agent.location is not None
        )

    def connect(self, connect: Connect, *, environ: Mapping[str, str] = os.environ) -> None:
        """Open every connection and send the assignments; ranks start once all hosts are prepared."""
        files = {
            path.name: path.read_text(encoding="utf-8") for path in _files_to_stage(self._run_dir) if path.is_file()
        }
        env = {name: environ[name] for name in self._plan.forwarded_env if name in environ}
        session = locate_this_process()
        for number, host in enumerate(self._plan.hosts):
            log, now = LogTail(self._run_dir.log_of(host.host.name, "agent")), time.monotonic()
            connection = connect(host)
            agent = _Agent(
                host=host, connection=connection, log=log, started_at=now, last_message_at=now, last_event_at=now
            )
            self._agents[connection.host] = agent
            self._selector.register(connection, selectors.EVENT_READ, agent)
            connection.send(
                Assignment(
                    host=host,
                    run_dir=self._plan.run_dir,
                    run_id=self._plan.run_id,
                    run_hash=self._plan.run_hash,
                    grace_s=self._plan.grace_s,
                    preempt_grace_s=self._plan.preempt_grace_s,
                    heartbeat_timeout_s=self._plan.heartbeat_timeout_s,
                    env=env,
                    # the plan grows with the hosts; only the first one, where rank 0 and the tracker are, reads it
                    files=files if number == 0 else {name: files[name] for name in files if name.endswith(".yaml")},
                    session=session,
                )
            )
        if self._plan.heartbeat_timeout_s:
            self._keepalive.start()

    def poll(self) -> None:
        """Wait briefly, read messages of the agents, and close those that have timed out."""
        self._watch_writable()
        for key, events in self._selector.select(_TICK_S):
            agent: _Agent = key.data
            if events & selectors.EVENT_WRITE:
                agent.connection.flush()
            elif self._agents.get(agent.connection.host) is agent:
                self._read(agent)
        self._close_silent(time.monotonic())

    def broadcast(self, message: AgentMessage) -> None:
        """Send a message to every agent."""
        for agent in self._agents.values():
            agent.connection.send(message)

    def agent_ready(self, host: str, message: AgentReady) -> None:
        """Record that the agent of ``host`` runs, and where."""
        agent = self._agents[host]
        agent.is_ready, agent.location = True, message.location
        is_here = agent.connection.program is not None and not agent.host.host.ssh_destination
        agent.scratch = Path(message.scratch) if is_here and is_scratch_folder(message.scratch) else None

    def host_prepared(self, host: str) -> None:
        """Record that ``host`` is prepared; start the ranks everywhere once all hosts are."""
        self._agents[host].is_prepared = True
        if not self._has_started and not self.lost and all(agent.is_prepared for agent in self._agents.values()):
            self._has_started = True
            self._reset_timeouts()  # of agents that have waited for others
            self.broadcast(StartRanks())

    def launcher_started(self, host: str) -> None:
        """Record that the agent of ``host`` has started the launcher of its ranks."""
        self._launched.add(host)

    def ranks_of(self, host: str) -> range:
        """Return the ranks that the agent of ``host`` supervises.

        An external launcher's are on several hosts.
        """
        plan = self._agents[host].host
        return range(plan.first_rank, plan.first_rank + plan.host.slots)

    def agent_idle(self, host: str) -> None:
        """Record that no process of the run but the sidecars is left on ``host``."""
        self._agents[host].is_working = False

    def agent_exited(self, host: str, message: AgentExited) -> None:
        """Record how the agent of ``host`` exited; its connection closes next."""
        self._agents[host].exited = message

    def suspend(self) -> None:
        """Send every agent that this process is about to be suspended."""
        self.broadcast(SessionSuspended())
        deadline = time.monotonic() + 1.0
        while any(agent.connection.write_fd() for agent in self._agents.values()) and time.monotonic() < deadline:
            self.poll()

    def resume(self) -> None:
        """Reset the timeouts of the agents: this process was suspended and read nothing."""
        self._reset_timeouts()
        self.broadcast(Ping())

    def finish(self) -> None:
        """Expect every agent to exit from now on."""
        for agent in self._agents.values():
            agent.is_finishing = True

    def give_up(self, *, working_only: bool) -> None:
        """Close every connection, or those to agents that still have processes of the run."""
        for agent in [agent for agent in self._agents.values() if agent.is_working or not working_only]:
            self._close(agent)

    def close(self) -> None:
        """Close everything."""
        self._keepalive.stop()
        self.give_up(working_only=False)
        self._selector.close()

    def _reset_timeouts(self) -> None:
        now = time.monotonic()
        for agent in self._agents.values():
            agent.last_message_at = agent.last_event_at = now

    def _read(self, agent: _Agent) -> None:
        messages = agent.connection.receive()
        if messages is None:
            self._close(agent)
            return
        agent.last_message_at = time.monotonic()
        malformed = next(filter(None, (self._handle(agent, message) for message in messages)), "")
        if malformed := malformed or agent.connection.malformed:
            self._close(agent, malformed=malformed)

    def _handle(self, agent: _Agent, message: AgentMessage) -> str:
        """Pass a message on; return its error, empty for a valid one."""
        if isinstance(message, Ping):
            return ""
        agent.last_event_at = time.monotonic()
        try:
            self._on_message(agent.connection.host, with_short_texts(message))
        except MalformedMessage as problem:
            return str(problem)
        except (ValueError, ArithmeticError) as problem:
            # what no check foresaw in the values of a peer loses that host alone; other errors are this program's own
            with contextlib.suppress(OSError), open_append(agent.log.path) as log:
                log.write(traceback.format_exc().encode(errors="backslashreplace"))
            return f"a message {message.kind} that causes {type(problem).__name__}: {str(problem)[:_MAX_PROBLEM_CHARS]}"
        return ""

    def _close_silent(self, now: float) -> None:
        limit = self._plan.heartbeat_timeout_s
        for agent in list(self._agents.values()):
            silent_s = now - (agent.last_message_at if agent.is_ready else agent.started_at)
            if silent_s > (limit if agent.is_ready else _CONNECT_S) and (limit or not agent.is_ready):
                self._close(agent, silent_s=silent_s)
            elif self._is_stalled(agent, now):
                self._close(agent, stalled_s=now - agent.last_event_at)

    def _is_stalled(self, agent: _Agent, now: float) -> bool:
        """Return whether an agent sends only keepalives while the others wait for it.

        Ranks have a check of their own. Commands that prepare a host report their
        elapsed time every few seconds.
        """
        limit = self._plan.stall_timeout_s
        is_awaited = not agent.is_prepared or (self._has_started and agent.connection.host not in self._launched)
        may_take_longer = not limit or not agent.is_ready or not agent.is_working or agent.is_finishing
        return is_awaited and not may_take_longer and now - agent.last_event_at > max(limit, _CONNECT_S)

    def _close(
        self, agent: _Agent, *, silent_s: float | None = None, stalled_s: float | None = None, malformed: str = ""
    ) -> None:
        """Close a connection; unless its agent was expected to exit, its host is lost."""
        self._selector.unregister(agent.connection)
        if agent.write_fd is not None:
            self._selector.unregister(agent.write_fd)
        host = agent.connection.host
        del self._agents[host]
        code = agent.connection.close()
        if code == 0 and (agent.is_finishing or not agent.is_working) and not malformed:
            return
        if agent.scratch is not None:
            remove_scratch(agent.scratch)
        self.lost.append(host)
        why = self._failure_of(agent, code=code, silent_s=silent_s, stalled_s=stalled_s, malformed=malformed)
        self._on_lost(host, why)

    def _failure_of(
        self, agent: _Agent, *, code: int, silent_s: float | None, stalled_s: float | None, malformed: str
    ) -> Failure:
        host, log, tail = agent.host.host.name, agent.log.path, agent.log.last(_TAIL_LINES)
        if stalled_s is not None:
            return stalled_host_failure(host, stalled_s=stalled_s, was_prepared=agent.is_prepared, log=log, tail=tail)
        if silent_s is not None:
            return silent_host_failure(host, silent_s=silent_s, was_ready=agent.is_ready, log=log, tail=tail)
        if agent.exited is not None and (agent.exited.code or agent.exited.signal or not malformed):
            return agent_exited_failure(host, agent.exited, log=log, tail=tail)
        if malformed:
            return malformed_message_failure(host, malformed, log=log, tail=tail)
        if not agent.host.host.ssh_destination:  # a child of this process, so its exit code is known
            exited = AgentExited(code=code if code >= 0 else None, signal=-code if code < 0 else None)
            return agent_exited_failure(host, exited, log=log, tail=tail)
        return connection_lost_failure(host, program=agent.connection.program, code=code, log=log, tail=tail)

    def _watch_writable(self) -> None:
        """Watch for writability exactly the connections that have queued bytes."""
        for agent in self._agents.values():
            write_fd = agent.connection.write_fd()
            if write_fd is not None and agent.write_fd is None:
                self._selector.register(write_fd, selectors.EVENT_WRITE, agent)
                agent.write_fd = write_fd
            elif write_fd is None and agent.write_fd is not None:
                self._selector.unregister(agent.write_fd)
                agent.write_fd = None

    def _ping(self) -> None:
        for agent in list(self._agents.values()):
            agent.connection.send(Ping())


def _files_to_stage(run_dir: RunDir) -> tuple[Path, ...]:
    return (run_dir.snapshot, run_dir.plan)


def agent_exited_failure(host: str, exited: AgentExited, *, log: Path, tail: str) -> Failure:
    """Return the failure of an agent whose exit was seen: by its supervisor, or by this process."""
    reason = f"the host agent on {host} {describe_exit(exited.code, exited.signal)}"
    code = shell_exit_code(exited.code, exited.signal) or 1
    return _host_failure(host, reason, log=log, tail=tail, code=code, signal=exited.signal)


def connection_lost_failure(host: str, *, program: str | None, code: int, log: Path, tail: str) -> Failure:
    """Return the failure of a connection that closed unexpectedly.

    Args:
        host: at its other end.
        program: program that carried it (``ssh``); ``None`` for a bare socket.
        code: exit code of the program, negative for a signal.
        log: of the agent or the program.
        tail: the last lines of the log.
    """
    last = tail.strip().rpartition("\n")[2]
    exit_text = describe_exit(code, None) if code >= 0 else describe_exit(None, -code)
    cause = f"{program} {exit_text}" if program else "its agent was killed or closed it"
    reason = f"the connection to {host} was lost: {cause}{f', last line: {last}' if last else ''}"
    return _host_failure(host, reason, log=log, tail=tail)


def silent_host_failure(host: str, *, silent_s: float, was_ready: bool, log: Path, tail: str) -> Failure:
    """Return the failure of a host whose agent sends no messages."""
    if was_ready:
        cause = f"no message from {host} for {silent_s:.0f} s: it is down, frozen, or cut off from this machine"
        reason = f"{cause}; its processes exit when they lose the session"
    else:
        reason = f"the host agent on {host} did not answer within {silent_s:.0f} s"
    return _host_failure(host, reason, log=log, tail=tail)


def stalled_host_failure(host: str, *, stalled_s: float, was_prepared: bool, log: Path, tail: str) -> Failure:
    """Return the failure of a host whose agent is alive but does not start its ranks."""
    what = "starting its ranks" if was_prepared else "preparing"
    reason = f"{host} made no progress in {what} for {stalled_s:.0f} s (backend.stall_timeout_s); its agent is alive"
    return _host_failure(host, reason, log=log, tail=tail, code=EXIT_STALLED)


def malformed_message_failure(host: str, malformed: str, *, log: Path, tail: str) -> Failure:
    """Return the failure of an agent that sent invalid data."""
    reason = f"the connection to {host} was closed: its agent sent {malformed}"
    return _host_failure(host, reason, log=log, tail=tail)


def _host_failure(host: str, reason: str, *, log: Path, tail: str, code: int = 1, signal: int | None = None) -> Failure:
    return Failure(
        host=host,
        rank=None,
        exit_code=code,
        signal=signal,
        reason=reason,
        traceback=tail,
        log=str(log),
        time=time.time(),
    )
