"""The session: one process that sees every host and decides when and how a run ended."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.store import remove_unfinished
from launcher.errors import EXIT_PREEMPTED
from launcher.protocol.messages import (
    AgentIdle,
    AgentMessage,
    AgentReady,
    AgentSignalled,
    DumpStacks,
    EndRanks,
    FileChunk,
    FinishAgent,
    HostPrepared,
    LauncherStarted,
    OutputLine,
    RankExited,
    RankHeartbeat,
    RankRaised,
    RankStack,
    UserNote,
)
from launcher.protocol.outcome import Failure, RunOutcome
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import SessionRecord, locate_this_process, write_session_file
from launcher.protocol.wire import MalformedMessage
from launcher.supervision.agent_group import AgentGroup, Connect
from launcher.supervision.child_process import SIDECAR_TIMEOUT_S
from launcher.supervision.console import Console, open_console
from launcher.supervision.failure_analysis import FailureAnalysis, is_port_taken
from launcher.supervision.file_sync import FileSyncReceiver
from launcher.supervision.finalize import remove_previous_result
from launcher.supervision.timeline import Timeline
from launcher.utils.processes import become_subreaper, collect_signals, descendants, end_descendants, signal_name
from launcher.utils.system import describe_full_disk, raise_open_file_limit

_DUMP_S = 2.0
"""Time the ranks get to show their stacks when the run stands still."""
_LOOK_S = 0.5
"""The same when a rank has died without a word."""
_TRAVEL_S = 0.3
"""Time for the answers to arrive from other machines."""
_FILES_PER_HOST, _FILES_OF_OURS = 4, 64
_ANSWER_S = 10.0
"""Time, beyond the grace, after which an agent that was told to end the run counts as lost."""


def run_session(plan: Plan, connect: Connect, *, job: Mapping[str, str] | None = None) -> RunOutcome:
    """Start ``plan`` on every host and stay until nothing of it is left anywhere.

    Args:
        plan: what to run.
        connect: opens the agent of one host.
        job: what a scheduler calls this run, for ``session.json``.
    """
    remove_previous_result(RunDir(Path(plan.run_dir)))
    files = _FILES_PER_HOST * len(plan.hosts) + _FILES_OF_OURS
    with raise_open_file_limit(files), open_console() as console, collect_signals() as arrived:
        return Session(plan, console=console, arrived=arrived, job=dict(job or {})).run(connect)


class Session:
    """One attempt.

    Args:
        plan: what to run.
        console: where to show what the ranks say.
        arrived: grows by every signal that this process gets.
        job: what a scheduler calls this run.
    """

    def __init__(self, plan: Plan, *, console: Console, arrived: list[int], job: dict[str, str]) -> None:
        self._plan, self._console, self._arrived, self._job = plan, console, arrived, job
        self._run_dir = RunDir(Path(plan.run_dir))
        self._judge = FailureAnalysis(plan, self._run_dir)
        self._crew = AgentGroup(plan, on_message=self._take, on_lost=self._miss)
        self._arrivals = FileSyncReceiver(plan)
        self._timeline = Timeline(self._run_dir.timeline)
        self._failure: Failure | None = None
        self._cancelled_by: int | None = None
        self._give_up_at = math.inf

    def run(self, connect: Connect) -> RunOutcome:
        """Run the plan."""
        become_subreaper()  # should an agent be killed, what it leaves comes to us
        strangers = set(descendants(os.getpid()))
        self._record()
        self._timeline.note(socket.gethostname(), f"the session begins, on {len(self._plan.hosts)} hosts")
        try:
            self._crew.connect(connect)
            while self._crew.is_working:
                self._crew.turn()
                self._decide()
            outcome = self._outcome()
            self._timeline.note(socket.gethostname(), f"{outcome.status}, exit code {outcome.exit_code}")
            self._finish(outcome.exit_code)
        finally:
            self._crew.close()
            if self._crew.lost:
                end_descendants(os.getpid(), spare=strangers)
        outcome = self._with_full_disk(outcome)
        if outcome.status != "completed":
            remove_unfinished(self._run_dir.checkpoints)  # no rank is left that could go on writing them
        return outcome

    def _with_full_disk(self, outcome: RunOutcome) -> RunOutcome:
        """Name a disk that is full in the reason of a failure, where the rank that failed could not."""
        failure, full = outcome.failure, describe_full_disk(self._run_dir.path)
        if failure is None or full is None or "the disk of" in failure.reason:
            return outcome
        first, _, rest = failure.reason.partition("\n")
        return replace(outcome, failure=replace(failure, reason="\n".join(filter(None, [f"{first}; {full}", rest]))))

    def _record(self) -> None:
        """Write down who runs this run."""
        me = locate_this_process()
        told = SessionRecord(backend=self._plan.backend, session=me, agents=self._crew.places, job=self._job)
        try:
            write_session_file(self._run_dir, told)
        except OSError as error:
            why = describe_full_disk(self._run_dir.path) or error.strerror
            self._console.line(f"session.json cannot be written, so other shells cannot follow this run: {why}")

    def _take(self, agent: str, message: AgentMessage) -> None:
        host = self._host_of(agent, message)
        self._timeline.hear(host, message)
        match message:
            case AgentReady():
                if self._crew.is_complete:
                    self._record()
            case HostPrepared() | AgentIdle():
                pass
            case OutputLine(who=who, text=text):
                shown = self._plan.show_ranks
                if shown is None or not isinstance(who, int) or who in shown:
                    self._console.line(f"{host}:{who} | {text}")
            case FileChunk():
                self._keep(agent, message)
            case UserNote(text=text):
                self._console.line(f"{host} | {text}")
            case AgentSignalled(signal=number):
                self._cancel(number)
            case _:
                self._judge.hear(host, message, now=time.monotonic())
                if isinstance(message, RankHeartbeat) and message.rank == 0:
                    total = int(message.numbers.get("steps", self._plan.work.num_steps))  # of lines, only ranks know
                    self._console.progress(message.step or 0, total, message.numbers)

    def _keep(self, agent: str, part: FileChunk) -> None:
        """Write down what arrives of a host's files, and have patience with whoever sends them."""
        if trouble := self._arrivals.take(agent, part):
            self._console.line(f"{agent} | {trouble}")
        self._give_up_at = max(self._give_up_at, time.monotonic() + _ANSWER_S)

    def _host_of(self, agent: str, message: AgentMessage) -> str:
        """Return the host that a message is about: an agent may watch over ranks of several.

        Raises:
            MalformedMessage: the run has no such rank or host.
        """
        match message:
            case RankHeartbeat(rank=rank) | RankRaised(rank=rank) | RankExited(rank=rank) | RankStack(rank=rank):
                return self._host_of_rank(rank)
            case OutputLine(who=int(rank)):
                return self._host_of_rank(rank)
            case LauncherStarted(host=host) if host:
                if all(host != rank.host for rank in self._plan.ranks):  # one agent may stand for several hosts
                    raise MalformedMessage("a message about a host that the run does not have")
                return host
        return agent

    def _host_of_rank(self, rank: int) -> str:
        if not 0 <= rank < len(self._plan.ranks):
            raise MalformedMessage(f"a message about rank {rank} of {len(self._plan.ranks)}")
        return self._plan.ranks[rank].host

    def _miss(self, host: str, failure: Failure) -> None:
        self._timeline.note(host, failure.reason)
        self._judge.lost_agent(host, failure, now=time.monotonic())

    def _decide(self) -> None:
        """End the run when there is a reason to."""
        self._heed_signals()
        now = time.monotonic()
        if self._failure is None and self._cancelled_by is None:
            if cause := self._judge.cause(now=now, all_over=False):
                if self._judge.is_unexplained(cause):
                    self._look(within_s=_LOOK_S)
                self._fail(cause)
            elif standstill := self._judge.standstill(now=now):
                self._look(within_s=_DUMP_S)
                self._fail(self._judge.blame(standstill))
        if now > self._give_up_at:
            self._crew.give_up(working_only=True)

    def _look(self, *, within_s: float) -> None:
        """Have every living rank show where it is."""
        deadline = time.monotonic() + within_s + _TRAVEL_S
        self._crew.tell(DumpStacks(within_s=within_s))
        while self._judge.lacks_stacks and time.monotonic() < deadline:
            self._crew.turn()

    def _heed_signals(self) -> None:
        """Pass the first signal on to the ranks; an interrupt while the run is ending kills at once."""
        while self._arrived:
            number = self._arrived.pop(0)
            if number == signal.SIGTSTP:
                self._crew.hold()
                os.kill(os.getpid(), signal.SIGSTOP)
                self._crew.resume()
            elif math.isfinite(self._give_up_at) and number == signal.SIGINT:
                self._crew.tell(EndRanks(signal=signal.SIGKILL, grace_s=0.0))
            else:
                self._cancel(number)

    def _cancel(self, number: int) -> None:
        """Have every rank told: SIGTERM and SIGUSR1 ask it to save and end, SIGINT and the others to end."""
        if self._failure is None and self._cancelled_by is None:
            self._timeline.note(socket.gethostname(), f"told to end by {signal_name(number)}")
            self._cancelled_by = number
            self._end(number, self._plan.preempt_grace_s if number == signal.SIGUSR1 else self._plan.grace_s)

    def _fail(self, failure: Failure) -> None:
        """End the other ranks at once: they have nothing to save that the newest checkpoint does not hold."""
        self._timeline.note(failure.host, f"the cause: {failure.reason}")
        self._failure = failure
        self._end(signal.SIGKILL, 0.0)

    def _end(self, number: int, grace_s: float) -> None:
        self._crew.tell(EndRanks(signal=number, grace_s=grace_s))
        self._give_up_at = time.monotonic() + grace_s + _ANSWER_S

    def _finish(self, exit_code: int) -> None:
        """Have every agent tell its sidecars how the run ended, and wait until all agents are gone."""
        self._crew.finish()
        self._crew.tell(FinishAgent(exit_code=exit_code))
        self._give_up_at = time.monotonic() + SIDECAR_TIMEOUT_S + _ANSWER_S
        while not self._crew.is_gone and time.monotonic() < self._give_up_at:
            self._crew.turn()
            self._heed_signals()

    def _outcome(self) -> RunOutcome:
        now, lost = time.monotonic(), tuple(self._crew.lost)
        if self._cancelled_by is not None:
            if self._judge.preempted():
                return RunOutcome(status="preempted", exit_code=EXIT_PREEMPTED)
            if self._plan.completes_on_signal and self._judge.all_ended_well:
                return RunOutcome(status="completed", exit_code=0)
            return RunOutcome(status="cancelled", exit_code=128 + self._cancelled_by)
        cause = self._failure or self._judge.cause(now=now, all_over=True) or self._judge.missing()
        if cause is None:
            return RunOutcome(status="completed", exit_code=0)
        failure = self._judge.complete(cause)
        if failure.is_preemption:
            return RunOutcome(status="preempted", exit_code=EXIT_PREEMPTED)
        taken = is_port_taken(failure) and not self._judge.has_begun
        return RunOutcome(
            status="failed", exit_code=failure.exit_code, failure=failure, port_taken=taken, lost_hosts=lost
        )
