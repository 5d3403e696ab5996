"""What an agent needs on its host before anything starts: the run directory, and in it the files of the plan."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.errors import EXIT_USER_ERROR, ConfigError, ConfigErrors, EnvironmentProblem
from launcher.files import sha256_of, write_atomic
from launcher.plan import HostPlan
from launcher.rundir import RunDir, StagedFiles
from launcher.schema import build
from launcher.supervise.messages import Assignment, CommandEnded
from launcher.supervise.whereabouts import place_from_tree, read_whereabouts


def settle(assignment: Assignment) -> None:
    """Make the run directory and put the files of the assignment there, unless a shared disk has them already.

    Raises:
        EnvironmentProblem: run.yaml did not arrive as it was sent, or the directory holds files of others.
        OSError: the directory cannot be made or written.
    """
    run_dir = RunDir(Path(assignment.run_dir))
    staged = StagedFiles()
    staged.make_folder(run_dir.logs)
    run_dir.logs.mkdir(exist_ok=True)  # asks the server of a shared disk, which a look alone may not
    foreign = run_dir.foreign()
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
    found = read_whereabouts(RunDir(Path(assignment.run_dir)))
    return found is not None and found.session == place_from_tree(assignment.session)


def unsettled(assignment: Assignment, problem: Exception) -> CommandEnded:
    """Return what to tell the session when ``settle`` failed."""
    host = assignment.host["host"]["name"]
    if isinstance(problem, OSError):
        why = f"{assignment.run_dir} cannot be written on {host}: {problem.strerror}; choose run.root where it can"
    else:
        why = str(problem)
    name, now = "preparing the run directory", time.time()
    return CommandEnded(name=name, role="prepare", time=now, code=EXIT_USER_ERROR, signal=None, tail=why)


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
