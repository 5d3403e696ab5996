"""The session: the one process that sees every host, decides when a run is over, and says how it ended."""

from __future__ import annotations

import math
import os
import selectors
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import EXIT_PREEMPTED
from launcher.plan import HostPlan, Plan
from launcher.rundir import RunDir
from launcher.schema import to_tree
from launcher.supervise.conclude import forget_last_end
from launcher.supervise.connection import Connection
from launcher.supervise.console import Console, open_console
from launcher.supervise.failure import Failure
from launcher.supervise.judge import Judge
from launcher.supervise.lines import Tail
from launcher.supervise.linux import become_subreaper
from launcher.supervise.messages import (
    AgentSignalled,
    Assignment,
    Dump,
    End,
    Finish,
    Idle,
    Line,
    Message,
    Note,
    RankBeat,
    Ready,
)
from launcher.supervise.outcome import Outcome
from launcher.supervise.processes import descendants, end_descendants
from launcher.supervise.sidecars import SIDECAR_WAIT_S
from launcher.supervise.signals import collected_signals
from launcher.supervise.verdict import says_port_taken

_TICK_S = 0.1
_DUMP_S = 1.0
"""Time the ranks get to write their stacks."""
_ANSWER_S = 10.0
"""Time, beyond the grace, after which an agent that was told to end the run counts as lost."""

_TAIL_LINES = 30

Connect = Callable[[HostPlan], Connection]


@dataclass
class Agent:
    """What the session knows of one agent."""

    log: Tail
    """Holds what it says when it breaks."""
    scratch: Path | None = None
    """Its temporary folder, for the case that it cannot remove it."""
    is_working: bool = True
    """It has, or may start, processes of the run."""
    is_finishing: bool = False
    """It was told to go."""


def run_session(plan: Plan, connect: Connect) -> Outcome:
    """Start ``plan`` on every host and stay until nothing of it is left anywhere.

    Args:
        plan: what to run.
        connect: opens the agent of one host.
    """
    forget_last_end(RunDir(Path(plan.run_dir)))
    with open_console() as console, collected_signals() as arrived:
        return Session(plan, console=console, arrived=arrived).run(connect)


class Session:
    """One attempt. Single-threaded: it waits in ``_turn`` and nowhere else.

    Args:
        plan: what to run.
        console: where to show what the ranks say.
        arrived: grows by every signal that this process gets.
    """

    def __init__(self, plan: Plan, *, console: Console, arrived: list[int]) -> None:
        self._plan, self._console, self._arrived = plan, console, arrived
        self._run_dir = RunDir(Path(plan.run_dir))
        self._judge = Judge(plan, self._run_dir)
        self._selector = selectors.DefaultSelector()
        self._agents: dict[Connection, Agent] = {}
        self._any_lost = False
        self._failure: Failure | None = None
        self._cancelled_by: int | None = None
        self._give_up_at = math.inf

    def run(self, connect: Connect) -> Outcome:
        """Run the plan."""
        become_subreaper()  # should an agent be killed, what it leaves comes to us
        strangers = set(descendants(os.getpid()))
        try:
            for host in self._plan.hosts:
                self._add(connect(host), host)
            while any(agent.is_working for agent in self._agents.values()):
                self._turn()
                self._decide()
            outcome = self._outcome()
            self._finish(outcome.exit_code)
        finally:
            for connection in list(self._agents):
                self._close(connection)
            if self._any_lost:
                end_descendants(os.getpid(), spare=strangers)
        return outcome

    def _add(self, connection: Connection, host: HostPlan) -> None:
        log = Tail(self._run_dir.log_of(connection.host, "agent"))
        self._agents[connection] = Agent(log=log)
        self._selector.register(connection, selectors.EVENT_READ, connection)
        plan = self._plan
        tree = to_tree(host)
        connection.send(Assignment(host=tree, run_dir=plan.run_dir, run_id=plan.run_id, grace_s=plan.grace_s))

    def _turn(self) -> None:
        """Wait a moment and take what the agents tell."""
        for key, _ in self._selector.select(_TICK_S):
            connection: Connection = key.data
            messages = connection.receive()
            if messages is None:
                self._close(connection)
                continue
            for message in messages:
                self._take(connection, message)

    def _take(self, connection: Connection, message: Message) -> None:
        host, agent = connection.host, self._agents[connection]
        match message:
            case Line(who=who, text=text):
                shown = self._plan.show_ranks
                if shown is None or not isinstance(who, int) or who in shown:
                    self._console.line(f"{host}:{who} | {text}")
            case Note(text=text):
                self._console.line(f"{host} | {text}")
            case Ready(scratch=scratch):
                agent.scratch = Path(scratch)
            case Idle():
                agent.is_working = False
            case AgentSignalled(signal=number):
                self._cancel(number)
            case _:
                self._judge.hear(host, message, now=time.monotonic())
                if isinstance(message, RankBeat) and message.rank == 0:
                    self._console.progress(message.step or 0, self._plan.work.steps, message.numbers)

    def _decide(self) -> None:
        """End the run when there is a reason to."""
        self._heed_signals()
        now = time.monotonic()
        if self._failure is None and self._cancelled_by is None:
            if cause := self._judge.cause(now=now, all_over=False):
                self._fail(cause)
            elif stalled := self._judge.stalled(now=now):
                self._tell(Dump())
                while time.monotonic() < now + _DUMP_S:
                    self._turn()
                self._fail(stalled)
        if now > self._give_up_at:
            for connection in [known for known, agent in self._agents.items() if agent.is_working]:
                self._close(connection)

    def _heed_signals(self) -> None:
        """Pass the first signal on to the ranks; an interrupt while the run is ending kills at once."""
        while self._arrived:
            number = self._arrived.pop(0)
            if math.isfinite(self._give_up_at) and number == signal.SIGINT:
                self._tell(End(signal=signal.SIGKILL, grace_s=0.0))
            else:
                self._cancel(number)

    def _cancel(self, number: int) -> None:
        if self._failure is None and self._cancelled_by is None:
            self._cancelled_by = number
            self._end(number)

    def _fail(self, failure: Failure) -> None:
        self._failure = failure
        self._end(signal.SIGTERM)

    def _end(self, number: int) -> None:
        grace_s = self._plan.grace_s
        self._tell(End(signal=number, grace_s=grace_s))
        self._give_up_at = time.monotonic() + grace_s + _ANSWER_S

    def _finish(self, exit_code: int) -> None:
        """Have every agent tell its sidecars how the run ended, and wait until all agents are gone."""
        for agent in self._agents.values():
            agent.is_finishing = True
        self._tell(Finish(exit_code=exit_code))
        self._give_up_at = time.monotonic() + SIDECAR_WAIT_S + _ANSWER_S
        while self._agents and time.monotonic() < self._give_up_at:
            self._turn()
            self._heed_signals()

    def _outcome(self) -> Outcome:
        now = time.monotonic()
        if self._cancelled_by is not None:
            if self._judge.preempted():
                return Outcome(status="preempted", exit_code=EXIT_PREEMPTED)
            return Outcome(status="cancelled", exit_code=128 + self._cancelled_by)
        cause = self._failure or self._judge.cause(now=now, all_over=True) or self._judge.missing()
        if cause is None:
            return Outcome(status="completed", exit_code=0)
        failure = self._judge.complete(cause)
        if failure.is_preemption:
            return Outcome(status="preempted", exit_code=EXIT_PREEMPTED)
        taken = says_port_taken(failure) and not self._judge.has_begun
        return Outcome(status="failed", exit_code=failure.exit_code, failure=failure, port_taken=taken)

    def _close(self, connection: Connection) -> None:
        """Let an agent go. One that was not told to go was killed, or broke: then its host is lost."""
        self._selector.unregister(connection)
        agent = self._agents.pop(connection)
        code = connection.close()
        if agent.is_finishing and code == 0:
            return
        self._any_lost = True
        if agent.scratch is not None:
            shutil.rmtree(agent.scratch, ignore_errors=True)
        self._judge.lost_agent(connection.host, code=code, tail=agent.log.last(_TAIL_LINES), now=time.monotonic())

    def _tell(self, message: Message) -> None:
        for connection in self._agents:
            connection.send(message)
