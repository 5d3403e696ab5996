"""The host agent, ``python -m launcher.supervise.agent``: starts what runs on one host and ends all of it.

It reads an ``Assignment`` and then orders on stdin, and writes events on stdout. When stdin ends, the session is gone:
then it ends the run by itself. Everything below it stays below it, because it is a subreaper.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

from launcher.errors import ConfigError, ConfigErrors
from launcher.plan import Command, HostPlan
from launcher.rundir import RunDir
from launcher.schema import build
from launcher.supervise.child import Child
from launcher.supervise.link import listen, scratch_folder
from launcher.supervise.linux import become_subreaper
from launcher.supervise.messages import (
    AgentSignalled,
    Assignment,
    CommandEnded,
    Dump,
    End,
    Finish,
    Idle,
    Line,
    Note,
    Ready,
    Started,
)
from launcher.supervise.orphan import conclude_alone
from launcher.supervise.processes import Process, end_descendants
from launcher.supervise.ranks import Ranks
from launcher.supervise.sidecars import Sidecars
from launcher.supervise.uplink import Uplink

_TICK_S = 0.1
_BUSY_S = 0.01
_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class HostAgent:
    """Runs one assignment. Single-threaded: it waits in ``_turn`` and nowhere else."""

    def __init__(self, assignment: Assignment, *, uplink: Uplink, scratch: Path) -> None:
        self._assignment, self._uplink, self._scratch = assignment, uplink, scratch
        self._plan = host_plan_of(assignment)
        self._run_dir = RunDir(Path(assignment.run_dir))
        self._log = self._run_dir.log_of(self._plan.host.name, "agent").open("a", encoding="utf-8", buffering=1)
        self._env = {**os.environ, "LAUNCHER_AGENT_SCRATCH": str(scratch)}
        self._current: Child | None = None
        self._kill_at: float | None = None
        self._exit_code: int | None = None
        self._signals: list[int] = []
        self._pause_s = _TICK_S
        self._selector = selectors.DefaultSelector()
        self._listener = listen(scratch)
        self._ranks = Ranks(self._plan, run_dir=self._run_dir, scratch=scratch, emit=uplink.send)
        self._sidecars = Sidecars(start=self._start, emit=uplink.send)
        self._on_readable(self._listener.fileno(), self._accept)
        self._on_readable(uplink.inbox, self._obey)

    def run(self) -> None:
        """Prepare, start, stay, clean up, report; return when nothing of the run is left on this host."""
        for number in _HEARD:
            signal.signal(number, self._note_signal)
        self._uplink.send(Ready(scratch=str(self._scratch)))
        if self._prepare():
            self._sidecars.start(self._plan.sidecars)
            self._stay_with(self._launch())
        self._end_all_but_sidecars()
        self._ranks.drain()
        self._uplink.send(Idle())
        self._finish()
        self._uplink.flush_all()

    def _prepare(self) -> bool:
        """Run the preparing commands one after the other; return whether the ranks may start."""
        for command in self._plan.prepare:
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

    def _launch(self) -> Child | None:
        """Start torchrun or deepspeed; its own words go to the agent's log, the ranks write theirs themselves."""
        self._current = self._start_or_report(self._plan.start, role="launcher", on_line=self._write_down)
        if self._current is not None:
            self._uplink.send(Started())
        return self._current

    def _stay_with(self, launcher: Child | None) -> None:
        """Wait until the launcher and every rank have ended, or their time is up."""
        if launcher is None:
            return
        self._wait(lambda: launcher.ended() or self._is_over())
        if launcher.ended():
            self._catch_up()
            launcher.drain()
            self._report_end(launcher, role="launcher")
        if self._ranks.any_alive() and self._kill_at is None:
            self._end_ranks(signal.SIGTERM, self._assignment.grace_s)
        self._wait(lambda: (launcher.ended() and not self._ranks.any_alive()) or self._is_over())

    def _end_all_but_sidecars(self) -> None:
        self._report_left(end_descendants(os.getpid(), spare=self._sidecars.processes))
        self._catch_up()  # the guards have hung up: their ranks are accounted for

    def _finish(self) -> None:
        """Wait for the verdict of the session, tell the sidecars, and let nothing remain."""
        self._kill_at = None  # it was the ranks'; patience with sidecars starts anew
        self._wait(lambda: self._exit_code is not None or self._uplink.lost)
        if self._exit_code is None:
            self._exit_code = conclude_alone(self._assignment, is_first=self._plan.first_rank == 0)
        self._sidecars.finish(self._exit_code, turn=self._turn, killed=self._is_over)
        self._report_left(end_descendants(os.getpid()))

    def _end_ranks(self, number: int, grace_s: float) -> None:
        """Signal the ranks, or what is about to start them, and set the time at which the rest is killed."""
        deadline = time.monotonic() + (0.0 if number == signal.SIGKILL else grace_s)
        self._kill_at = deadline if self._kill_at is None else min(self._kill_at, deadline)
        if number != signal.SIGKILL and not self._ranks.send(number) and self._current is not None:
            self._current.process.send(number)

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
        self._pause_s = 0.0 if more else _BUSY_S if self._uplink.is_full else _TICK_S
        self._sidecars.look()
        self._uplink.flush()
        while self._signals:
            number = self._signals.pop(0)
            self._uplink.send(AgentSignalled(signal=number))
            self._end_ranks(number, self._assignment.grace_s)
        if self._uplink.lost and self._kill_at is None:
            self._end_ranks(signal.SIGTERM, self._assignment.grace_s)

    def _catch_up(self) -> None:
        """Handle what has arrived already: first new guards, then what they said."""
        for _ in range(2):
            self._pause_s = 0.0
            self._turn()

    def _obey(self) -> None:
        for order in self._uplink.receive():
            match order:
                case End(signal=number, grace_s=grace_s):
                    self._end_ranks(number, grace_s)
                case Dump():
                    self._ranks.dump()
                case Finish(exit_code=exit_code):
                    self._exit_code = exit_code
                case _:
                    raise AssertionError(f"no agent takes {order}")
        if self._uplink.lost:
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

    def _start(self, command: Command, *, on_line: Callable[[str], None], listens: bool = False) -> Child:
        child = Child(command, env={**self._env, **command.env}, on_line=on_line, listens=listens)

        def read() -> None:
            if not child.read():
                self._selector.unregister(child.output)

        self._on_readable(child.output, read)
        return child

    def _start_or_report(self, command: Command, *, role: str, on_line: Callable[[str], None]) -> Child | None:
        try:
            return self._start(command, on_line=on_line)
        except OSError as error:
            name, tail = command.argv[0], f"{command.argv[0]} cannot be started: {error.strerror}"
            self._uplink.send(CommandEnded(name=name, role=role, time=time.time(), code=127, signal=None, tail=tail))
            return None

    def _on_readable(self, descriptor: int, handler: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, handler)

    def _report_end(self, child: Child, *, role: str) -> None:
        code, number, tail = child.code, child.signal, child.tail
        now = time.time()
        self._uplink.send(CommandEnded(name=child.name, role=role, time=now, code=code, signal=number, tail=tail))

    def _report_left(self, left: list[Process]) -> None:
        if left:
            self._uplink.send(Note(text=f"{self._plan.host.name}: the kernel does not let go of {left}"))

    def _pass_on(self, who: str, line: str) -> None:
        self._uplink.send(Line(who=who, text=line))
        self._write_down(line)

    def _write_down(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the run
            self._log.write(line + "\n")

    def _note_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals.append(number)


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


def main() -> None:
    """Serve the assignment on stdin."""
    become_subreaper()
    uplink = Uplink(inbox=sys.stdin.fileno(), outbox=os.dup(sys.stdout.fileno()))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print must not look like an event
    with scratch_folder() as scratch:
        assignment = uplink.first()
        assert isinstance(assignment, Assignment), "the session sends it first"
        HostAgent(assignment, uplink=uplink, scratch=scratch).run()


if __name__ == "__main__":
    main()
