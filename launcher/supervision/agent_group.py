"""The host agents of all hosts: connect, start, message, and detect those that are lost."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.protocol.messages import (
    AgentExited,
    AgentIdle,
    AgentMessage,
    AgentReady,
    Assignment,
    HostPrepared,
    Ping,
    SessionSuspended,
    StartRanks,
)
from launcher.protocol.outcome import Failure
from launcher.protocol.plan import HostPlan, Plan
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import (
    AgentLocation,
    ProcessLocation,
    locate_this_process,
    process_location_from_tree,
)
from launcher.protocol.wire import MalformedMessage
from launcher.supervision.connection import AgentConnection, Keepalive
from launcher.supervision.socket_channel import is_scratch_folder, remove_scratch
from launcher.utils.logs import LogTail
from launcher.utils.processes import describe_exit, shell_exit_code
from launcher.utils.schema import to_tree

_TICK_S = 0.1


_CONNECT_S = 60.0
"""Time until the first word of an agent: logins that hang end here, slow disks do not."""


_TAIL_LINES = 30


Connect = Callable[[HostPlan], AgentConnection]


@dataclass
class _Agent:
    """What is known of one agent."""

    host: HostPlan
    log: LogTail
    """Holds what it, or ssh, says when it breaks."""
    began_at: float
    heard_at: float
    place: ProcessLocation | None = None
    scratch: Path | None = None
    """Its temporary folder, for the case that it cannot remove it; ``None`` when it lies on another machine."""
    is_up: bool = False
    is_prepared: bool = False
    is_working: bool = True
    """It has, or may start, processes of the run."""
    is_finishing: bool = False
    """It was told to go."""
    gone: AgentExited | None = None


class AgentGroup:
    """Every host's agent. Single-threaded but for the pulse: it waits in ``turn`` and nowhere else.

    Args:
        plan: what to run.
        on_message: called with a host's name and each message that is not about the agent itself.
        on_lost: called with a host's name and why it is lost.
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
        self._agents: dict[AgentConnection, _Agent] = {}
        self._outlets: dict[AgentConnection, int] = {}
        self._has_started = False
        self._pulse = Keepalive(self._ping)
        self.lost: list[str] = []
        """Hosts that went without being told to."""

    @property
    def is_working(self) -> bool:
        """Whether some host has, or may start, processes of the run."""
        return any(agent.is_working for agent in self._agents.values())

    @property
    def is_complete(self) -> bool:
        """Whether every agent has answered."""
        return all(agent.is_up for agent in self._agents.values())

    @property
    def is_gone(self) -> bool:
        """Whether no agent is left."""
        return not self._agents

    @property
    def places(self) -> tuple[AgentLocation, ...]:
        """Where the agents that have answered are."""
        return tuple(
            AgentLocation(host=agent.host.host.name, ssh_destination=agent.host.host.ssh_destination, place=agent.place)
            for agent in self._agents.values()
            if agent.place is not None
        )

    def connect(self, connect: Connect, *, environ: Mapping[str, str] = os.environ) -> None:
        """Open every connection at once and say what each host is to do; nothing starts there before all are ready."""
        files = {
            path.name: path.read_text(encoding="utf-8") for path in _files_to_stage(self._run_dir) if path.is_file()
        }
        env = {name: environ[name] for name in self._plan.forwarded_env if name in environ}
        session = to_tree(locate_this_process())
        for number, host in enumerate(self._plan.hosts):
            log, now = LogTail(self._run_dir.log_of(host.host.name, "agent")), time.monotonic()
            connection = connect(host)
            self._agents[connection] = _Agent(host=host, log=log, began_at=now, heard_at=now)
            self._selector.register(connection, selectors.EVENT_READ, connection)
            connection.send(
                Assignment(
                    host=to_tree(host),
                    run_dir=self._plan.run_dir,
                    run_id=self._plan.run_id,
                    run_hash=self._plan.run_hash,
                    grace_s=self._plan.grace_s,
                    heartbeat_timeout_s=self._plan.heartbeat_timeout_s,
                    env=env,
                    # the plan grows with the hosts; only the first one, where rank 0 and the tracker are, reads it
                    files=files if number == 0 else {name: files[name] for name in files if name.endswith(".yaml")},
                    session=session,
                )
            )
        if self._plan.heartbeat_timeout_s:
            self._pulse.start()

    def turn(self) -> None:
        """Wait a moment, take what the agents tell, and notice who is silent."""
        self._watch_outlets()
        for key, events in self._selector.select(_TICK_S):
            connection: AgentConnection = key.data
            if events & selectors.EVENT_WRITE:
                connection.flush()
            elif connection in self._agents:
                self._read(connection)
        self._notice_silence(time.monotonic())

    def tell(self, message: AgentMessage) -> None:
        """Send to every agent."""
        for connection in self._agents:
            connection.send(message)

    def hold(self) -> None:
        """Tell every agent that this process is about to be stopped, and see that it is sent."""
        self.tell(SessionSuspended())
        deadline = time.monotonic() + 1.0
        while any(connection.outlet() for connection in self._agents) and time.monotonic() < deadline:
            self.turn()

    def resume(self) -> None:
        """Go on after having been stopped: nobody was silent, it was we who did not listen."""
        now = time.monotonic()
        for agent in self._agents.values():
            agent.heard_at = now
        self.tell(Ping())

    def finish(self) -> None:
        """Expect every agent to go from now on."""
        for agent in self._agents.values():
            agent.is_finishing = True

    def give_up(self, *, working_only: bool) -> None:
        """Break off every connection, or those to agents that still have processes of the run."""
        for connection in [known for known, agent in self._agents.items() if agent.is_working or not working_only]:
            self._close(connection)

    def close(self) -> None:
        """Break everything off."""
        self._pulse.stop()
        self.give_up(working_only=False)
        self._selector.close()

    def _read(self, connection: AgentConnection) -> None:
        messages = connection.receive()
        if messages is None:
            self._close(connection)
            return
        agent = self._agents[connection]
        agent.heard_at = time.monotonic()
        problem = ""
        try:
            for message in messages:
                self._take(connection, agent, message)
        except MalformedMessage as malformed:
            problem = str(malformed)
        if problem := problem or connection.malformed:
            self._close(connection, malformed=problem)

    def _take(self, connection: AgentConnection, agent: _Agent, message: AgentMessage) -> None:
        match message:
            case AgentReady(scratch=scratch, place=place):
                agent.is_up, agent.place = True, process_location_from_tree(place)
                is_here = connection.program is not None and not agent.host.host.ssh_destination
                agent.scratch = Path(scratch) if is_here and is_scratch_folder(scratch) else None
                self._on_message(connection.host, message)
            case HostPrepared():
                agent.is_prepared = True
                self._on_message(connection.host, message)
                if not self._has_started and not self.lost and all(one.is_prepared for one in self._agents.values()):
                    self._has_started = True
                    self.tell(StartRanks())
            case AgentIdle():
                agent.is_working = False
                self._on_message(connection.host, message)
            case AgentExited():
                agent.gone = message
            case Ping():
                pass
            case _:
                self._on_message(connection.host, message)

    def _notice_silence(self, now: float) -> None:
        limit = self._plan.heartbeat_timeout_s
        for connection, agent in list(self._agents.items()):
            waited = now - (agent.heard_at if agent.is_up else agent.began_at)
            if waited > (limit if agent.is_up else _CONNECT_S) and (limit or not agent.is_up):
                self._close(connection, silent_s=waited)

    def _close(self, connection: AgentConnection, *, silent_s: float | None = None, malformed: str = "") -> None:
        """Let an agent go. One that was not told to go was killed, or broke, or is out of reach: its host is lost."""
        self._selector.unregister(connection)
        outlet = self._outlets.pop(connection, None)
        if outlet is not None:
            self._selector.unregister(outlet)
        agent = self._agents.pop(connection)
        code = connection.close()
        if code == 0 and (agent.is_finishing or not agent.is_working) and not malformed:
            return
        if agent.scratch is not None:
            remove_scratch(agent.scratch)
        self.lost.append(connection.host)
        self._on_lost(connection.host, self._why(connection, agent, code=code, silent_s=silent_s, malformed=malformed))

    def _why(
        self, connection: AgentConnection, agent: _Agent, *, code: int, silent_s: float | None, malformed: str
    ) -> Failure:
        host, log, tail = agent.host.host.name, agent.log.path, agent.log.last(_TAIL_LINES)
        if silent_s is not None:
            return silent_host_failure(host, for_s=silent_s, was_up=agent.is_up, log=log, tail=tail)
        if agent.gone is not None:
            return agent_exited_failure(host, agent.gone, log=log, tail=tail)
        if malformed:
            return malformed_message_failure(host, malformed, log=log, tail=tail)
        if not agent.host.host.ssh_destination:  # our own child: what we see is its end
            gone = AgentExited(code=code if code >= 0 else None, signal=-code if code < 0 else None)
            return agent_exited_failure(host, gone, log=log, tail=tail)
        return connection_lost_failure(host, program=connection.program, code=code, log=log, tail=tail)

    def _watch_outlets(self) -> None:
        """Wait for writability exactly where something waits to be sent."""
        for connection in self._agents:
            outlet, watched = connection.outlet(), self._outlets.get(connection)
            if outlet is not None and watched is None:
                self._selector.register(outlet, selectors.EVENT_WRITE, connection)
                self._outlets[connection] = outlet
            elif outlet is None and watched is not None:
                self._selector.unregister(self._outlets.pop(connection))

    def _ping(self) -> None:
        for connection in list(self._agents):
            connection.send(Ping())


def _files_to_stage(run_dir: RunDir) -> tuple[Path, ...]:
    return (run_dir.snapshot, run_dir.plan)


def agent_exited_failure(host: str, gone: AgentExited, *, log: Path, tail: str) -> Failure:
    """Return the failure of an agent whose end was seen: by its warden, or as our own child."""
    reason = f"the host agent on {host} {describe_exit(gone.code, gone.signal)}"
    code = shell_exit_code(gone.code, gone.signal) or 1
    return _host_failure(host, reason, log=log, tail=tail, code=code, signal=gone.signal)


def connection_lost_failure(host: str, *, program: str | None, code: int, log: Path, tail: str) -> Failure:
    """Return the failure of a connection that broke off.

    Args:
        host: where it led.
        program: what made it (``ssh``); ``None`` for a bare socket.
        code: how that ended, negative for a signal.
        log: holds what it said.
        tail: the end of it.
    """
    last = tail.strip().rpartition("\n")[2]
    how = describe_exit(code, None) if code >= 0 else describe_exit(None, -code)
    what = f"{program} {how}" if program else "its agent was killed, or hung up"
    reason = f"the connection to {host} was lost: {what}{f', saying: {last}' if last else ''}"
    return _host_failure(host, reason, log=log, tail=tail)


def silent_host_failure(host: str, *, for_s: float, was_up: bool, log: Path, tail: str) -> Failure:
    """Return the failure of a host that is not heard of."""
    if was_up:
        what = f"nothing was heard of {host} for {for_s:.0f} s: it is down, frozen, or cut off from here"
        reason = f"{what}; what runs there ends by itself when it hears nothing of us"
    else:
        reason = f"the host agent on {host} did not answer within {for_s:.0f} s"
    return _host_failure(host, reason, log=log, tail=tail)


def malformed_message_failure(host: str, what: str, *, log: Path, tail: str) -> Failure:
    """Return the failure of an agent that sent what is no message."""
    reason = f"the connection to {host} was closed: its agent sent {what}"
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
