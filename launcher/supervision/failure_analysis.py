"""Failure analysis: has the run failed, and which failure is the cause?

When one rank dies, the others see their connections break, or are ended by torchrun, within milliseconds, and may well
be gone before the first one is. So the exits of a short while are collected, and told apart by what the ranks said.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.errors import EXIT_STALLED
from launcher.protocol.messages import AgentMessage, CommandExited, RankExited, RankRaised
from launcher.protocol.outcome import Failure, Victim
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RunDir
from launcher.supervision import stall
from launcher.supervision.child_process import command_name
from launcher.supervision.rank_tracker import RankTracker
from launcher.supervision.stall import Stall
from launcher.utils.processes import describe_exit, shell_exit_code

COLLECT_FAILURES_S = 0.3
"""Time after the first failure in which others are collected."""


WAIT_FOR_CAUSE_S = 3.0
"""The same while every failure seen looks like the consequence of one not seen yet, or is no failure at all."""


_CONSEQUENCE = re.compile(
    r"DistBackendError|DistNetworkError|DistStoreError|Watchdog caught collective operation timeout"
    r"|Connection (closed|reset|refused)|Broken pipe|Socket closed|closed by peer|Application timeout"
)


_WAS_SIGNALLED = re.compile(r"SignalException.* got signal: (\d+)")
"""What torchrun says, before it exits with code 1, when somebody signalled it."""


_PORT_TAKEN = re.compile(r"EADDRINUSE|[Aa]ddress already in use")


class FailureAnalysis:
    """Hears the events of every host."""

    def __init__(self, plan: Plan, run_dir: RunDir) -> None:
        self._plan, self._run_dir = plan, run_dir
        self._host_of = {place.rank: place.host for place in plan.ranks}
        self._suspects: dict[int | str, FailureCandidate] = {}
        self._first_heard: float | None = None
        self._passed_on: set[Failure] = set()
        """Ends of ranks by a signal that came from what had started them."""
        self._survey = RankTracker(self._host_of, steps=plan.work.num_steps)

    def hear(self, host: str, message: AgentMessage, *, now: float) -> None:
        """Take one event; ``now`` is ``time.monotonic()``."""
        self._survey.hear(host, message, now=now)
        match message:
            case RankRaised():
                self._suspect(message.rank, self._of_exception(host, message), now)
            case RankExited() if message.code != 0:
                failure = self._of_rank(host, message)
                self._suspect(message.rank, failure, now, is_passed_on=message.by_launcher)
            case CommandExited() if message.code != 0:
                failure = self._of_command(host, message)
                self._suspect(host + message.role, failure, now, of_launcher=message.role == "launcher")
            case _:
                pass

    def lost_agent(self, host: str, failure: Failure, *, now: float) -> None:
        """Take that the agent of ``host`` is gone though nobody told it to go."""
        self._suspect(host, failure, now)

    def cause(self, *, now: float, all_over: bool) -> Failure | None:
        """Return why the run has failed; ``None`` when it has not, or when it is too early to say."""
        suspects = list(self._suspects.values())
        if self._first_heard is None:
            return None
        patience_s = cause_timeout_s(self._plan.heartbeat_timeout_s)
        if not all_over and not is_decided(suspects, waited_s=now - self._first_heard, patience_s=patience_s):
            return None
        left = self._survey.left_early()
        if left is not None and all(suspect.is_consequence for suspect in suspects):
            return self._of_leaver(left, noticed=root_cause(suspects))
        cause = self._first_passed_on_alone() or root_cause(suspects)
        return self._of_signalled_launcher(cause) if self._was_only_passed_on(cause) else cause

    def is_unexplained(self, failure: Failure) -> bool:
        """Return whether a rank died without a word: then only the others can tell what was going on."""
        told_otherwise = failure.error or failure.is_preemption or failure.exit_code == EXIT_STALLED
        return failure.rank is not None and not told_otherwise

    def standstill(self, *, now: float) -> Stall | None:
        """Return the present moment, once some rank has been silent too long."""
        return self._survey.standstill(now=now, timeout_s=self._plan.stall_timeout_s)

    @property
    def all_ended_well(self) -> bool:
        """Whether every rank has ended with exit code 0."""
        ended = self._survey.ended
        return ended.keys() == self._host_of.keys() and all(end.code == 0 for end in ended.values())

    @property
    def lacks_stacks(self) -> bool:
        """Whether some living rank has not shown its stack."""
        return self._survey.lacks_stacks

    def blame(self, standstill: Stall) -> Failure:
        """Return a failure that names the rank which holds up the others; better once the stacks are known."""
        stacks, left = self._survey.stacks, self._survey.left_early()
        ranks = self._survey.progress(standstill)
        if left is not None and stall.ranks_in_collectives(standstill.positions, stacks) == standstill.positions.keys():
            return replace(self._of_leaver(left), exit_code=EXIT_STALLED, ranks=ranks)
        rank = stall.find_straggler(standstill.positions, stacks)
        host = standstill.positions[rank].host
        return Failure(
            host=host,
            rank=rank,
            time=time.time(),
            exit_code=EXIT_STALLED,
            signal=None,
            reason=stall.describe_straggler(rank, standstill, stacks),
            traceback=stacks[rank].python if rank in stacks else "",
            log=str(self._run_dir.log_of(host, rank)),
            ranks=ranks,
        )

    def missing(self) -> Failure | None:
        """Return a failure when everything ended well except that some rank never said so."""
        absent = sorted(self._host_of.keys() - self._survey.ended.keys())
        if not absent:
            return None
        host = self._host_of[absent[0]]
        reason = f"rank {absent[0]} on {host} never reported its end, though what started it ended without an error"
        log = str(self._run_dir.log_of(host, absent[0]))
        return Failure(host=host, rank=absent[0], exit_code=1, signal=None, reason=reason, log=log, time=time.time())

    def complete(self, failure: Failure) -> Failure:
        """Return ``failure`` with what became known after it was found: its own end and the victims."""
        known = self._suspects.get(failure.rank) if failure.rank is not None else None
        if known and failure.exit_code != EXIT_STALLED:
            failure = known.failure
        if self.is_unexplained(failure) and not failure.ranks:
            failure = replace(failure, ranks=self._survey.progress())
        return replace(failure, victims=tuple(self._victim(end) for end in self._victims_of(failure)))

    @property
    def has_begun(self) -> bool:
        """Whether a rank has reached its first step."""
        return self._survey.has_begun

    def preempted(self) -> bool:
        """Return whether a rank ended in the way that means: resume me."""
        return any(suspect.failure.is_preemption for suspect in self._suspects.values())

    def _suspect(
        self,
        key: int | str,
        failure: Failure,
        now: float,
        *,
        of_launcher: bool = False,
        is_passed_on: bool = False,
    ) -> None:
        earlier = self._suspects.get(key)
        if earlier is not None and earlier.failure.error:  # it raised before it ended: that is the reason
            code = failure.exit_code if failure.signal is None else earlier.failure.exit_code
            failure, is_passed_on = replace(earlier.failure, exit_code=code), False
        # torchrun and deepspeed end in error because a rank did, unless a signal ended them
        is_consequence = failure.signal is None if of_launcher else is_passed_on or looks_like_consequence(failure)
        self._suspects[key] = FailureCandidate(failure=failure, is_consequence=is_consequence)
        if is_passed_on:
            self._passed_on.add(failure)
        if self._first_heard is None:
            self._first_heard = now

    def _of_exception(self, host: str, raised: RankRaised) -> Failure:
        return Failure(
            host=host,
            rank=raised.rank,
            exit_code=raised.code,
            signal=None,
            reason=f"rank {raised.rank} on {host} failed: {raised.error}",
            error=raised.error,
            traceback=raised.traceback,
            log=str(self._run_dir.log_of(host, raised.rank)),
            time=raised.time,
        )

    def _of_rank(self, host: str, end: RankExited) -> Failure:
        return Failure(
            host=host,
            rank=end.rank,
            exit_code=shell_exit_code(end.code, end.signal),
            signal=end.signal,
            reason=f"rank {end.rank} on {host} {describe_exit(end.code, end.signal)}",
            traceback=end.tail,
            log=str(self._run_dir.log_of(host, end.rank)),
            time=end.time,
        )

    def _first_passed_on_alone(self) -> Failure | None:
        """Return the first rank that what had started it ended, on a host where nothing else failed: what ranks of
        other hosts then say of broken connections came of that, however soon they say it. None where a cause is known.
        """
        failures = [suspect.failure for suspect in self._suspects.values()]
        elsewhere = {failure.host for failure in failures if failure not in self._passed_on}
        alone = [failure for failure in self._passed_on if failure.host not in elsewhere]
        if not alone or not all(suspect.is_consequence for suspect in self._suspects.values()):
            return None
        return min(alone, key=lambda failure: failure.time)

    def _was_only_passed_on(self, cause: Failure) -> bool:
        """Return whether a signal from torchrun is all there is, and torchrun takes its time to end and say why."""
        return cause in self._passed_on and f"{cause.host}launcher" not in self._suspects

    def _of_signalled_launcher(self, passed_on: Failure) -> Failure:
        """Return the failure of a launcher of ranks that somebody signalled, which shows by what it sent to a rank."""
        host = passed_on.host
        plans = self._plan.hosts
        start = next((plan.agent_command for plan in plans if plan.host.name == host), plans[0].agent_command)
        return replace(
            passed_on,
            rank=None,
            reason=f"{command_name(start)} on {host} {describe_exit(None, passed_on.signal)}",
            traceback="",
            log=str(self._run_dir.log_of(host, "agent")),
        )

    def _of_leaver(self, end: RankExited, *, noticed: Failure | None = None) -> Failure:
        """Return the failure of a rank that ended well while the others still needed it."""
        host = self._host_of[end.rank]
        reason = self._survey.how_left(end)
        if noticed is not None:
            reason += f"; then {noticed.reason}"
        elif waits := stall.describe_wait(self._survey.living, self._survey.stacks):
            reason += f"; {waits}"
        return Failure(
            host=host,
            rank=end.rank,
            exit_code=noticed.exit_code if noticed else 1,
            signal=None,
            reason=reason,
            traceback=noticed.traceback if noticed else "",
            log=str(self._run_dir.log_of(host, end.rank)),
            time=end.time,
        )

    def _of_command(self, host: str, end: CommandExited) -> Failure:
        number = end.signal or signal_in_output(end.tail)
        return Failure(
            host=host,
            rank=None,
            exit_code=shell_exit_code(end.code, number),
            signal=number,
            reason=end.why or f"{end.name} on {host} {describe_exit(end.code, number)}",
            traceback=end.tail,
            log=str(self._run_dir.log_of(host, "agent")),
            time=end.time,
        )

    def _victims_of(self, failure: Failure) -> list[RankExited]:
        others = (end for rank, end in sorted(self._survey.ended.items()) if rank != failure.rank)
        return [end for end in others if end.code != 0]

    def _victim(self, end: RankExited) -> Victim:
        return Victim(rank=end.rank, host=self._host_of[end.rank], exit_code=end.code, signal=end.signal)


@dataclass(frozen=True, kw_only=True)
class FailureCandidate:
    """A failure that may be the cause."""

    failure: Failure
    is_consequence: bool


def looks_like_consequence(failure: Failure) -> bool:
    """Return whether a failed rank may only have noticed that another one was gone."""
    if is_port_taken(failure):
        return False
    said = failure.error or (failure.traceback if failure.signal == signal.SIGABRT else "")
    return _CONSEQUENCE.search(said) is not None


def is_port_taken(failure: Failure) -> bool:
    """Return whether it failed because its port belonged to somebody else."""
    return _PORT_TAKEN.search(f"{failure.error}\n{failure.traceback}") is not None


def signal_in_output(output: str) -> int | None:
    """Return the signal that torchrun says it got from outside."""
    found = _WAS_SIGNALLED.search(output)
    return int(found[1]) if found else None


def root_cause(suspects: Sequence[FailureCandidate]) -> Failure:
    """Return the earliest failure that is no consequence, else the earliest."""
    return min(suspects, key=lambda suspect: (suspect.is_consequence, suspect.failure.time)).failure


def cause_timeout_s(heartbeat_timeout_s: float) -> float:
    """Return ``PATIENCE_S``, or what it takes to notice that a host has fallen silent, which tells no rank why."""
    return max(WAIT_FOR_CAUSE_S, heartbeat_timeout_s + COLLECT_FAILURES_S)


def is_decided(suspects: Sequence[FailureCandidate], *, waited_s: float, patience_s: float = WAIT_FOR_CAUSE_S) -> bool:
    """Return whether it is time to decide, ``waited_s`` after the first failure was heard of.

    Ranks that leave after saving do so together, and each may take a while to let go of what it holds.
    """
    is_clear = any(not suspect.is_consequence and not suspect.failure.is_preemption for suspect in suspects)
    return waited_s >= (COLLECT_FAILURES_S if is_clear else patience_s)
