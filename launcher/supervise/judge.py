"""Turns what the agents tell into a judgement: has the run failed, and who is the cause?"""

from __future__ import annotations

import time
from dataclasses import replace

from launcher.errors import EXIT_STALLED
from launcher.plan import Plan
from launcher.rundir import RunDir
from launcher.supervise import stall
from launcher.supervise.child import name_of
from launcher.supervise.failure import Failure, Victim, ended_how, exit_code_of
from launcher.supervise.messages import CommandEnded, Message, RankEnded, RankRaised
from launcher.supervise.stall import Standstill
from launcher.supervise.survey import Survey
from launcher.supervise.verdict import (
    Suspect,
    first_cause,
    is_settled,
    looks_like_consequence,
    patience_for,
    signal_told_of,
)


class Judge:
    """Hears the events of every host."""

    def __init__(self, plan: Plan, run_dir: RunDir) -> None:
        self._plan, self._run_dir = plan, run_dir
        self._host_of = {place.rank: place.host for place in plan.ranks}
        self._suspects: dict[int | str, Suspect] = {}
        self._first_heard: float | None = None
        self._passed_on: set[Failure] = set()
        """Ends of ranks by a signal that came from what had started them."""
        self._survey = Survey(self._host_of, steps=plan.work.steps)

    def hear(self, host: str, message: Message, *, now: float) -> None:
        """Take one event; ``now`` is ``time.monotonic()``."""
        self._survey.hear(host, message, now=now)
        match message:
            case RankRaised():
                self._suspect(message.rank, self._of_exception(host, message), now)
            case RankEnded() if message.code != 0:
                failure = self._of_rank(host, message)
                self._suspect(message.rank, failure, now, is_passed_on=message.by_launcher)
            case CommandEnded() if message.code != 0:
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
        patience_s = patience_for(self._plan.heartbeat_timeout_s)
        if not all_over and not is_settled(suspects, waited_s=now - self._first_heard, patience_s=patience_s):
            return None
        left = self._survey.left_early()
        if left is not None and all(suspect.is_consequence for suspect in suspects):
            return self._of_leaver(left, noticed=first_cause(suspects))
        cause = self._first_passed_on_alone() or first_cause(suspects)
        return self._of_signalled_launcher(cause) if self._was_only_passed_on(cause) else cause

    def is_unexplained(self, failure: Failure) -> bool:
        """Return whether a rank died without a word: then only the others can tell what was going on."""
        told_otherwise = failure.error or failure.is_preemption or failure.exit_code == EXIT_STALLED
        return failure.rank is not None and not told_otherwise

    def standstill(self, *, now: float) -> Standstill | None:
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

    def blame(self, standstill: Standstill) -> Failure:
        """Return a failure that names the rank which holds up the others; better once the stacks are known."""
        stacks, left = self._survey.stacks, self._survey.left_early()
        ranks = self._survey.progress(standstill)
        if left is not None and stall.all_waiting(standstill.positions, stacks) == standstill.positions.keys():
            return replace(self._of_leaver(left), exit_code=EXIT_STALLED, ranks=ranks)
        rank = stall.odd_one_out(standstill.positions, stacks)
        host = standstill.positions[rank].host
        return Failure(
            host=host,
            rank=rank,
            time=time.time(),
            exit_code=EXIT_STALLED,
            signal=None,
            reason=stall.holds_up(rank, standstill, stacks),
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
        self._suspects[key] = Suspect(failure=failure, is_consequence=is_consequence)
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

    def _of_rank(self, host: str, end: RankEnded) -> Failure:
        return Failure(
            host=host,
            rank=end.rank,
            exit_code=exit_code_of(end.code, end.signal),
            signal=end.signal,
            reason=f"rank {end.rank} on {host} {ended_how(end.code, end.signal)}",
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
        start = next((plan.start for plan in plans if plan.host.name == host), plans[0].start)
        return replace(
            passed_on,
            rank=None,
            reason=f"{name_of(start)} on {host} {ended_how(None, passed_on.signal)}",
            traceback="",
            log=str(self._run_dir.log_of(host, "agent")),
        )

    def _of_leaver(self, end: RankEnded, *, noticed: Failure | None = None) -> Failure:
        """Return the failure of a rank that ended well while the others still needed it."""
        host = self._host_of[end.rank]
        reason = self._survey.how_left(end)
        if noticed is not None:
            reason += f"; then {noticed.reason}"
        elif waits := stall.wait_of(self._survey.living, self._survey.stacks):
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

    def _of_command(self, host: str, end: CommandEnded) -> Failure:
        number = end.signal or signal_told_of(end.tail)
        return Failure(
            host=host,
            rank=None,
            exit_code=exit_code_of(end.code, number),
            signal=number,
            reason=end.why or f"{end.name} on {host} {ended_how(end.code, number)}",
            traceback=end.tail,
            log=str(self._run_dir.log_of(host, "agent")),
            time=end.time,
        )

    def _victims_of(self, failure: Failure) -> list[RankEnded]:
        others = (end for rank, end in sorted(self._survey.ended.items()) if rank != failure.rank)
        return [end for end in others if end.code != 0]

    def _victim(self, end: RankEnded) -> Victim:
        return Victim(rank=end.rank, host=self._host_of[end.rank], exit_code=end.code, signal=end.signal)
