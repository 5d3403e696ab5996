"""session.json: the processes, or the scheduler's job, that execute a run.

Another shell reads it to show or cancel the run. A process is identified by its PID, its start time, the boot of the
machine and the PID namespace: containers share a boot id, machines share namespace numbers, and both reuse PIDs.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import ConfigError
from launcher.protocol.rundir import RunDir
from launcher.utils.files import read_object, write_json
from launcher.utils.processes import Process, identify
from launcher.utils.schema import build, to_tree

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
_NAME = re.compile(r"[\w\[:][\w.:@%\[\]~+-]*")
"""A valid machine name, or ``user@name:port``."""
_SLURM_ID = re.compile(r"\d+(?:_\d+)?(?:\+\d+)?", re.ASCII)
"""A job, a task of an array, a part of a heterogeneous job."""
_KUBERNETES_KEYS = ("kind", "name", "namespace")
_KUBERNETES_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class ProcessLocation:
    """Unique identity of one process on one machine."""

    machine: str
    """Host name that the machine itself reports."""
    boot: str
    """Boot id of its kernel."""
    pid_namespace: int
    """PID namespace in which ``pid`` is valid."""
    pid: int
    started: int
    """Clock ticks since the machine started."""

    @property
    def process(self) -> Process:
        """The process; valid only while ``is_running`` is true."""
        return Process(self.pid, self.started)

    def is_running(self) -> bool | None:
        """Return whether it runs; ``None`` when that is unknown here.

        It does not run on a machine of the same name that has rebooted since.
        """
        boot, pid_namespace = _boot_and_pid_namespace()
        if boot == self.boot and pid_namespace == self.pid_namespace:
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
    location: ProcessLocation


@dataclass(frozen=True, kw_only=True)
class SessionRecord:
    """The processes that execute a run."""

    backend: str
    session: ProcessLocation
    """The process that decides when the run has ended."""
    agents: tuple[AgentLocation, ...] = ()
    cwd: str = ""
    """The working directory that relative paths of the run start from; empty where nothing says."""
    job: dict[str, str] = field(default_factory=dict)
    """Names of the job: Slurm's ``{"id": …}``, Kubernetes' ``{"kind", "name", "namespace"}``."""

    @property
    def invalid_job_names(self) -> tuple[str, ...]:
        """Keys of ``job`` that are missing or not valid names of a scheduler's job.

        An invalid name could be an option of the scheduler's commands.

        Another user may have written them.
        """
        wanted = {"id": _SLURM_ID} if self.backend == "slurm" else dict.fromkeys(_KUBERNETES_KEYS, _KUBERNETES_NAME)
        return tuple(key for key, pattern in wanted.items() if not pattern.fullmatch(self.job.get(key, "")))

    def is_running(self) -> bool | None:
        """Return whether session or agents run; ``None`` when this machine cannot know.

        A scheduler's job may outlive the process that submitted it, so without its session its state is unknown.
        """
        answers = [self.session.is_running(), *(agent.location.is_running() for agent in self.agents)]
        if True in answers:
            return True
        if answers[0] is False and not self.job:
            # agents exit by themselves, seconds after their session
            return False
        return None


def locate_this_process() -> ProcessLocation:
    """Return the location of this process."""
    this = identify(os.getpid())
    assert this is not None, "the calling process exists"
    boot, pid_namespace = _boot_and_pid_namespace()
    return ProcessLocation(
        machine=socket.gethostname(), boot=boot, pid_namespace=pid_namespace, pid=this.pid, started=this.started
    )


def write_session_file(run_dir: RunDir, record: SessionRecord) -> None:
    """Write ``session.json``, atomically; call it again whenever an agent or a job is added.

        write_session_file(run_dir, SessionRecord(backend="ssh", session=locate_this_process(), agents=…))

    Raises:
        OSError: the disk is full or gone.
    """
    write_json(run_dir.session, to_tree(record))


def read_session_file(run_dir: RunDir) -> SessionRecord | None:
    """Return the content of ``session.json``; ``None`` when it is absent or invalid."""
    try:
        tree = read_object(run_dir.session)
    except (OSError, ValueError):
        return None
    mistakes: list[ConfigError] = []
    found = build(SessionRecord, tree, path="session", report=mistakes.append)
    return found if found is not None and _has_valid_names(found) else None


def _has_valid_names(record: SessionRecord) -> bool:
    """Return whether all names are valid: they are shown as arguments of ssh."""
    locations = (record.session, *(agent.location for agent in record.agents))
    names = [*(location.machine for location in locations), *(agent.host for agent in record.agents)]
    logins = [agent.ssh_destination for agent in record.agents if agent.ssh_destination]
    return all(map(_NAME.fullmatch, [*names, *logins])) and all(location.pid > 0 for location in locations)


def _boot_and_pid_namespace() -> tuple[str, int]:
    """Return boot id and PID namespace of this process."""
    return _BOOT_ID.read_text(encoding="ascii").strip(), _PID_NAMESPACE.stat().st_ino
