"""The ranks of one host, as its agent sees them: rank monitors, logs, heartbeats."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from launcher.errors import EXIT_PREEMPTED
from launcher.protocol.heartbeat import (
    HeartbeatState,
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
from launcher.protocol.rank_env import ExceptionRecord, exception_record_file, exception_text_file
from launcher.protocol.rundir import RunDir
from launcher.protocol.wire import MalformedMessage, decode
from launcher.supervision.socket_channel import (
    MonitorExited,
    MonitorMessage,
    MonitorSignalled,
    MonitorStarted,
    receive_from_monitor,
)
from launcher.supervision.stack_dump import StackDump
from launcher.utils.logs import LogTail
from launcher.utils.processes import Process, identify

_TAIL_LINES = 60
_HEARTBEAT_EVERY_S = 0.2
_DUMP_S = 0.5
"""Seconds for the other ranks to dump their stacks when one died.
torchrun is about to end them."""
Emit = Callable[[AgentMessage], None]


@dataclass(frozen=True)
class LauncherSignal:
    """A signal that the launcher of the ranks (torchrun) sent to one of them."""

    signal: int
    time: float


@dataclass
class _Rank:
    """State of one rank."""

    number: int
    log: LogTail
    heartbeat: mmap
    record: Path
    filter: ExceptionTextFilter
    monitor: Process | None = None
    process: Process | None = None
    has_exited: bool = False
    has_raised: bool = False
    heartbeat_at: float = 0.0
    dump: StackDump | None = None
    is_stack_sent: bool = False

    @property
    def is_alive(self) -> bool:
        return self.monitor is not None and not self.has_exited


class ExceptionTextFilter:
    """Drops the exception text of a failing rank from its live output: the run ends with it.

    Args:
        path: file to which the rank writes the text before it prints it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._expected = path, deque[str]()
        self._read_at = self._written_at()  # the file of an earlier attempt in this run directory

    def filter(self, lines: list[str]) -> list[str]:
        """Return new lines of the log without those that are in the file."""
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
        self._next_heartbeats = 0.0
        self._are_ending = False
        """Whether the ranks were sent a signal, so that their exits need no explanation."""
        self._launcher_signal: LauncherSignal | None = None
        for number in range(plan.first_rank, plan.first_rank + plan.host.slots):
            slot = heartbeat_file(scratch, number)
            create_heartbeat_file(slot)
            self._ranks[number] = _Rank(
                number=number,
                log=LogTail(run_dir.log_of(plan.host.name, number)),
                heartbeat=map_heartbeat_file(slot),
                record=exception_record_file(run_dir, number),
                filter=ExceptionTextFilter(exception_text_file(run_dir, number)),
            )

    def any_alive(self) -> bool:
        """Return whether a rank has started and not exited."""
        return any(rank.is_alive for rank in self._ranks.values())

    def pop_launcher_signal(self) -> LauncherSignal | None:
        """Return the first signal that the launcher has sent to a rank since the last call, if any."""
        found, self._launcher_signal = self._launcher_signal, None
        return found

    def send(self, number: int) -> int:
        """Send a signal to every living rank, through its monitor; return the number of ranks."""
        self._are_ending = True
        monitors = [rank.monitor for rank in self._ranks.values() if rank.is_alive and rank.monitor]
        return sum(monitor.send(number) for monitor in monitors)

    def dump(self, *, within_s: float) -> None:
        """Have every living rank write its stacks to its log; ``poll`` sends each of them once."""
        for rank in self._ranks.values():
            if rank.is_alive and rank.process and rank.dump is None:
                rank.dump = StackDump(rank.process, rank.log.path, within_s=within_s)

    def receive(self, peer: socket.socket) -> bool:
        """Handle the messages of one rank monitor; return False once it is gone."""
        try:
            while message := receive_from_monitor(peer):
                self._handle(peer, message)
        except BlockingIOError:
            return True
        except MalformedMessage as problem:
            whose = f" of rank {self._peers[peer]}" if peer in self._peers else ""
            self._emit(UserNote(text=f"the connection to the rank monitor{whose} was closed: it sent {problem}"))
        number = self._peers.pop(peer, None)
        if number is not None and not self._ranks[number].has_exited:
            self._report_exit(self._ranks[number], time=time.time(), code=-signal.SIGKILL)
        return False

    def poll(self, *, logs: bool) -> bool:
        """Send new heartbeats and exceptions, and lines if ``logs``; return whether more may follow."""
        now = time.monotonic()
        for rank in self._ranks.values():
            if rank.dump is not None and not rank.is_stack_sent and rank.dump.is_complete():
                self._send_stack(rank, rank.dump)
        if now >= self._next_heartbeats:
            self._next_heartbeats = now + _HEARTBEAT_EVERY_S
            for rank in self._ranks.values():
                self._read_heartbeat(rank)
                self._send_exception(rank)
        return logs and sum(self._send_lines(rank, rank.log.read()) for rank in self._ranks.values()) > 0

    def drain(self) -> None:
        """Send the rest of all logs."""
        for rank in self._ranks.values():
            self._send_exception(rank)
            self._send_lines(rank, rank.log.drain())
            rank.log.close()

    def _handle(self, peer: socket.socket, message: MonitorMessage) -> None:
        match message:
            case MonitorStarted():
                if message.rank not in self._ranks:
                    raise MalformedMessage(f"the number of a rank that is not on this host, {message.rank}")
                rank = self._ranks[message.rank]
                self._peers[peer] = rank.number
                rank.monitor, rank.process = identify(message.monitor_pid), identify(message.pid)
            case MonitorSignalled():
                self._launcher_signal = self._launcher_signal or LauncherSignal(message.signal, message.signalled_at)
            case MonitorExited():
                if peer not in self._peers:
                    raise MalformedMessage("an exit before the number of its rank")
                rank, code = self._ranks[self._peers[peer]], exit_code_of_status(message.status)
                self._report_exit(rank, time=message.time, code=code, by_launcher=message.by_launcher)

    def _report_exit(self, rank: _Rank, *, time: float, code: int, by_launcher: bool = False) -> None:
        """Report an exit; ``code`` is negative for a signal. If unexplained, dump other stacks."""
        self._read_heartbeat(rank)
        self._send_exception(rank)
        if rank.dump is not None and not rank.is_stack_sent:
            self._send_stack(rank, rank.dump)
        rank.has_exited = True
        exit = {"code": code, "signal": None} if code >= 0 else {"code": None, "signal": -code}
        tail = rank.log.last(_TAIL_LINES) if code else ""
        self._emit(RankExited(rank=rank.number, time=time, tail=tail, by_launcher=by_launcher, **exit))
        if code not in (0, EXIT_PREEMPTED) and not rank.has_raised and not self._are_ending:
            self.dump(within_s=_DUMP_S)

    def _send_lines(self, rank: _Rank, lines: list[str]) -> int:
        for line in rank.filter.filter(lines) if lines else ():
            self._emit(OutputLine(source=rank.number, text=line))
        return len(lines)

    def _read_heartbeat(self, rank: _Rank) -> None:
        state = read_heartbeat(rank.heartbeat)
        self._send_heartbeat(rank, state, age_s=max(0.0, time.monotonic() - state.at) if state else 0.0)

    def _send_heartbeat(self, rank: _Rank, state: HeartbeatState | None, *, age_s: float) -> None:
        if state is not None and state.at != rank.heartbeat_at:
            rank.heartbeat_at, numbers = state.at, state.numbers
            self._emit(
                RankHeartbeat(rank=rank.number, phase=state.phase, step=state.step, age_s=age_s, numbers=numbers)
            )

    def _send_stack(self, rank: _Rank, dump: StackDump) -> None:
        rank.is_stack_sent = True
        self._emit(RankStack(rank=rank.number, text=dump.take(), is_stopped=dump.is_stopped))

    def _send_exception(self, rank: _Rank) -> None:
        if rank.has_raised or rank.process is None:
            return
        from_slot = read_exception_record(rank.heartbeat)
        if from_slot is None and not rank.record.exists():
            return
        try:
            found = rank.record.read_bytes() if from_slot is None else from_slot
            record: ExceptionRecord = decode(found, ExceptionRecord)
        except (OSError, MalformedMessage) as problem:
            rank.has_raised = True  # do not read it again
            self._emit(UserNote(text=f"the record of rank {rank.number}'s exception cannot be read: {problem}"))
            return
        if record.pid != rank.process.pid:  # left by an earlier attempt in this run directory
            return
        rank.has_raised = True
        code = record.code if 0 < record.code < 256 else 1  # the session would reject it, and with it this host
        self._emit(
            RankRaised(rank=rank.number, time=record.time, code=code, error=record.error, traceback=record.traceback)
        )


def exit_code_of_status(status: int) -> int:
    """Return the exit code in a wait status, negative for a signal.

    Raises:
        MalformedMessage: it is not the status of an exited process.
    """
    if not 0 <= status < 1 << 16 or not (os.WIFEXITED(status) or os.WIFSIGNALED(status)):
        raise MalformedMessage(f"the wait status {status}, which no exited process has")
    return os.waitstatus_to_exitcode(status)
