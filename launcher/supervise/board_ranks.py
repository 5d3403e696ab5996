"""The ranks of every host, as an agent sees them that has nothing but a folder in common with them."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.plan import HostPlan, Plan
from launcher.rundir import RunDir
from launcher.supervise.board import RANK_FIELDS, RENEW_S, Lease, agent_file, board_of, look, post, rank_file
from launcher.supervise.dumps import StackDump
from launcher.supervise.heartbeat import BEAT_FIELDS
from launcher.supervise.lines import Tail
from launcher.supervise.messages import CommandEnded, MalformedMessage, Note, RankBeat, require_fields
from launcher.supervise.processes import Process
from launcher.supervise.ranks import Emit, Ranks, exit_code_of_status

_LOOK_EVERY_S = 0.25


class BoardRanks(Ranks):
    """All ranks of a run.

    Args:
        mine: what the agent was assigned: it names every rank.
        plan: says on which host each of them is.
        run_dir: shared with the hosts.
        scratch: a folder of the agent's own.
        emit: takes what there is to tell.
        token: of this start.
    """

    def __init__(self, mine: HostPlan, *, plan: Plan, run_dir: RunDir, scratch: Path, emit: Emit, token: str) -> None:
        super().__init__(mine, run_dir=run_dir, scratch=scratch, emit=emit)
        self._board, self._token = board_of(run_dir), token
        self._host_of = {place.rank: place.host for place in plan.ranks}
        self._leases = {rank: Lease(plan.heartbeat_timeout_s) for rank in self._ranks}
        self._orphans: set[int] = set()
        self._unsound: set[int] = set()
        self._signals: list[int] = []
        self._turn = 0
        self._next_post = self._next_look = 0.0
        for rank in self._ranks.values():
            rank.log = Tail(run_dir.log_of(self._host_of[rank.number], rank.number))
        self._post()

    @property
    def living(self) -> list[str]:
        """The ranks that have begun and not ended, with their hosts."""
        return [f"{rank.number} on {self._host_of[rank.number]}" for rank in self._ranks.values() if rank.is_alive]

    def has_begun_on(self, host: str) -> bool:
        """Return whether a rank of ``host`` was heard of."""
        return any(self._host_of[rank.number] == host and rank.guard for rank in self._ranks.values())

    def send(self, number: int) -> int:
        """Have every guard send a signal to its rank; return how many ranks live."""
        self._signals.append(number)
        self._post()
        return sum(rank.is_alive for rank in self._ranks.values())

    def dump(self, *, within_s: float) -> None:
        """Have every rank write its Python stacks to its log; ``poll`` sends each of them on, once."""
        asked = [rank for rank in self._ranks.values() if rank.is_alive and rank.dump is None]
        for rank in asked:
            rank.dump = StackDump(None, rank.log.path, within_s=within_s)
        if asked:
            self.send(signal.SIGUSR2)
            self.send(signal.SIGCONT)  # one that a signal had stopped could not answer otherwise

    def poll(self, *, logs: bool) -> bool:
        """Renew our sign of life, and read what the guards have posted."""
        now = time.monotonic()
        if now >= self._next_post:
            self._post()
        if now >= self._next_look:
            self._next_look = now + _LOOK_EVERY_S
            for number in self._ranks:
                self._look_at(number)
            self._notice_silence()
        return super().poll(logs=logs)

    def close(self) -> None:
        """Say that the run is over, to ranks that were on their way too."""
        self._post(over=True)

    def _post(self, *, over: bool = False) -> None:
        self._turn += 1
        self._next_post = time.monotonic() + RENEW_S
        content = {"token": self._token, "turn": self._turn, "signals": self._signals, "over": over}
        with contextlib.suppress(OSError):  # a full or absent disk: the guards end their ranks when it lasts
            post(agent_file(self._board), content)

    def _look_at(self, number: int) -> None:
        rank, said = self._ranks[number], look(rank_file(self._board, number), RANK_FIELDS)
        if rank.has_ended or said is None or said["token"] != self._token or "guard" not in said:
            return
        try:
            _require_sound(said)
        except MalformedMessage as problem:  # its lease is not renewed: a guard that keeps on so counts as gone
            if number not in self._unsound:
                self._unsound.add(number)
                self._emit(Note(text=f"the guard of rank {number} posted {problem}"))
            return
        self._leases[number].renew(said["turn"])
        rank.guard, rank.process = Process(said["guard"], 0), Process(said["pid"], 0)  # known by their numbers there
        beat = said["beat"]
        if beat is not None and beat["at"] != rank.beat_at:
            rank.beat_at = beat.pop("at")
            self._emit(RankBeat(rank=number, age_s=said["age_s"], **beat))
        if "is_orphan" in said and number not in self._orphans:
            self._orphans.add(number)
            host = self._host_of[number]
            self._tell_of_host(host, f"what started the ranks on {host} was killed; they were ended, too")
        if "status" in said:
            self._end(
                rank, time=said["time"], code=exit_code_of_status(said["status"]), by_launcher=said["by_launcher"]
            )

    def _notice_silence(self) -> None:
        """Give up ranks whose guards have fallen silent: host by host, because that is what went."""
        silent: dict[str, list[int]] = defaultdict(list)
        for rank in self._ranks.values():
            if rank.is_alive and self._leases[rank.number].is_over:
                rank.has_ended = True
                silent[self._host_of[rank.number]].append(rank.number)
        for host, numbers in silent.items():
            for_s = self._leases[numbers[0]].silent_s
            why = (
                f"nothing was heard of {host} for {for_s:.0f} s: it is down, frozen, or cut off from the run directory"
            )
            self._tell_of_host(host, why, ago_s=for_s)

    def _tell_of_host(self, host: str, why: str, *, ago_s: float = 0.0) -> None:
        now, role = time.time() - ago_s, f"host {host}"
        self._emit(CommandEnded(name=host, role=role, time=now, code=1, signal=None, tail="", why=why))


def _require_sound(said: Mapping[str, Any]) -> None:
    """Raise ``MalformedMessage`` for a file that has the parts of a guard's file in another form."""
    require_fields(said, {"guard": int, "pid": int})
    if said["beat"] is not None:
        require_fields(said["beat"], BEAT_FIELDS)
        if said["beat"].keys() != BEAT_FIELDS.keys():
            raise MalformedMessage("a beat with other fields than a beat has")
    if "status" in said:
        require_fields(said, {"status": int, "time": float, "by_launcher": bool})
        exit_code_of_status(said["status"])
