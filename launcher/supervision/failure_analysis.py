"""Failure analysis: has the run failed, and which failure is the cause?

When one rank dies, the others lose their connections, or torchrun ends them, within milliseconds; some exit before the
first one does. So the failures of a short period are collected, and their errors tell cause and consequence apart.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.errors import EXIT_STALLED
from launcher.protocol.messages import CommandExited, RankExited, RankRaised
from launcher.protocol.outcome import Failure, Victim
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RunDir
from launcher.supervision import stall as stalls
from launcher.supervision.child_process import command_name
from launcher.supervision.rank_tracker import RankTracker
from launcher.supervision.stall import Stall
from launcher.utils.processes import describe_exit, shell_exit_code
from launcher.utils.text import cut_middle

COLLECT_FAILURES_S = 0.3
"""Time after the first failure in which others are collected."""
WAIT_FOR_CAUSE_S = 3.0
"""The same if a failure not yet seen may be the cause of all seen, or for a preemption."""

_CONSEQUENCE = re.compile(
    r"DistBackendError|DistNetworkError|DistStoreError|Watchdog caught collective operation timeout"
    r"|Connection (closed|reset|refused)|Broken pipe|Socket closed|closed by peer|Application timeout"
)

_MAX_REASON_CHARS = 4000
"""Most characters of an exception's message in a reason; its traceback is separate."""
_WAS_SIGNALLED = re.compile(r" got signal: (\d{1,2})\b")
"""Printed by torchrun after "SignalException" before it exits with 1 on a signal."""
_PORT_TAKEN = re.compile(r"EADDRINUSE|[Aa]ddress already in use")


class FailureAnalysis:
    """Collects the failures of a run and finds the cause; ``now`` is monotonic time.

    Args:
        plan: of the run.
        run_dir: of the run, for the paths of logs.
        tracker: knows the progress of all ranks.
    """

    def __init__(self, plan: Plan, run_dir: RunDir, tracker: RankTracker) -> None:
        self._plan, self._run_dir, self._tracker = plan, run_dir, tracker
        self._host_of = {place.rank: place.host for place in plan.ranks}
        self._candidates: dict[int | str, FailureCandidate] = {}
        self._first_failure_at: float | None = None
        self._killed_by_launcher: set[Failure] = set()
        """Failures of ranks that their own launcher signalled."""

    def rank_raised(self, host: str, message: RankRaised, *, now: float) -> None:
        """Add the exception of a rank."""
        self._add_candidate(message.rank, self._exception_failure(host, message), now)

    def rank_exited(self, host: str, message: RankExited, *, now: float) -> None:
        """Add the exit of a rank, if it failed."""
        if message.code != 0:
            failure = self._rank_failure(host, message)
            self._add_candidate(message.rank, failure, now, by_launcher=message.by_launcher)

    def command_exited(self, host: str, message: CommandExited, *, now: float) -> None:
        """Add the exit of a preparing command or of the launcher, if it failed."""
        if message.code != 0:
            failure, is_launcher = self._command_failure(host, message), message.role == "launcher"
            self._add_candidate(host + message.role, failure, now, is_launcher=is_launcher)

    def agent_lost(self, host: str, failure: Failure, *, now: float) -> None:
        """Add the failure of an agent that exited unexpectedly."""
        self._add_candidate(host, failure, now)

    def ranks_missing(self, ranks: Sequence[int], *, now: float) -> None:
        """Add the failure of ranks whose launcher and agent ended without reporting their exit."""
        failure = self._missing_failure(min(ranks))
        self._add_candidate(min(ranks), failure, now)

    @property
    def has_failures(self) -> bool:
        """Whether a failure was added."""
        return self._first_failure_at is not None

    def cause(self, *, now: float, all_over: bool) -> Failure | None:
        """Return why the run has failed; ``None`` when it has not, or while failures are collected."""
        candidates = list(self._candidates.values())
        if self._first_failure_at is None:
            return None
        patience_s = cause_timeout_s(self._plan.heartbeat_timeout_s)
        if not all_over and not is_decided(candidates, waited_s=now - self._first_failure_at, patience_s=patience_s):
            return None
        early = self._tracker.first_early_exit()
        if early is not None and all(candidate.is_consequence for candidate in candidates):
            return self._early_exit_failure(early, consequence=root_cause(candidates))
        cause = self._first_killed_by_launcher() or root_cause(candidates)
        return self._signalled_launcher_failure(cause) if self._is_launcher_unreported(cause) else cause

    def is_unexplained(self, failure: Failure) -> bool:
        """Return whether a rank died without an exception; stacks of the others may explain it."""
        is_explained = failure.error or failure.is_preemption or failure.exit_code == EXIT_STALLED
        return failure.rank is not None and not is_explained

    def stall_failure(self, stall: Stall) -> Failure:
        """Return the failure of a stalled run: it names the rank that the others wait for."""
        stacks, early = self._tracker.stacks, self._tracker.first_early_exit()
        ranks = self._tracker.progress(stall)
        if early is not None and stalls.ranks_in_collectives(stall.positions, stacks) == stall.positions.keys():
            return replace(self._early_exit_failure(early), exit_code=EXIT_STALLED, ranks=ranks)
        rank = stalls.find_straggler(stall.positions, stacks)
        host = stall.positions[rank].host
        return Failure(
            host=host,
            rank=rank,
            time=time.time(),
            exit_code=EXIT_STALLED,
            signal=None,
            reason=stalls.describe_straggler(rank, stall, stacks),
            traceback=stacks[rank].python if rank in stacks else "",
            log=str(self._run_dir.log_of(host, rank)),
            ranks=ranks,
        )

    def missing_rank_failure(self) -> Failure | None:
        """Return a failure when no process failed but some rank never reported its exit."""
        missing = sorted(self._host_of.keys() - self._tracker.exited.keys())
        if not missing:
            return None
        return self._missing_failure(missing[0])

    def complete(self, failure: Failure) -> Failure:
        """Return ``failure`` with what arrived after it was found: the rank's exit and the victims."""
        candidate = self._candidates.get(failure.rank) if failure.rank is not None else None
        if candidate and failure.exit_code != EXIT_STALLED:
            failure = candidate.failure
        if self.is_unexplained(failure) and not failure.ranks:
            failure = replace(failure, ranks=self._tracker.progress())
        return replace(failure, victims=tuple(self._victim(exit) for exit in self._victims_of(failure)))

    @property
    def is_preempted(self) -> bool:
        """Whether a rank exited with the code that asks for a resume."""
        return any(candidate.failure.is_preemption for candidate in self._candidates.values())

    def _add_candidate(
        self,
        key: int | str,
        failure: Failure,
        now: float,
        *,
        is_launcher: bool = False,
        by_launcher: bool = False,
    ) -> None:
        earlier = self._candidates.get(key)
        if earlier is not None and earlier.failure.error:  # it raised before it exited: that is the reason
            code = failure.exit_code if failure.signal is None else earlier.failure.exit_code
            failure, by_launcher = replace(earlier.failure, exit_code=code), False
        # torchrun and deepspeed fail because a rank did, unless a signal ended them
        is_consequence = failure.signal is None if is_launcher else by_launcher or looks_like_consequence(failure)
        self._candidates[key] = FailureCandidate(failure=failure, is_consequence=is_consequence)
        if by_launcher:
            self._killed_by_launcher.add(failure)
        if self._first_failure_at is None:
            self._first_failure_at = now

    def _missing_failure(self, rank: int) -> Failure:
        host = self._host_of[rank]
        reason = f"rank {rank} on {host} never reported its exit, though its launcher exited without an error"
        log = str(self._run_dir.log_of(host, rank))
        return Failure(host=host, rank=rank, exit_code=1, signal=None, reason=reason, log=log, time=time.time())

    def _exception_failure(self, host: str, message: RankRaised) -> Failure:
        return Failure(
            host=host,
            rank=message.rank,
            exit_code=message.code,
            signal=None,
            reason=f"rank {message.rank} on {host} failed: {cut_middle(message.error, limit=_MAX_REASON_CHARS)}",
            error=message.error,
            traceback=message.traceback,
            log=str(self._run_dir.log_of(host, message.rank)),
            time=message.time,
        )

    def _rank_failure(self, host: str, exit: RankExited) -> Failure:
        return Failure(
            host=host,
            rank=exit.rank,
            exit_code=shell_exit_code(exit.code, exit.signal),
            signal=exit.signal,
            reason=f"rank {exit.rank} on {host} {describe_exit(exit.code, exit.signal)}",
            traceback=exit.tail,
            log=str(self._run_dir.log_of(host, exit.rank)),
            time=exit.time,
        )

    def _first_killed_by_launcher(self) -> Failure | None:
        """Return the first rank killed by its own launcher, on a host without any other failure.

        Lost connections that ranks of other hosts report are its consequence, even if they were reported earlier.
        ``None`` where a failure that is no consequence is known.
        """
        failures = [candidate.failure for candidate in self._candidates.values()]
        other_hosts = {failure.host for failure in failures if failure not in self._killed_by_launcher}
        alone = [failure for failure in self._killed_by_launcher if failure.host not in other_hosts]
        if not alone or not all(candidate.is_consequence for candidate in self._candidates.values()):
            return None
        return min(alone, key=lambda failure: failure.time)

    def _is_launcher_unreported(self, cause: Failure) -> bool:
        """Return whether the launcher that killed a rank has not reported its own exit yet."""
        return cause in self._killed_by_launcher and f"{cause.host}launcher" not in self._candidates

    def _signalled_launcher_failure(self, rank_failure: Failure) -> Failure:
        """Return the failure of a signalled launcher, inferred from the signal it sent to a rank."""
        host = rank_failure.host
        plans = self._plan.hosts
        start = next((plan.agent_command for plan in plans if plan.host.name == host), plans[0].agent_command)
        return replace(
            rank_failure,
            rank=None,
            reason=f"{command_name(start)} on {host} {describe_exit(None, rank_failure.signal)}",
            traceback="",
            log=str(self._run_dir.log_of(host, "agent")),
        )

    def _early_exit_failure(self, exit: RankExited, *, consequence: Failure | None = None) -> Failure:
        """Return the failure of a rank that exited with code 0 while the others still needed it."""
        host = self._host_of[exit.rank]
        reason = self._tracker.describe_early_exit(exit)
        if consequence is not None:
            reason += f"; then {consequence.reason}"
        elif waits := stalls.describe_wait(self._tracker.living, self._tracker.stacks):
            reason += f"; {waits}"
        return Failure(
            host=host,
            rank=exit.rank,
            exit_code=consequence.exit_code if consequence else 1,
            signal=None,
            reason=reason,
            traceback=consequence.traceback if consequence else "",
            log=str(self._run_dir.log_of(host, exit.rank)),
            time=exit.time,
        )

    def _command_failure(self, host: str, exit: CommandExited) -> Failure:
        number = exit.signal or signal_in_output(exit.tail)
        return Failure(
            host=host,
            rank=None,
            exit_code=shell_exit_code(exit.code, number),
            signal=number,
            reason=exit.reason or f"{exit.name} on {host} {describe_exit(exit.code, number)}",
            traceback=exit.tail,
            log=str(self._run_dir.log_of(host, "agent")),
            time=exit.time,
        )

    def _victims_of(self, failure: Failure) -> list[RankExited]:
        others = (exit for rank, exit in sorted(self._tracker.exited.items()) if rank != failure.rank)
        return [exit for exit in others if exit.code != 0]

    def _victim(self, exit: RankExited) -> Victim:
        return Victim(rank=exit.rank, host=self._host_of[exit.rank], exit_code=exit.code, signal=exit.signal)


@dataclass(frozen=True, kw_only=True)
class FailureCandidate:
    """A failure that may be the cause."""

    failure: Failure
    is_consequence: bool


def looks_like_consequence(failure: Failure) -> bool:
    """Return whether a rank may have failed only because another one was gone."""
    if is_port_taken(failure):
        return False
    text = failure.error or (failure.traceback if failure.signal == signal.SIGABRT else "")
    return _CONSEQUENCE.search(text) is not None


def is_port_taken(failure: Failure) -> bool:
    """Return whether it failed because its port was already in use."""
    return _PORT_TAKEN.search(f"{failure.error}\n{failure.traceback}") is not None


def signal_in_output(output: str) -> int | None:
    """Return the signal that torchrun reports to have received."""
    for line in output.splitlines():
        found = _WAS_SIGNALLED.search(line.partition("SignalException")[2])
        if found and 0 < int(found[1]) < signal.NSIG:
            return int(found[1])
    return None


def root_cause(candidates: Sequence[FailureCandidate]) -> Failure:
    """Return the earliest failure that is no consequence, else the earliest."""
    return min(candidates, key=lambda candidate: (candidate.is_consequence, candidate.failure.time)).failure


def cause_timeout_s(heartbeat_timeout_s: float) -> float:
    """Return how long to wait for the cause: at least until a silent host would be detected."""
    return max(WAIT_FOR_CAUSE_S, heartbeat_timeout_s + COLLECT_FAILURES_S)


def is_decided(
    candidates: Sequence[FailureCandidate], *, waited_s: float, patience_s: float = WAIT_FOR_CAUSE_S
) -> bool:
    """Return whether to stop collecting, ``waited_s`` after the first failure.

    Ranks that save and exit together may each take a while to release their resources.
    """
    is_clear = any(not candidate.is_consequence and not candidate.failure.is_preemption for candidate in candidates)
    return waited_s >= (COLLECT_FAILURES_S if is_clear else patience_s)
