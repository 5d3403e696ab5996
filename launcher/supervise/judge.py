"""Turns what the agents tell into a judgement: has the run failed, and who is the cause?"""

from __future__ import annotations

import time
from dataclasses import replace

from launcher.errors import EXIT_STALLED
from launcher.plan import Plan
from launcher.rundir import RunDir
from launcher.supervise import stall
from launcher.supervise.failure import Failure, Victim, ended_how, exit_code_of
from launcher.supervise.messages import CommandEnded, Message, RankBeat, RankEnded, RankRaised, Started
from launcher.supervise.stall import Position
from launcher.supervise.verdict import Suspect, first_cause, is_settled, looks_like_consequence, signal_told_of


class Judge:
    """Hears the events of every host."""

    def __init__(self, plan: Plan, run_dir: RunDir) -> None:
        self._plan, self._run_dir = plan, run_dir
        self._host_of = {place.rank: place.host for place in plan.ranks}
        self._suspects: dict[int | str, Suspect] = {}
        self._first_heard: float | None = None
        self._ended: dict[int, RankEnded] = {}
        self._positions: dict[int, Position] = {}
        self.has_begun = False
        """Whether a rank has reached its first step."""

    def hear(self, host: str, message: Message, *, now: float) -> None:
        """Take one event; ``now`` is ``time.monotonic()``."""
        match message:
            case Started():
                for rank in (rank for rank, at in self._host_of.items() if at == host):
                    self._positions[rank] = Position(host=host, phase="not started", step=None, at=now)
            case RankBeat() if message.rank not in self._ended:
                at = now - message.age_s
                self.has_begun = self.has_begun or (message.step or 0) > 0
                self._positions[message.rank] = Position(host=host, phase=message.phase, step=message.step, at=at)
            case RankRaised():
                self._suspect(message.rank, self._of_exception(host, message), now)
            case RankEnded():
                self._ended[message.rank] = message
                self._positions.pop(message.rank, None)
                if message.code != 0:
                    self._suspect(message.rank, self._of_rank(host, message), now)
            case CommandEnded() if message.code != 0:
                failure = self._of_command(host, message)
                self._suspect(host + message.role, failure, now, of_launcher=message.role == "launcher")
            case _:
                pass

    def lost_agent(self, host: str, *, code: int, tail: str, now: float) -> None:
        """Take that the agent of ``host`` is gone though nobody told it to go; ``code`` is negative for a signal."""
        number = -code if code < 0 else None
        failure = Failure(
            host=host,
            rank=None,
            exit_code=exit_code_of(code, number) or 1,
            signal=number,
            reason=f"the host agent on {host} {ended_how(code, number)}",
            traceback=tail,
            log=str(self._run_dir.log_of(host, "agent")),
            time=time.time(),
        )
        self._suspect(host, failure, now)

    def cause(self, *, now: float, all_over: bool) -> Failure | None:
        """Return why the run has failed; ``None`` when it has not, or when it is too early to say."""
        suspects = list(self._suspects.values())
        if self._first_heard is None:
            return None
        settled = all_over or is_settled(suspects, waited_s=now - self._first_heard)
        return first_cause(suspects) if settled else None

    def stalled(self, *, now: float) -> Failure | None:
        """Return a failure that names the rank which holds up the others, once one has been silent too long."""
        if not stall.silent(self._positions, now=now, timeout_s=self._plan.stall_timeout_s):
            return None
        rank = stall.furthest_behind(self._positions)
        place = self._positions[rank]
        where = place.phase if place.step is None else f"{place.phase} of step {place.step}"
        return Failure(
            host=place.host,
            rank=rank,
            time=time.time(),
            exit_code=EXIT_STALLED,
            signal=None,
            reason=f"rank {rank} on {place.host} has not moved for {now - place.at:.0f} s (last seen in {where})",
            log=str(self._run_dir.log_of(place.host, rank)),
            ranks=stall.progress(self._positions, now=now),
        )

    def missing(self) -> Failure | None:
        """Return a failure when everything ended well except that some rank never said so."""
        absent = sorted(self._host_of.keys() - self._ended.keys())
        if not absent:
            return None
        host = self._host_of[absent[0]]
        reason = f"rank {absent[0]} on {host} never reported its end, though what started it ended without an error"
        log = str(self._run_dir.log_of(host, absent[0]))
        return Failure(host=host, rank=absent[0], exit_code=1, signal=None, reason=reason, log=log, time=time.time())

    def complete(self, failure: Failure) -> Failure:
        """Return ``failure`` with what became known after it was found: its own end and the victims."""
        known = self._suspects.get(failure.rank) if failure.rank is not None else None
        if failure.exit_code == EXIT_STALLED and known:  # its stacks were dumped after it was named
            failure = replace(failure, traceback=known.failure.traceback)
        elif known:
            failure = known.failure
        return replace(failure, victims=tuple(self._victim(end) for end in self._victims_of(failure)))

    def preempted(self) -> bool:
        """Return whether a rank ended in the way that means: resume me."""
        return any(suspect.failure.is_preemption for suspect in self._suspects.values())

    def _suspect(self, key: int | str, failure: Failure, now: float, *, of_launcher: bool = False) -> None:
        earlier = self._suspects.get(key)
        if earlier is not None and earlier.failure.error:  # it raised before it ended: that is the reason
            code = failure.exit_code if failure.signal is None else earlier.failure.exit_code
            failure = replace(earlier.failure, exit_code=code)
        # torchrun and deepspeed end in error because a rank did, unless a signal ended them
        is_consequence = failure.signal is None if of_launcher else looks_like_consequence(failure)
        self._suspects[key] = Suspect(failure=failure, is_consequence=is_consequence)
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

    def _of_command(self, host: str, end: CommandEnded) -> Failure:
        number = end.signal or signal_told_of(end.tail)
        return Failure(
            host=host,
            rank=None,
            exit_code=exit_code_of(end.code, number),
            signal=number,
            reason=f"{end.name} on {host} {ended_how(end.code, number)}",
            traceback=end.tail,
            log=str(self._run_dir.log_of(host, "agent")),
            time=end.time,
        )

    def _victims_of(self, failure: Failure) -> list[RankEnded]:
        others = (end for rank, end in sorted(self._ended.items()) if rank != failure.rank)
        return [end for end in others if end.code != 0]

    def _victim(self, end: RankEnded) -> Victim:
        return Victim(rank=end.rank, host=self._host_of[end.rank], exit_code=end.code, signal=end.signal)
