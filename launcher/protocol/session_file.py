"""session.json: which processes, or which scheduler's job, run a run.

Another shell reads it to ask after the run or to end it. A process is known by its number, its start time, and where
its number means something: the boot of the machine and the PID namespace. Containers share a boot id, machines share
namespace numbers, and both use process numbers again.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.protocol.wire import MalformedMessage
from launcher.utils.files import read_object, write_json
from launcher.utils.processes import Process, identify
from launcher.utils.schema import build, to_tree

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_NAME = re.compile(r"[\w\[:][\w.:@%\[\]~+-]*")
"""Of a machine, and ``user@name:port``."""


@dataclass(frozen=True, kw_only=True)
class ProcessLocation:
    """One process on one machine, for ever."""

    machine: str
    """Host name, as the machine itself says it."""
    boot: str
    """Boot id of its kernel."""
    pid_space: int
    """PID namespace, in which the number counts."""
    pid: int
    started: int
    """Clock ticks since the machine started."""

    @property
    def process(self) -> Process:
        """The process itself; only of use where ``is_running`` is true."""
        return Process(self.pid, self.started)

    def is_running(self) -> bool | None:
        """Return whether it lives; ``None`` when this machine cannot know.

        A machine of the same name that has been started since holds it no more.
        """
        boot, pid_space = _boot_and_pid_space()
        if boot == self.boot and pid_space == self.pid_space:
            return self.process.is_alive()
        if boot != self.boot and socket.gethostname() == self.machine:
            return False
        return None


@dataclass(frozen=True, kw_only=True)
class AgentLocation:
    """The agent of one host."""

    host: str
    """Its name in the plan."""
    ssh_destination: str = ""
    """``user@name:port`` of the hostfile; empty for the machine of the session."""
    place: ProcessLocation


@dataclass(frozen=True, kw_only=True)
class SessionRecord:
    """Who runs a run."""

    backend: str
    session: ProcessLocation
    """The process that decides when the run is over."""
    agents: tuple[AgentLocation, ...] = ()
    job: dict[str, str] = field(default_factory=dict)
    """What a scheduler calls it: ``{"id": …}`` of Slurm, ``{"kind": …, "name": …, "namespace": …}`` of Kubernetes."""

    def is_running(self) -> bool | None:
        """Return whether session or agents live; ``None`` when some of them cannot be seen from here.

        A scheduler's job may outlive the process that submitted it, so without a living session nothing is known of it.
        """
        answers = [self.session.is_running(), *(agent.place.is_running() for agent in self.agents)]
        if True in answers:
            return True
        if answers[0] is False and not self.job:
            # agents end by themselves, seconds after their session
            return False
        return None


def locate_this_process() -> ProcessLocation:
    """Return where this process is, for others to find it."""
    itself = identify(os.getpid())
    assert itself is not None, "this process exists"
    boot, pid_space = _boot_and_pid_space()
    return ProcessLocation(
        machine=socket.gethostname(), boot=boot, pid_space=pid_space, pid=itself.pid, started=itself.started
    )


def process_location_from_tree(tree: dict[str, Any]) -> ProcessLocation:
    """Return the place that an agent sent.

    Raises:
        MalformedMessage: it is none.
    """
    mistakes: list[ConfigError] = []
    place = build(ProcessLocation, tree, path="place", report=mistakes.append)
    if place is None:
        raise MalformedMessage(f"a place of a process that is none: {mistakes[0]}")
    return place


def write_session_file(run_dir: RunDir, record: SessionRecord) -> None:
    """Write ``session.json``, atomically; call it again whenever an agent or a job is added.

        write_session_file(run_dir, SessionRecord(backend="ssh", session=locate_this_process(), agents=…))

    Raises:
        OSError: the disk is full or gone.
    """
    write_json(run_dir.session, to_tree(record))


def read_session_file(run_dir: RunDir) -> SessionRecord | None:
    """Return what ``session.json`` says; ``None`` where there is none, or none that this version understands."""
    try:
        tree = read_object(run_dir.session)
    except (OSError, ValueError):
        return None
    mistakes: list[ConfigError] = []
    found = build(SessionRecord, tree, path="session", report=mistakes.append)
    return found if found is not None and _has_valid_names(found) else None


def _has_valid_names(found: SessionRecord) -> bool:
    """Return whether names are names: they are shown in commands to type, and none may be an option of ssh."""
    places = (found.session, *(agent.place for agent in found.agents))
    names = [*(place.machine for place in places), *(agent.host for agent in found.agents)]
    logins = [agent.ssh_destination for agent in found.agents if agent.ssh_destination]
    return all(map(_NAME.fullmatch, [*names, *logins])) and all(place.pid > 0 for place in places)


def _boot_and_pid_space() -> tuple[str, int]:
    """Return boot id and PID namespace of this process."""
    return _BOOT_ID.read_text(encoding="ascii").strip(), _PID_NAMESPACE.stat().st_ino
