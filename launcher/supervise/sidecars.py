"""Processes beside the ranks, such as a tracker: they outlive the ranks for a while and never change the outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from launcher.plan import Command
from launcher.supervise.child import Child, name_of
from launcher.supervise.messages import Line, Message, Note
from launcher.supervise.processes import Process

SIDECAR_WAIT_S = 60.0
"""Time a sidecar gets to send off what it holds, once the ranks are gone."""

_SAY_AFTER_S = 2.0


class Start(Protocol):
    """Starts a command and reads its output."""

    def __call__(self, command: Command, *, on_line: Callable[[str], None], listens: bool) -> Child:
        """Return the running child."""


class Sidecars:
    """The sidecars of one host."""

    def __init__(self, *, start: Start, emit: Callable[[Message], None]) -> None:
        self._start, self._emit = start, emit
        self._children: list[Child] = []
        self._reported: set[Child] = set()

    @property
    def processes(self) -> list[Process]:
        """Those that have been started."""
        return [child.process for child in self._children]

    def start(self, commands: Sequence[Command]) -> None:
        """Start all; one that cannot start is said and passed over."""
        for command in commands:
            try:
                child = self._start(command, on_line=partial(self._pass_on, name_of(command)), listens=True)
            except OSError as error:
                self._emit(Note(text=f"{name_of(command)} cannot be started ({error.strerror}); the run goes on"))
            else:
                self._children.append(child)

    def look(self) -> None:
        """Say which have failed since the last look."""
        for child in self._children:
            if child not in self._reported and child.ended():
                self._reported.add(child)
                child.drain()
                if child.code != 0:
                    how = f"signal {child.signal}" if child.signal else f"exit code {child.code}"
                    self._emit(Note(text=f"{child.name} ended with {how}; this does not change the run"))

    def finish(self, exit_code: int, *, turn: Callable[[], None], killed: Callable[[], bool]) -> None:
        """Tell all how the run ended and wait for them.

        Args:
            exit_code: of the run; they get ``{"exit_code": …}`` as one line, then the end of their stdin.
            turn: waits a moment.
            killed: whether the user has lost patience.
        """
        for child in self._children:
            child.tell_last({"exit_code": exit_code})
        started, said = time.monotonic(), False
        while waiting := [child.name for child in self._children if not child.ended()]:
            waited = time.monotonic() - started
            if killed():
                return
            if waited > SIDECAR_WAIT_S:
                self._emit(Note(text=f"{', '.join(waiting)} did not end within {SIDECAR_WAIT_S:.0f} s: killed"))
                return
            if waited > _SAY_AFTER_S and not said:
                said = True
                self._emit(Note(text=f"waiting for {', '.join(waiting)} (at most {SIDECAR_WAIT_S:.0f} s)"))
            turn()
        self.look()

    def _pass_on(self, name: str, line: str) -> None:
        self._emit(Line(who=name, text=line))
