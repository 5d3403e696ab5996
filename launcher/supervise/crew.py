"""The agents of all hosts, as one: connected together, started together, told together, and missed when lost."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.plan import HostPlan, Plan
from launcher.rundir import RunDir
from launcher.schema import to_tree
from launcher.supervise import lost
from launcher.supervise.connection import Connection
from launcher.supervise.failure import Failure
from launcher.supervise.lines import Tail
from launcher.supervise.link import is_scratch_folder, remove_scratch
from launcher.supervise.messages import (
    AgentGone,
    Assignment,
    Hold,
    Idle,
    MalformedMessage,
    Message,
    Ping,
    Prepared,
    Ready,
    Start,
)
from launcher.supervise.pulse import Pulse
from launcher.supervise.whereabouts import AgentPlace, ProcessPlace, place_from_tree, place_of_this_process

_TICK_S = 0.1
_CONNECT_S = 60.0
"""Time until the first word of an agent: logins that hang end here, slow disks do not."""

_TAIL_LINES = 30

Connect = Callable[[HostPlan], Connection]


@dataclass
class _Agent:
    """What is known of one agent."""

    host: HostPlan
    log: Tail
    """Holds what it, or ssh, says when it breaks."""
    began_at: float
    heard_at: float
    place: ProcessPlace | None = None
    scratch: Path | None = None
    """Its temporary folder, for the case that it cannot remove it; ``None`` when it lies on another machine."""
    is_up: bool = False
    is_prepared: bool = False
    is_working: bool = True
    """It has, or may start, processes of the run."""
    is_finishing: bool = False
    """It was told to go."""
    gone: AgentGone | None = None


class Crew:
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
        on_message: Callable[[str, Message], None],
        on_lost: Callable[[str, Failure], None],
    ) -> None:
        self._plan, self._run_dir = plan, RunDir(Path(plan.run_dir))
        self._on_message, self._on_lost = on_message, on_lost
        self._selector = selectors.DefaultSelector()
        self._agents: dict[Connection, _Agent] = {}
        self._outlets: dict[Connection, int] = {}
        self._has_started = False
        self._pulse = Pulse(self._ping)
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
    def places(self) -> tuple[AgentPlace, ...]:
        """Where the agents that have answered are."""
        return tuple(
            AgentPlace(host=agent.host.host.name, login=agent.host.host.login, place=agent.place)
            for agent in self._agents.values()
            if agent.place is not None
        )

    def connect(self, connect: Connect, *, environ: Mapping[str, str] = os.environ) -> None:
        """Open every connection at once and say what each host is to do; nothing starts there before all are ready."""
        files = {path.name: path.read_text(encoding="utf-8") for path in _files(self._run_dir) if path.is_file()}
        env = {name: environ[name] for name in self._plan.forward if name in environ}
        session = to_tree(place_of_this_process())
        for number, host in enumerate(self._plan.hosts):
            log, now = Tail(self._run_dir.log_of(host.host.name, "agent")), time.monotonic()
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
            connection: Connection = key.data
            if events & selectors.EVENT_WRITE:
                connection.flush()
            elif connection in self._agents:
                self._read(connection)
        self._notice_silence(time.monotonic())

    def tell(self, message: Message) -> None:
        """Send to every agent."""
        for connection in self._agents:
            connection.send(message)

    def hold(self) -> None:
        """Tell every agent that this process is about to be stopped, and see that it is sent."""
        self.tell(Hold())
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

    def _read(self, connection: Connection) -> None:
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

    def _take(self, connection: Connection, agent: _Agent, message: Message) -> None:
        match message:
            case Ready(scratch=scratch, place=place):
                agent.is_up, agent.place = True, place_from_tree(place)
                is_here = connection.program is not None and not agent.host.host.login
                agent.scratch = Path(scratch) if is_here and is_scratch_folder(scratch) else None
                self._on_message(connection.host, message)
            case Prepared():
                agent.is_prepared = True
                self._on_message(connection.host, message)
                if not self._has_started and not self.lost and all(one.is_prepared for one in self._agents.values()):
                    self._has_started = True
                    self.tell(Start())
            case Idle():
                agent.is_working = False
                self._on_message(connection.host, message)
            case AgentGone():
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

    def _close(self, connection: Connection, *, silent_s: float | None = None, malformed: str = "") -> None:
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
        self, connection: Connection, agent: _Agent, *, code: int, silent_s: float | None, malformed: str
    ) -> Failure:
        host, log, tail = agent.host.host.name, agent.log.path, agent.log.last(_TAIL_LINES)
        if silent_s is not None:
            return lost.silent(host, for_s=silent_s, was_up=agent.is_up, log=log, tail=tail)
        if agent.gone is not None:
            return lost.agent_ended(host, agent.gone, log=log, tail=tail)
        if malformed:
            return lost.malformed(host, malformed, log=log, tail=tail)
        if not agent.host.host.login:  # our own child: what we see is its end
            gone = AgentGone(code=code if code >= 0 else None, signal=-code if code < 0 else None)
            return lost.agent_ended(host, gone, log=log, tail=tail)
        return lost.connection_ended(host, program=connection.program, code=code, log=log, tail=tail)

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


def _files(run_dir: RunDir) -> tuple[Path, ...]:
    return (run_dir.snapshot, run_dir.plan)
