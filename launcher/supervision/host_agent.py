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

from launcher.checkpoint.store import remove_unfinished
from launcher.errors import EXIT_USER_ERROR, ConfigError, ConfigErrors, EnvironmentProblem
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
from launcher.protocol.plan import Command, HostPlan
from launcher.protocol.rundir import RunDir
from launcher.protocol.session_file import process_location_from_tree, read_session_file
from launcher.supervision.child_process import ChildProcess, Sidecars
from launcher.supervision.connection import SessionConnection
from launcher.supervision.file_sync import FileSyncSender
from launcher.supervision.finalize import finalize_without_session
from launcher.supervision.host_ranks import HostRanks, LauncherSignal
from launcher.supervision.socket_channel import listen_for_monitors
from launcher.utils.files import StagedFiles, sha256_of, write_atomic
from launcher.utils.logs import open_log
from launcher.utils.processes import Process, end_descendants
from launcher.utils.schema import build

_TICK_S = 0.1


_BUSY_S = 0.01


_HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


_FILES_S = 60.0
"""Time, once everything has ended, for files to arrive at a session that does not share the disk."""


_LAST_GRACE_S = 2.0
"""Most time that ranks get once nobody is left to wait for them."""


class HostAgent:
    """Runs one assignment. Single-threaded: it waits in ``_turn`` and nowhere else."""

    def __init__(self, assignment: Assignment, *, uplink: SessionConnection, scratch: Path) -> None:
        self._assignment, self._uplink = assignment, uplink
        self._plan = host_plan_of(assignment)
        self._run_dir = RunDir(Path(assignment.run_dir))
        self._mirror = None if shares_disk(assignment) else FileSyncSender(self._run_dir, self._plan, uplink=uplink)
        self._log = open_log(self._run_dir.log_of(self._plan.host.name, "agent"))
        self._env = {**os.environ, **assignment.env, "LAUNCHER_AGENT_SCRATCH": str(scratch)}
        if "DS_ACCELERATOR" in self._plan.agent_command.env:
            self._env.setdefault("TORCH_EXTENSIONS_DIR", str(ops_folder()))
        self._parent = os.getppid()
        self._may_start = False
        self._current: ChildProcess | None = None
        self._kill_at: float | None = None
        self._told: LauncherSignal | None = None
        """Why the time of the ranks is up, where nobody told us."""
        self._exit_code: int | None = None
        self._signals: list[int] = []
        self._pause_s = _TICK_S
        self._selector = selectors.DefaultSelector()
        self._listener = listen_for_monitors(scratch)
        self._ranks = self._watch_ranks(scratch)
        self._sidecars = Sidecars(start=self._start, emit=uplink.send)
        self._on_readable(self._listener.fileno(), self._accept)
        self._on_readable(uplink.inbox, self._obey)

    def run(self) -> int:
        """Prepare, start, stay, clean up, report; return the exit code of the run when nothing of it is left here."""
        for number in _HANDLED_SIGNALS:
            signal.signal(number, self._note_signal)
        self._obey()  # what came together with the assignment
        if self._prepare() and self._others_are_prepared():
            self._sidecars.start(self._plan.sidecars)
            self._stay_with(self._launch())
        self._end_all_but_sidecars()
        self._ranks.drain()
        self._send_files()
        self._uplink.send(AgentIdle())
        exit_code = self._finish()
        self._send_files()
        self._uplink.flush_all()
        return exit_code

    def _watch_ranks(self, scratch: Path) -> HostRanks:
        return HostRanks(self._plan, run_dir=self._run_dir, scratch=scratch, emit=self._uplink.send)

    def _prepare(self) -> bool:
        """Run the preparing commands one after the other; return whether the ranks may start."""
        for command in self._plan.build_commands:
            child = self._start_or_report(command, role="prepare", on_line=partial(self._pass_on, "prepare"))
            self._current = child
            if child is None:
                return False
            self._wait(lambda child=child: child.ended() or self._is_over())  # type: ignore[misc]
            if self._kill_at is not None:
                return False
            child.drain()
            if child.code != 0:
                self._report_end(child, role="prepare")
                return False
        return self._kill_at is None

    def _others_are_prepared(self) -> bool:
        """Wait for the word that every host is prepared: a run starts everywhere or nowhere."""
        self._uplink.send(HostPrepared())
        self._wait(lambda: self._may_start or self._kill_at is not None)
        return self._kill_at is None

    def _launch(self) -> ChildProcess | None:
        """Start torchrun or deepspeed; its own words go to the agent's log, the ranks write theirs themselves."""
        self._current = self._start_or_report(self._plan.agent_command, role="launcher", on_line=self._write_down)
        if self._current is not None:
            self._uplink.send(LauncherStarted())
        return self._current

    def _stay_with(self, launcher: ChildProcess | None) -> None:
        """Wait until the launcher and every rank have ended, or their time is up."""
        if launcher is None:
            return
        self._wait(lambda: launcher.ended() or self._is_over())
        if launcher.ended():
            self._catch_up()
            launcher.drain()
            self._report_end(launcher, role="launcher")
        elif self._told is not None:
            self._report_impatience(launcher, self._told)
        if self._ranks.any_alive() and self._kill_at is None:
            self._end_ranks(signal.SIGTERM, self._assignment.grace_s)
        self._wait(lambda: (launcher.ended() and not self._ranks.any_alive()) or self._is_over())

    def _end_all_but_sidecars(self) -> None:
        self._report_left(end_descendants(os.getpid(), spare=self._sidecars.processes))
        self._catch_up()  # the guards have hung up: their ranks are accounted for

    def _send_files(self) -> None:
        """Wait until the session has what this host wrote: the end of a run is told from it."""
        if self._mirror is None:
            return
        deadline = time.monotonic() + _FILES_S
        self._mirror.look()
        self._wait(lambda: not self._has_files() or time.monotonic() > deadline)
        if left := self._mirror.left():
            told = f"{', '.join(left)} did not arrive within {_FILES_S:.0f} s: see {self._run_dir.path} there"
            self._uplink.send(UserNote(text=told))

    def _has_files(self) -> bool:
        """Send files as far as there is room; return whether some are left, and somebody to send them to."""
        return self._mirror is not None and self._mirror.pump() and not self._uplink.lost

    def _finish(self) -> int:
        """Wait for the verdict of the session, tell the sidecars, and let nothing remain."""
        self._kill_at = None  # it was the ranks'; patience with sidecars starts anew
        self._wait(lambda: self._exit_code is not None or self._uplink.lost)
        if self._exit_code is None:
            self._exit_code = finalize_without_session(self._assignment, is_first=self._plan.first_rank == 0)
        if self._exit_code and (self._mirror is not None or self._uplink.lost):  # else the session sees to it
            remove_unfinished(self._run_dir.checkpoints)
        self._sidecars.finish(self._exit_code, turn=self._turn, killed=self._is_over)
        self._report_left(end_descendants(os.getpid()))
        return self._exit_code

    def _end_ranks(self, number: int, grace_s: float) -> None:
        """Signal the ranks, or what is about to start them, and set the time at which the rest is killed."""
        deadline = time.monotonic() + (0.0 if number == signal.SIGKILL else grace_s)
        self._kill_at = deadline if self._kill_at is None else min(self._kill_at, deadline)
        if number != signal.SIGKILL and not self._ranks.send(number) and self._current is not None:
            self._end_command(self._current, number)

    def _end_command(self, child: ChildProcess, number: int) -> None:
        # torchrun takes SIGUSR1 for its death and says nothing; SIGTERM it understands
        child.process.send(signal.SIGTERM if number == signal.SIGUSR1 else number)

    def _is_over(self) -> bool:
        return self._kill_at is not None and time.monotonic() >= self._kill_at

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._turn()

    def _turn(self) -> None:
        """Wait a moment and handle whatever has happened."""
        for key, _ in self._selector.select(self._pause_s):
            key.data()
        more = self._ranks.poll(logs=not self._uplink.is_full)
        more_files = self._has_files()
        self._pause_s = 0.0 if more else _BUSY_S if more_files or self._uplink.is_full else _TICK_S
        self._sidecars.look()
        self._uplink.flush()
        self._uplink.check()
        if os.getppid() != self._parent:
            self._uplink.lost = True
        told = self._ranks.take_told()
        if told is not None and self._kill_at is None:
            self._told, self._kill_at = told, time.monotonic() + self._assignment.grace_s
        while self._signals:
            number = self._signals.pop(0)
            self._uplink.send(AgentSignalled(signal=number))
            self._end_ranks(number, self._assignment.grace_s)
        if self._uplink.lost and self._kill_at is None:
            self._end_ranks(signal.SIGTERM, min(self._assignment.grace_s, _LAST_GRACE_S))

    def _catch_up(self) -> None:
        """Handle what has arrived already: first new guards, then what they said."""
        for _ in range(2):
            self._pause_s = 0.0
            self._turn()

    def _obey(self) -> None:
        for order in self._uplink.receive():
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
                    raise AssertionError(f"no agent takes {order}")
        if self._uplink.lost and self._uplink.inbox in self._selector.get_map():
            self._selector.unregister(self._uplink.inbox)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except BlockingIOError:
                return
            peer.setblocking(False)
            self._on_readable(peer.fileno(), partial(self._hear, peer))

    def _hear(self, peer: socket.socket) -> None:
        if not self._ranks.hear(peer):
            self._selector.unregister(peer)
            peer.close()

    def _start(self, command: Command, *, on_line: Callable[[str], None], listens: bool = False) -> ChildProcess:
        child = ChildProcess(command, env=self._env_of(command), on_line=on_line, listens=listens)

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
            self._uplink.send(CommandExited(name=name, role=role, time=time.time(), code=127, signal=None, tail=tail))
            return None

    def _on_readable(self, descriptor: int, handler: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, handler)

    def _report_end(self, child: ChildProcess, *, role: str) -> None:
        code, number, tail = child.code, child.signal, child.tail
        now = time.time()
        self._uplink.send(CommandExited(name=child.name, role=role, time=now, code=code, signal=number, tail=tail))

    def _report_impatience(self, child: ChildProcess, told: LauncherSignal) -> None:
        """Report a launcher that is about to be killed: told to end, it would wait half a minute for its ranks."""
        name, tail = child.name, child.tail
        self._uplink.send(
            CommandExited(name=name, role="launcher", time=told.time, code=None, signal=told.signal, tail=tail)
        )

    def _report_left(self, left: list[Process]) -> None:
        if left:
            self._uplink.send(UserNote(text=f"{self._plan.host.name}: the kernel does not let go of {left}"))

    def _pass_on(self, who: str, line: str) -> None:
        self._uplink.send(OutputLine(who=who, text=line))
        self._write_down(line)

    def _write_down(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self._log.write(line.encode(errors="backslashreplace") + b"\n")

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)


def stage_run_dir(assignment: Assignment) -> None:
    """Make the run directory and put the files of the assignment there, unless a shared disk has them already.

    Raises:
        EnvironmentProblem: run.yaml did not arrive as it was sent, or the directory holds files of others.
        OSError: the directory cannot be made or written.
    """
    run_dir = RunDir(Path(assignment.run_dir))
    staged = StagedFiles()
    staged.make_folder(run_dir.logs)
    run_dir.logs.mkdir(exist_ok=True)  # asks the server of a shared disk, which a look alone may not
    foreign = run_dir.unexpected_files()
    if foreign and not shares_disk(assignment):
        staged.undo()
        shown = ", ".join(foreign[:3])
        why = f"{run_dir.path} holds files that no run has put there ({shown}) on {assignment.host['host']['name']}"
        raise EnvironmentProblem(f"{why}; choose another run.dir")
    snapshot = assignment.files.get(run_dir.snapshot.name)
    if snapshot is not None and (found := sha256_of(snapshot.encode())) != assignment.run_hash:
        said = f"{found[:12]}… instead of {assignment.run_hash[:12]}…"
        raise EnvironmentProblem(f"run.yaml did not arrive as it was sent: its hash is {said}; start the run again")
    for name, text in assignment.files.items():
        path = run_dir.path / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomic(path, text)


def shares_disk(assignment: Assignment) -> bool:
    """Whether the run directory is the one of the session; ask once it is settled.

    Making the directory asks its server: what an NFS client remembers may be half a minute old.
    """
    found = read_session_file(RunDir(Path(assignment.run_dir)))
    return found is not None and found.session == process_location_from_tree(assignment.session)


def staging_failure(assignment: Assignment, problem: Exception) -> CommandExited:
    """Return what to tell the session when ``settle`` failed."""
    host = assignment.host["host"]["name"]
    if isinstance(problem, OSError):
        why = f"{assignment.run_dir} cannot be written on {host}: {problem.strerror}; choose run.root where it can"
    else:
        why = str(problem)
    name, now = "preparing the run directory", time.time()
    return CommandExited(name=name, role="prepare", time=now, code=EXIT_USER_ERROR, signal=None, tail=why)


def host_plan_of(assignment: Assignment) -> HostPlan:
    """Return the typed plan of this host.

    Raises:
        ConfigErrors: it was not written by this version.
    """
    mistakes: list[ConfigError] = []
    plan = build(HostPlan, assignment.host, path="host", report=mistakes.append)
    if plan is None:
        raise ConfigErrors(mistakes)
    return plan
