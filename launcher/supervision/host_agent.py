"""The host agent: prepare a host, start its ranks, watch, end and clean up, report."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

from launcher.errors import EXIT_USER_ERROR, EnvironmentProblem
from launcher.protocol.messages import (
    AgentIdle,
    AgentSignalled,
    Assignment,
    CommandExited,
    DumpStacks,
    EndRanks,
    FinishAgent,
    HostPrepared,
    LauncherStarted,
    OutputLine,
    StartRanks,
    UserNote,
)
from launcher.protocol.native_ops import ops_folder
from launcher.protocol.plan import Command
from launcher.protocol.rundir import RunDir, remove_unfinished_checkpoints
from launcher.protocol.session_file import read_session_file
from launcher.supervision.child_process import ChildProcess, Sidecars
from launcher.supervision.connection import SessionConnection
from launcher.supervision.file_sync import FileSyncSender
from launcher.supervision.finalize import finalize_without_session
from launcher.supervision.host_ranks import HostRanks, LauncherSignal
from launcher.supervision.socket_channel import listen_for_monitors
from launcher.utils.files import StagedFiles, sha256_of, write_atomic
from launcher.utils.logs import open_log
from launcher.utils.processes import Process, end_descendants

_TICK_S = 0.1
_BUSY_S = 0.01
_HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
_SEND_FILES_S = 60.0
"""Seconds, after all processes exited, to send files to a session on another disk."""
_LOST_SESSION_GRACE_S = 2.0
"""Longest grace of the ranks once the session is lost."""
_LOST_LAUNCHER_GRACE_S = 7.0
"""The same once torchrun or deepspeed is, when the run fails whatever its ranks save."""


class HostAgent:
    """Runs one assignment. Single-threaded: it waits in ``_poll`` and nowhere else."""

    def __init__(self, assignment: Assignment, *, session: SessionConnection, scratch: Path) -> None:
        self._assignment, self._session = assignment, session
        self._plan = assignment.host
        self._run_dir = RunDir(Path(assignment.run_dir))
        self._file_sender: FileSyncSender | None = None
        if not shares_disk(assignment):
            self._file_sender = FileSyncSender(self._run_dir, self._plan, session=session)
        self._log = open_log(self._run_dir.log_of(self._plan.host.name, "agent"))
        self._env = {**os.environ, **assignment.env, "LAUNCHER_AGENT_SCRATCH": str(scratch)}
        if "DS_ACCELERATOR" in self._plan.agent_command.env:
            self._env.setdefault("TORCH_EXTENSIONS_DIR", str(ops_folder()))
        self._parent = os.getppid()
        self._may_start = False
        self._current: ChildProcess | None = None
        self._kill_at: float | None = None
        self._launcher_signal: LauncherSignal | None = None
        """Signal that started the ranks' grace period without an order of the session."""
        self._exit_code: int | None = None
        self._signals: list[int] = []
        self._pause_s = _TICK_S
        self._selector = selectors.DefaultSelector()
        self._listener = listen_for_monitors(scratch)
        self._ranks = self._watch_ranks(scratch)
        self._sidecars = Sidecars(start=self._start, emit=session.send)
        self._on_readable(self._listener.fileno(), self._accept)
        self._on_readable(session.read_fd, self._handle_orders)

    def run(self) -> int:
        """Prepare, start, supervise, clean up and report; return the exit code of the run."""
        for number in _HANDLED_SIGNALS:
            signal.signal(number, self._add_signal)
        self._handle_orders()  # those that came together with the assignment
        if self._prepare() and self._others_are_prepared():
            self._sidecars.start(self._plan.sidecars)
            self._wait_for_ranks(self._launch())
        self._end_all_but_sidecars()
        self._ranks.drain()
        self._send_files()
        self._session.send(AgentIdle())
        exit_code = self._finish()
        self._send_files()
        self._session.flush_all()
        return exit_code

    def _watch_ranks(self, scratch: Path) -> HostRanks:
        return HostRanks(self._plan, run_dir=self._run_dir, scratch=scratch, emit=self._session.send)

    def _prepare(self) -> bool:
        """Run the preparing commands in order; return whether the ranks may start."""
        for command in self._plan.build_commands:
            child = self._start_or_report(command, role="prepare", on_line=partial(self._send_line, "prepare"))
            self._current = child
            if child is None:
                return False
            self._wait(lambda child=child: child.has_exited() or self._is_grace_over())  # type: ignore[misc]
            if self._kill_at is not None:
                return False
            child.drain()
            if child.code != 0:
                self._report_exit(child, role="prepare")
                return False
        return self._kill_at is None

    def _others_are_prepared(self) -> bool:
        """Wait until every host is prepared; return whether the ranks may start."""
        self._session.send(HostPrepared())
        self._wait(lambda: self._may_start or self._kill_at is not None)
        return self._kill_at is None

    def _launch(self) -> ChildProcess | None:
        """Start torchrun or deepspeed, with its output in the agent's log."""
        self._current = self._start_or_report(self._plan.agent_command, role="launcher", on_line=self._write_log)
        if self._current is not None:
            self._session.send(LauncherStarted())
        return self._current

    def _wait_for_ranks(self, launcher: ChildProcess | None) -> None:
        """Wait until the launcher and every rank have exited, or their grace is over."""
        if launcher is None:
            return
        self._wait(lambda: launcher.has_exited() or self._is_grace_over())
        if launcher.has_exited():
            self._handle_pending()
            launcher.drain()
            self._report_exit(launcher, role="launcher")
        elif self._launcher_signal is not None:
            self._report_signalled_launcher(launcher, self._launcher_signal)
        if self._ranks.any_alive() and self._kill_at is None:
            self._end_ranks(signal.SIGTERM, min(self._assignment.grace_s, _LOST_LAUNCHER_GRACE_S))
        self._wait(lambda: (launcher.has_exited() and not self._ranks.any_alive()) or self._is_grace_over())

    def _end_all_but_sidecars(self) -> None:
        self._report_unkillable(end_descendants(os.getpid(), spare=self._sidecars.processes))
        self._handle_pending()  # the monitors have closed their sockets, so the exits of their ranks are known

    def _send_files(self) -> None:
        """Wait until the session has received the files of this host, which the end of a run needs."""
        if self._file_sender is None:
            return
        deadline = time.monotonic() + _SEND_FILES_S
        self._file_sender.scan()
        self._wait(lambda: not self._send_some_files() or time.monotonic() > deadline)
        if left := self._file_sender.unsent():
            text = f"{', '.join(left)} did not arrive within {_SEND_FILES_S:.0f} s: see {self._run_dir.path} there"
            self._session.send(UserNote(text=text))

    def _send_some_files(self) -> bool:
        """Send files as far as the connection takes them; return whether some are left to send."""
        return self._file_sender is not None and self._file_sender.send_some() and not self._session.is_lost

    def _finish(self) -> int:
        """Wait for the exit code of the run, end the sidecars, and kill the rest."""
        self._kill_at = None  # that was the grace of the ranks; the sidecars have their own
        self._wait(lambda: self._exit_code is not None or self._session.is_lost)
        if self._exit_code is None:
            self._exit_code = finalize_without_session(self._assignment, is_first=self._plan.first_rank == 0)
        if self._exit_code and (
            self._file_sender is not None or self._session.is_lost
        ):  # else the session removes them
            remove_unfinished_checkpoints(self._run_dir.checkpoints)
        self._sidecars.finish(self._exit_code, poll=self._poll, killed=self._is_grace_over)
        self._report_unkillable(end_descendants(os.getpid()))
        return self._exit_code

    def _end_ranks(self, number: int, grace_s: float) -> None:
        """Signal the ranks, or the command that starts them, and set when the rest is killed."""
        deadline = time.monotonic() + (0.0 if number == signal.SIGKILL else grace_s)
        self._kill_at = deadline if self._kill_at is None else min(self._kill_at, deadline)
        if number != signal.SIGKILL and not self._ranks.send(number) and self._current is not None:
            self._end_command(self._current, number)

    def _end_command(self, child: ChildProcess, number: int) -> None:
        # SIGUSR1 kills torchrun at once; SIGTERM makes it end its ranks
        child.process.send(signal.SIGTERM if number == signal.SIGUSR1 else number)

    def _is_grace_over(self) -> bool:
        return self._kill_at is not None and time.monotonic() >= self._kill_at

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._poll()

    def _poll(self) -> None:
        """Wait briefly and handle every event."""
        for key, _ in self._selector.select(self._pause_s):
            key.data()
        has_lines = self._ranks.poll(logs=not self._session.is_full)
        has_files = self._send_some_files()
        self._pause_s = 0.0 if has_lines else _BUSY_S if has_files or self._session.is_full else _TICK_S
        self._sidecars.report_failed()
        self._session.flush()
        self._session.mark_lost_if_silent()
        if os.getppid() != self._parent:
            self._session.mark_lost()
        launcher_signal = self._ranks.pop_launcher_signal()
        if launcher_signal is not None and self._kill_at is None:
            grace_s = min(self._assignment.grace_s, _LOST_LAUNCHER_GRACE_S)
            self._launcher_signal, self._kill_at = launcher_signal, time.monotonic() + grace_s
        while self._signals:
            number = self._signals.pop(0)
            self._session.send(AgentSignalled(signal=number))
            self._end_ranks(number, self._assignment.grace_after(number))
        if self._session.is_lost and self._kill_at is None:
            self._end_ranks(signal.SIGTERM, min(self._assignment.grace_s, _LOST_SESSION_GRACE_S))

    def _handle_pending(self) -> None:
        """Handle what has arrived already: first new rank monitors, then their messages."""
        for _ in range(2):
            self._pause_s = 0.0
            self._poll()

    def _handle_orders(self) -> None:
        for order in self._session.receive():
            match order:
                case StartRanks():
                    self._may_start = True
                case EndRanks(signal=number, grace_s=grace_s):
                    self._end_ranks(number, grace_s)
                case DumpStacks(within_s=within_s):
                    self._ranks.dump(within_s=within_s)
                case FinishAgent(exit_code=exit_code):
                    self._exit_code = exit_code
                case _:
                    raise AssertionError(f"no session sends {order}")
        if self._session.is_lost and self._session.read_fd in self._selector.get_map():
            self._selector.unregister(self._session.read_fd)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except BlockingIOError:
                return
            peer.setblocking(False)
            self._on_readable(peer.fileno(), partial(self._read_monitor, peer))

    def _read_monitor(self, peer: socket.socket) -> None:
        if not self._ranks.receive(peer):
            self._selector.unregister(peer)
            peer.close()

    def _start(self, command: Command, *, on_line: Callable[[str], None], reads_stdin: bool = False) -> ChildProcess:
        child = ChildProcess(command, env=self._env_of(command), on_line=on_line, reads_stdin=reads_stdin)

        def read() -> None:
            if not child.read():
                self._selector.unregister(child.output)

        self._on_readable(child.output, read)
        return child

    def _env_of(self, command: Command) -> dict[str, str]:
        return {**self._env, **command.env}

    def _start_or_report(self, command: Command, *, role: str, on_line: Callable[[str], None]) -> ChildProcess | None:
        try:
            return self._start(command, on_line=on_line)
        except OSError as error:
            name, tail = command.argv[0], f"{command.argv[0]} cannot be started: {error.strerror}"
            self._session.send(CommandExited(name=name, role=role, time=time.time(), code=127, signal=None, tail=tail))
            return None

    def _on_readable(self, descriptor: int, handler: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, handler)

    def _report_exit(self, child: ChildProcess, *, role: str) -> None:
        code, number, tail = child.code, child.signal, child.tail
        now = time.time()
        self._session.send(CommandExited(name=child.name, role=role, time=now, code=code, signal=number, tail=tail))

    def _report_signalled_launcher(self, child: ChildProcess, received: LauncherSignal) -> None:
        """Report a signalled launcher before it exits: it would wait half a minute for its ranks."""
        name, tail = child.name, child.tail
        self._session.send(
            CommandExited(name=name, role="launcher", time=received.time, code=None, signal=received.signal, tail=tail)
        )

    def _report_unkillable(self, processes: list[Process]) -> None:
        if processes:
            self._session.send(UserNote(text=f"{self._plan.host.name}: the kernel cannot kill {processes}"))

    def _send_line(self, source: str, line: str) -> None:
        self._session.send(OutputLine(source=source, text=line))
        self._write_log(line)

    def _write_log(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self._log.write(line.encode(errors="backslashreplace") + b"\n")

    def _add_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)


def stage_run_dir(assignment: Assignment) -> None:
    """Create the run directory and the files of the assignment that do not exist yet.

    Raises:
        EnvironmentProblem: run.yaml did not arrive as it was sent, or the directory holds other files.
        OSError: the directory cannot be created or written.
    """
    run_dir = RunDir(Path(assignment.run_dir))
    staged = StagedFiles()
    staged.make_folder(run_dir.logs)
    run_dir.logs.mkdir(exist_ok=True)  # asks the server of a shared disk; reading alone may use a cache
    foreign = run_dir.unexpected_files()
    if foreign and not shares_disk(assignment):
        staged.undo()
        shown = ", ".join(foreign[:3])
        problem = f"{run_dir.path} holds files that no run has put there ({shown}) on {assignment.host.host.name}"
        raise EnvironmentProblem(f"{problem}; choose another run.dir")
    snapshot = assignment.files.get(run_dir.snapshot.name)
    if snapshot is not None and (found := sha256_of(snapshot.encode())) != assignment.run_hash:
        hashes = f"{found[:12]}… instead of {assignment.run_hash[:12]}…"
        raise EnvironmentProblem(f"run.yaml did not arrive as it was sent: its hash is {hashes}; start the run again")
    for name, text in assignment.files.items():
        path = run_dir.path / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)


def shares_disk(assignment: Assignment) -> bool:
    """Whether the run directory is the session's own; call it once the directory exists.

    Creating the directory asks its server; an NFS client may cache its content for half a minute.
    """
    found = read_session_file(RunDir(Path(assignment.run_dir)))
    return found is not None and found.session == assignment.session


def staging_failure(assignment: Assignment, problem: Exception) -> CommandExited:
    """Return the message about a failure of ``stage_run_dir``."""
    host = assignment.host.host.name
    if isinstance(problem, OSError):
        reason = f"{assignment.run_dir} cannot be written on {host}: {problem.strerror}; choose run.root where it can"
    else:
        reason = str(problem)
    name, now = "preparing the run directory", time.time()
    return CommandExited(name=name, role="prepare", time=now, code=EXIT_USER_ERROR, signal=None, tail=reason)
