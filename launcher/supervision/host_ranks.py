"""The ranks of one host, as its agent sees them: rank monitors, logs, heartbeats."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_PREEMPTED
from launcher.protocol.heartbeat import (
    create_heartbeat_file,
    heartbeat_file,
    map_heartbeat_file,
    read_exception_record,
    read_heartbeat,
)
from launcher.protocol.messages import (
    AgentMessage,
    OutputLine,
    RankExited,
    RankHeartbeat,
    RankRaised,
    RankStack,
    UserNote,
)
from launcher.protocol.plan import HostPlan
from launcher.protocol.rank_env import EXCEPTION_RECORD_FIELDS, exception_record_file, exception_text_file
from launcher.protocol.rundir import RunDir
from launcher.protocol.wire import MalformedMessage, require_fields
from launcher.supervision.socket_channel import receive_from_monitor
from launcher.supervision.stack_dump import StackDump
from launcher.utils.files import read_json
from launcher.utils.logs import LogTail
from launcher.utils.processes import Process, identify

_TAIL_LINES = 60


_HEARTBEAT_EVERY_S = 0.2


_DUMP_S = 0.5
"""Time the others get to show their stacks when a rank has died: torchrun is about to end them."""


Emit = Callable[[AgentMessage], None]


@dataclass(frozen=True)
class LauncherSignal:
    """A signal that torchrun, or whatever started the ranks, has sent to one of them."""

    signal: int
    time: float


@dataclass
class _Rank:
    """What is known of one rank."""

    number: int
    log: LogTail
    beats: mmap
    record: Path
    last_words: ExceptionTextFilter
    guard: Process | None = None
    process: Process | None = None
    has_ended: bool = False
    raised: bool = False
    beat_at: float = 0.0
    dump: StackDump | None = None
    has_shown: bool = False
    """Its stack has been passed on."""

    @property
    def is_alive(self) -> bool:
        return self.guard is not None and not self.has_ended


class ExceptionTextFilter:
    """What a rank prints when it fails, which the end of the run shows: left out of what is shown as it comes.

    Args:
        path: the file into which the rank writes it before it prints it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._expected = path, deque[str]()
        self._read_at = self._written_at()  # of an earlier attempt in this run directory

    def left_out(self, lines: list[str]) -> list[str]:
        """Return new lines of the log without those that the rank wrote into the file."""
        written_at = self._written_at()
        if written_at != self._read_at:
            self._read_at = written_at
            with contextlib.suppress(OSError):
                text = self._path.read_text(encoding="utf-8", errors="replace")
                self._expected = deque(line.rpartition("\r")[2] for line in text.split("\n"))
        return [line for line in lines if not self._is_expected(line)]

    def _is_expected(self, line: str) -> bool:
        if not self._expected or line != self._expected[0]:
            return False
        self._expected.popleft()
        return True

    def _written_at(self) -> int:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0


class HostRanks:
    """All ranks of a host."""

    def __init__(self, plan: HostPlan, *, run_dir: RunDir, scratch: Path, emit: Emit) -> None:
        self._emit = emit
        self._ranks: dict[int, _Rank] = {}
        self._peers: dict[socket.socket, int] = {}
        self._next_beats = 0.0
        self._told: LauncherSignal | None = None
        for number in range(plan.first_rank, plan.first_rank + plan.host.slots):
            beats = heartbeat_file(scratch, number)
            create_heartbeat_file(beats)
            log = LogTail(run_dir.log_of(plan.host.name, number))
            last_words = ExceptionTextFilter(exception_text_file(run_dir, number))
            self._ranks[number] = _Rank(
                number, log, map_heartbeat_file(beats), exception_record_file(run_dir, number), last_words
            )

    def any_alive(self) -> bool:
        """Return whether a rank has begun and not ended."""
        return any(rank.is_alive for rank in self._ranks.values())

    def take_told(self) -> LauncherSignal | None:
        """Return the first signal from what started the ranks since the last call, if there was one."""
        told, self._told = self._told, None
        return told

    def send(self, number: int) -> int:
        """Send a signal to every living rank, by way of its guard; return to how many."""
        guards = [rank.guard for rank in self._ranks.values() if rank.is_alive and rank.guard]
        return sum(guard.send(number) for guard in guards)

    def dump(self, *, within_s: float) -> None:
        """Have every living rank write its Python stacks to its log; ``poll`` sends each of them on, once."""
        for rank in self._ranks.values():
            if rank.is_alive and rank.process and rank.dump is None:
                rank.dump = StackDump(rank.process, rank.log.path, within_s=within_s)

    def hear(self, peer: socket.socket) -> bool:
        """Take all that one guard said; return False once it is gone, which without a word means it was killed."""
        try:
            while message := receive_from_monitor(peer):
                self._take(peer, message)
        except BlockingIOError:
            return True
        except MalformedMessage as problem:
            whose = f" of rank {self._peers[peer]}" if peer in self._peers else ""
            self._emit(UserNote(text=f"the connection to the guard{whose} was closed: it sent {problem}"))
        number = self._peers.pop(peer, None)
        if number is not None and not self._ranks[number].has_ended:
            self._end(self._ranks[number], time=time.time(), code=-signal.SIGKILL)
        return False

    def poll(self, *, logs: bool) -> bool:
        """Pass on new beats and exceptions, and new lines where ``logs``; return whether there may be more lines."""
        now = time.monotonic()
        for rank in self._ranks.values():
            if rank.dump is not None and not rank.has_shown and rank.dump.is_complete():
                self._pass_on_stack(rank, rank.dump)
        if now >= self._next_beats:
            self._next_beats = now + _HEARTBEAT_EVERY_S
            for rank in self._ranks.values():
                self._pass_on_beat(rank)
                self._pass_on_exception(rank)
        return logs and sum(self._pass_on_lines(rank, rank.log.read()) for rank in self._ranks.values()) > 0

    def drain(self) -> None:
        """Pass on all that is left in the logs."""
        for rank in self._ranks.values():
            self._pass_on_exception(rank)
            self._pass_on_lines(rank, rank.log.drain())
            rank.log.close()

    def _take(self, peer: socket.socket, message: dict[str, Any]) -> None:
        if message["kind"] == "hello":
            if message["rank"] not in self._ranks:
                raise MalformedMessage(f"the number of a rank that is not on this host, {message['rank']}")
            rank = self._ranks[message["rank"]]
            self._peers[peer] = rank.number
            rank.guard, rank.process = identify(message["guard"]), identify(message["pid"])
            return
        if message["kind"] == "told":
            self._told = self._told or LauncherSignal(message["signal"], message["told_at"])
            return
        if peer not in self._peers:
            raise MalformedMessage("an end before it said whose guard it is")
        rank, code = self._ranks[self._peers[peer]], exit_code_of_status(message["status"])
        self._end(rank, time=message["time"], code=code, by_launcher=message["by_launcher"])

    def _end(self, rank: _Rank, *, time: float, code: int, by_launcher: bool = False) -> None:
        """Report a rank's end; ``code`` is negative for a signal. Where it died without a word, look at the others."""
        self._pass_on_beat(rank)
        self._pass_on_exception(rank)
        if rank.dump is not None and not rank.has_shown:
            self._pass_on_stack(rank, rank.dump)
        rank.has_ended = True
        end = {"code": code, "signal": None} if code >= 0 else {"code": None, "signal": -code}
        tail = rank.log.last(_TAIL_LINES) if code else ""
        self._emit(RankExited(rank=rank.number, time=time, tail=tail, by_launcher=by_launcher, **end))
        if code not in (0, EXIT_PREEMPTED) and not rank.raised:
            self.dump(within_s=_DUMP_S)

    def _pass_on_lines(self, rank: _Rank, lines: list[str]) -> int:
        for line in rank.last_words.left_out(lines) if lines else ():
            self._emit(OutputLine(who=rank.number, text=line))
        return len(lines)

    def _pass_on_beat(self, rank: _Rank) -> None:
        heartbeat = read_heartbeat(rank.beats)
        if heartbeat is not None and heartbeat.at != rank.beat_at:
            rank.beat_at = heartbeat.at
            age = max(0.0, time.monotonic() - heartbeat.at)
            numbers = heartbeat.numbers
            self._emit(
                RankHeartbeat(rank=rank.number, phase=heartbeat.phase, step=heartbeat.step, age_s=age, numbers=numbers)
            )

    def _pass_on_stack(self, rank: _Rank, dump: StackDump) -> None:
        rank.has_shown = True
        self._emit(RankStack(rank=rank.number, text=dump.take(), is_stopped=dump.is_stopped))

    def _pass_on_exception(self, rank: _Rank) -> None:
        if rank.raised or rank.process is None:
            return
        left = read_exception_record(rank.beats)
        if left is None and not rank.record.exists():
            return
        try:
            record = read_json(rank.record) if left is None else json.loads(left)
            if not isinstance(record, dict):
                raise MalformedMessage("a record that is not an object")
            require_fields(record, EXCEPTION_RECORD_FIELDS)
        except (OSError, ValueError, RecursionError) as problem:
            rank.raised = True  # it will not get better
            self._emit(UserNote(text=f"the record of rank {rank.number}'s exception cannot be read: {problem}"))
            return
        if record["pid"] != rank.process.pid:  # left by an earlier attempt in this run directory
            return
        rank.raised = True
        said = {name: record[name] for name in EXCEPTION_RECORD_FIELDS if name != "pid"}
        self._emit(RankRaised(rank=rank.number, **said))


def exit_code_of_status(status: int) -> int:
    """Return the exit code that a wait status holds, negative for a signal.

    Raises:
        MalformedMessage: it is no status of a process that has ended.
    """
    if not 0 <= status < 1 << 16 or not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
        raise MalformedMessage(f"the wait status {status}, which no ended process has")
    return os.waitstatus_to_exitcode(status)
