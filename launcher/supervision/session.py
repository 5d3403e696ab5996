"""The session: one process that sees every host and decides when and how a run ended."""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from launcher.errors import EXIT_PREEMPTED
from launcher.protocol.messages import (
    AgentExited,
    AgentIdle,
    AgentMessage,
    AgentReady,
    AgentSignalled,
    CommandExited,
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
from launcher.protocol.rundir import RunDir, remove_unfinished_checkpoints
from launcher.protocol.session_file import SessionRecord, locate_this_process, write_session_file
from launcher.protocol.wire import MalformedMessage
from launcher.supervision.agent_group import AgentGroup, Connect
from launcher.supervision.child_process import SIDECAR_TIMEOUT_S
from launcher.supervision.console import Console, open_console
from launcher.supervision.failure_analysis import FailureAnalysis, is_port_taken
from launcher.supervision.file_sync import FileSyncReceiver
from launcher.supervision.finalize import remove_previous_result
from launcher.supervision.rank_tracker import RankTracker
from launcher.supervision.timeline import Timeline
from launcher.utils.processes import become_subreaper, collect_signals, descendants, end_descendants, signal_name
from launcher.utils.system import describe_full_disk, raise_open_file_limit

_STALL_DUMP_S = 2.0
"""Time for the ranks to dump their stacks when the run has stalled."""
_DEATH_DUMP_S = 0.5
"""The same when a rank has died without an exception."""
_TRANSFER_S = 0.3
"""Time for the stacks to arrive from other machines."""
_FILES_PER_HOST, _FILES_OF_SESSION = 4, 64
_MAX_STEPS = 2**53
"""Of a progress bar, which computes with them; a rank may name any number."""
_ANSWER_S = 10.0
"""Seconds, beyond the grace, until an agent that was ordered to end ranks counts as lost."""


def run_session(
    plan: Plan,
    connect: Connect,
    *,
    job: Mapping[str, str] | None = None,
    on_first_step: Callable[[], object] = lambda: None,
) -> RunOutcome:
    """Start ``plan`` on every host and wait until no process of it is left on any host.

    Args:
        plan: what to run.
        connect: opens the connection to the agent of one host.
        job: the scheduler's names of this run, for ``session.json``.
        on_first_step: called once every rank has taken an optimizer step.
    """
    remove_previous_result(RunDir(Path(plan.run_dir)))
    with raise_open_file_limit(num_session_files(plan)), open_console() as console, collect_signals() as signals:
        session = Session(plan, console=console, signals=signals, job=dict(job or {}), on_first_step=on_first_step)
        return session.run(connect)


def num_session_files(plan: Plan) -> int:
    """Return how many files the session of ``plan`` opens at most."""
    return _FILES_PER_HOST * len(plan.hosts) + _FILES_OF_SESSION


def _with_valid_exit_code(failure: Failure) -> Failure:
    """Return ``failure`` with an exit code that no parent process takes for success."""
    return failure if 0 < failure.exit_code < 256 else replace(failure, exit_code=1)


class Session:
    """One attempt of a run.

    Args:
        plan: what to run.
        console: shows the output of the ranks.
        signals: grows by every signal that this process receives.
        job: the scheduler's names of this run.
        on_first_step: called once every rank has taken an optimizer step.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        console: Console,
        signals: list[int],
        job: dict[str, str],
        on_first_step: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_first_step: Callable[[], object] | None = on_first_step
        self._plan, self._console, self._signals, self._job = plan, console, signals, job
        self._run_dir = RunDir(Path(plan.run_dir))
        self._agents = AgentGroup(plan, on_message=self._handle, on_lost=self._host_lost)
        self._tracker = RankTracker({place.rank: place.host for place in plan.ranks}, num_steps=plan.work.num_steps)
        self._analysis = FailureAnalysis(plan, self._run_dir, self._tracker)
        self._file_receiver = FileSyncReceiver(plan)
        self._timeline = Timeline(self._run_dir.timeline)
        self._launcher_exited: set[str] = set()
        """Agents whose launcher has exited."""
        self._failure: Failure | None = None
        self._cancelled_by: int | None = None
        self._give_up_at = math.inf

    def run(self, connect: Connect) -> RunOutcome:
        """Run the plan."""
        become_subreaper()  # the processes of an agent that is killed become children of this one
        unrelated = set(descendants(os.getpid()))
        self._write_session_file()
        self._timeline.note(socket.gethostname(), f"the session starts, on {len(self._plan.hosts)} hosts")
        try:
            self._agents.connect(connect)
            while self._agents.is_working:
                self._agents.poll()
                self._decide()
            outcome = self._outcome()
            self._timeline.note(socket.gethostname(), f"{outcome.status}, exit code {outcome.exit_code}")
            self._finish(outcome.exit_code)
        finally:
            self._agents.close()
            if self._agents.lost:
                end_descendants(os.getpid(), spare=unrelated)
        outcome = self._with_full_disk(outcome)
        if outcome.status != "completed":
            remove_unfinished_checkpoints(self._run_dir.checkpoints)  # no rank is left that writes them
        return outcome

    def _handle(self, agent: str, message: AgentMessage) -> None:
        self.dispatch(agent, message, now=time.monotonic())

    def dispatch(self, agent: str, message: AgentMessage, *, now: float) -> None:
        """Handle one message: the only place where messages of agents are matched.

        Args:
            agent: host of the agent; it may supervise ranks of other hosts.
            message: from it.
            now: ``time.monotonic()``.

        Raises:
            MalformedMessage: the run has no such rank or host.
        """
        match message:
            case AgentReady():
                self._agents.agent_ready(agent, message)
                self._timeline.agent_ready(agent, message)
                if self._agents.is_ready:
                    self._write_session_file()
            case HostPrepared():
                self._timeline.host_prepared(agent)
                self._agents.host_prepared(agent)
            case LauncherStarted():
                host = self._check_host(message.host) if message.host else agent
                self._timeline.launcher_started(host)
                self._agents.launcher_started(agent)
                self._tracker.launcher_started(host, now=now)
            case RankHeartbeat():
                host = self._host_of_rank(message.rank)
                self._timeline.rank_heartbeat(host, message)
                self._tracker.rank_heartbeat(host, message, now=now)
                self._show_progress(message)
                if self._on_first_step is not None and self._tracker.all_have_stepped:
                    self._on_first_step()
                    self._on_first_step = None
            case RankRaised():
                host = self._host_of_rank(message.rank)
                self._timeline.rank_raised(host, message)
                self._tracker.rank_raised(message, now=now)
                self._analysis.rank_raised(host, message, now=now)
            case RankStack():
                self._host_of_rank(message.rank)
                self._tracker.rank_stack(message, now=now)
            case RankExited():
                host = self._host_of_rank(message.rank)
                self._timeline.rank_exited(host, message)
                self._tracker.rank_exited(message)
                self._analysis.rank_exited(host, message, now=now)
            case CommandExited():
                self._timeline.command_exited(agent, message)
                self._analysis.command_exited(agent, message, now=now)
                if message.role == "launcher":
                    self._launcher_exited.add(agent)
            case AgentSignalled():
                self._timeline.agent_signalled(agent, message.signal)
                self._cancel(message.signal)
            case AgentIdle():
                self._check_idle(agent)
                self._timeline.agent_idle(agent)
                self._agents.agent_idle(agent)
            case AgentExited():
                self._agents.agent_exited(agent, message)
            case OutputLine():
                self._show_line(agent, message)
            case UserNote():
                self._console.line(f"{agent} | {message.text}")
            case FileChunk():
                self._store_chunk(agent, message)
            case _:
                raise AssertionError(f"no agent sends {message}")

    def _check_idle(self, agent: str) -> None:
        """Check that the processes of an agent can have exited.

        Raises:
            MalformedMessage: no process has failed, and some of its ranks have not exited: the run would never end.
        """
        if self._failure or self._cancelled_by is not None or self._analysis.has_failures:
            return
        living = [rank for rank in self._agents.ranks_of(agent) if rank not in self._tracker.exited]
        if not living:
            return
        if agent not in self._launcher_exited:
            raise MalformedMessage(f"a message agent_idle before rank {living[0]} had exited")
        self._analysis.ranks_missing(living, now=time.monotonic())

    def _check_host(self, host: str) -> str:
        if all(host != rank.host for rank in self._plan.ranks):
            raise MalformedMessage("a message about a host that the run does not have")
        return host

    def _host_of_rank(self, rank: int) -> str:
        if not 0 <= rank < len(self._plan.ranks):
            raise MalformedMessage(f"a message about rank {rank} of {len(self._plan.ranks)}")
        return self._plan.ranks[rank].host

    def _show_line(self, agent: str, message: OutputLine) -> None:
        source, shown = message.source, self._plan.show_ranks
        host = agent if isinstance(source, str) else self._host_of_rank(source)
        if shown is None or isinstance(source, str) or source in shown:
            self._console.line(f"{host}:{source} | {message.text}")

    def _show_progress(self, message: RankHeartbeat) -> None:
        if message.rank == 0:
            # a file of prompts has as many steps as lines, which the plan does not know
            num_steps = int(min(max(0, message.numbers.get("steps", self._plan.work.num_steps)), _MAX_STEPS))
            if num_steps == 0:  # a server has no last step
                return
            self._console.progress(message.step or 0, num_steps, message.numbers)

    def _store_chunk(self, agent: str, chunk: FileChunk) -> None:
        """Write a chunk of a host's file, and extend the time limit of the agent that sends it."""
        if problem := self._file_receiver.write(agent, chunk):
            self._console.line(f"{agent} | {problem}")
        self._give_up_at = max(self._give_up_at, time.monotonic() + _ANSWER_S)

    def _host_lost(self, host: str, failure: Failure) -> None:
        self._timeline.note(host, failure.reason)
        self._analysis.agent_lost(host, failure, now=time.monotonic())

    def _decide(self) -> None:
        """End the run if it was cancelled, has failed or has stalled."""
        self._handle_signals()
        now = time.monotonic()
        if self._failure is None and self._cancelled_by is None:
            if cause := self._analysis.cause(now=now, all_over=False):
                if self._analysis.is_unexplained(cause):
                    self._collect_stacks(within_s=_DEATH_DUMP_S)
                self._fail(cause)
            elif stall := self._tracker.find_stall(now=now, timeout_s=self._plan.stall_timeout_s):
                self._collect_stacks(within_s=_STALL_DUMP_S)
                self._fail(self._analysis.stall_failure(stall))
        if now > self._give_up_at:
            self._agents.give_up(working_only=True)

    def _collect_stacks(self, *, within_s: float) -> None:
        """Have every living rank dump its stacks, and wait for them."""
        deadline = time.monotonic() + within_s + _TRANSFER_S
        self._agents.broadcast(DumpStacks(within_s=within_s))
        while self._tracker.lacks_stacks and time.monotonic() < deadline:
            self._agents.poll()

    def _handle_signals(self) -> None:
        """Pass the first signal on to the ranks; SIGINT while the run is ending kills them at once."""
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGTSTP:
                self._agents.suspend()
                os.kill(os.getpid(), signal.SIGSTOP)
                self._agents.resume()
            elif math.isfinite(self._give_up_at) and number == signal.SIGINT:
                self._agents.broadcast(EndRanks(signal=signal.SIGKILL, grace_s=0.0))
            else:
                self._cancel(number)

    def _cancel(self, number: int) -> None:
        """Send every rank a signal: SIGTERM and SIGUSR1 let it save a checkpoint, others do not."""
        if self._failure is None and self._cancelled_by is None:
            self._timeline.note(socket.gethostname(), f"cancelled by {signal_name(number)}")
            self._cancelled_by = number
            self._end_ranks(number, self._plan.grace_after(number))

    def _fail(self, failure: Failure) -> None:
        """Kill the other ranks at once: all that they could save is in the newest checkpoint."""
        self._timeline.note(failure.host, f"the cause: {failure.reason}")
        self._failure = failure
        self._end_ranks(signal.SIGKILL, 0.0)

    def _end_ranks(self, number: int, grace_s: float) -> None:
        self._agents.broadcast(EndRanks(signal=number, grace_s=grace_s))
        self._give_up_at = time.monotonic() + grace_s + _ANSWER_S

    def _finish(self, exit_code: int) -> None:
        """Send the exit code to all agents, for their sidecars, and wait until they have exited."""
        self._agents.finish()
        self._agents.broadcast(FinishAgent(exit_code=exit_code))
        self._give_up_at = time.monotonic() + SIDECAR_TIMEOUT_S + _ANSWER_S
        while not self._agents.is_gone and time.monotonic() < self._give_up_at:
            self._agents.poll()
            self._handle_signals()

    def _outcome(self) -> RunOutcome:
        now, lost = time.monotonic(), tuple(self._agents.lost)
        if self._cancelled_by is not None:
            is_saved = self._analysis.is_preempted or self._tracker.has_saved_for_preemption
            if is_saved or self._had_nothing_to_save(self._cancelled_by):
                return RunOutcome(status="preempted", exit_code=EXIT_PREEMPTED)
            if self._plan.completes_on_signal and self._tracker.all_succeeded:
                return RunOutcome(status="completed", exit_code=0)
            return RunOutcome(status="cancelled", exit_code=128 + self._cancelled_by)
        cause = self._failure or self._analysis.cause(now=now, all_over=True) or self._analysis.missing_rank_failure()
        if cause is None:
            return RunOutcome(status="completed", exit_code=0)
        failure = _with_valid_exit_code(self._analysis.complete(cause))
        if failure.is_preemption:
            return RunOutcome(status="preempted", exit_code=EXIT_PREEMPTED)
        taken = is_port_taken(failure) and not self._tracker.has_stepped
        return RunOutcome(
            status="failed", exit_code=failure.exit_code, failure=failure, port_taken=taken, lost_hosts=lost
        )

    def _had_nothing_to_save(self, number: int) -> bool:
        """Whether a preempted run had taken no step: ranks that start do not handle the signal yet."""
        is_asked = self._plan.handles_preemption and number in (signal.SIGTERM, signal.SIGUSR1)
        return is_asked and not self._tracker.has_stepped

    def _with_full_disk(self, outcome: RunOutcome) -> RunOutcome:
        """Add a full disk to the reason of a failure, unless the failed rank named it itself."""
        failure, full = outcome.failure, describe_full_disk(self._run_dir.path)
        if failure is None or full is None or "the disk of" in failure.reason:
            return outcome
        first, _, rest = failure.reason.partition("\n")
        return replace(outcome, failure=replace(failure, reason="\n".join(filter(None, [f"{first}; {full}", rest]))))

    def _write_session_file(self) -> None:
        this, agents = locate_this_process(), self._agents.locations
        try:
            record = SessionRecord(
                backend=self._plan.backend, session=this, agents=agents, cwd=str(Path.cwd()), job=self._job
            )
            write_session_file(self._run_dir, record)
        except OSError as error:
            reason = describe_full_disk(self._run_dir.path) or error.strerror
            self._console.line(f"session.json cannot be written, so other shells cannot follow this run: {reason}")
