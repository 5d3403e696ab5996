"""``launch cancel``: end one run from any shell."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence

from launcher.cli.arguments import Arguments
from launcher.errors import EnvironmentProblem
from launcher.protocol.session_file import AgentLocation, SessionRecord
from launcher.runs.index import find_run
from launcher.runs.state import RunState, read_run_state
from launcher.utils.processes import Process
from launcher.utils.text import printable, shell_command, shell_word

_POLL_S = 0.1
_BETWEEN_S = 1.0
"""Time between two SIGINT: two at once are delivered as one."""
_PATIENCE_S = 60.0
"""Time, beyond the run's grace, after which a process counts as stuck."""


def run(arguments: Arguments) -> int:
    """End one run."""
    state = read_run_state(find_run(arguments.run, arguments.root))
    where = state.session
    if state.is_over:
        left = _far_agents(where) if where and not state.result else []
        _say(f"{state.run_id} has already ended: {state.status}")
        for agent in left:
            _say(f"  if {agent.host} still runs it: {_type_there(agent, state)}")
        return 0
    if where is None:
        raise EnvironmentProblem(f"{state.run_id} has no session.json yet: try again in a moment")
    _check_owner(state)
    if where.job:
        return _cancel_job(where, state)
    processes = _here(where)
    if not processes:
        far = where.session
        command = shell_command(["ssh", far.machine, shell_command(["launch", "cancel", str(state.run_dir.path)])])
        raise EnvironmentProblem(f"{state.run_id} is executed by process {far.pid} on {far.machine}: type\n{command}")
    return _end(processes, state, now=arguments.now)


def _say(text: str) -> None:
    """Print a line without control characters that files of the run may hold."""
    print(printable(text), flush=True)


def _check_owner(state: RunState) -> None:
    """Raise if another user owns session.json, which could name this user's processes."""
    owner = state.run_dir.session.lstat().st_uid
    if owner != os.geteuid():
        file = state.run_dir.session
        why = f"{file} is of user {owner}, and you are {os.geteuid()}"
        raise EnvironmentProblem(f"{why}: it may name processes and jobs of other users. Cancel the run as that user")


def _here(where: SessionRecord) -> list[Process]:
    """Return the processes to signal: the session, or without it the agents of this machine."""
    if where.session.is_running():
        return [where.session.process]
    return [agent.location.process for agent in where.agents if agent.location.is_running()]


def _end(processes: Sequence[Process], state: RunState, *, now: bool) -> int:
    """Signal ``processes`` and wait until they and the agents of this machine have exited."""
    where = state.session
    assert where is not None, "they were found in it"
    signalled = ", ".join(str(process.pid) for process in processes)
    _say(f"{state.run_id}: {'interrupting' if now else 'asking'} process {signalled} to end")
    agents = [agent.location.process for agent in where.agents if agent.location.is_running()]
    for process in processes:
        process.send(signal.SIGINT if now else signal.SIGTERM)
    grace_s = float(state.plan.get("grace_s", 0.0))
    started = time.monotonic()
    again_at = started + _BETWEEN_S if now else None
    while left := [process for process in {*processes, *agents} if process.is_alive()]:
        if again_at is not None and time.monotonic() >= again_at:
            again_at = None
            for process in processes:
                process.send(signal.SIGINT)
        if time.monotonic() > started + grace_s + _PATIENCE_S:
            pids = ", ".join(str(process.pid) for process in left)
            raise EnvironmentProblem(f"{state.run_id}: process {pids} is still running: try launch cancel --now")
        time.sleep(_POLL_S)
    state = read_run_state(state.run_dir)
    _say(f"{state.run_id}: no process of it is left on this machine; it is {state.status}")
    if state.status == "preempted":
        _say(f"  it saved first: launch resume {shell_word(str(state.run_dir.path))} continues it")
    for agent in _far_agents(where):
        _say(f"  {agent.host} stops when it has no session; to make sure: {_type_there(agent, state)}")
    return 0


def _cancel_job(where: SessionRecord, state: RunState) -> int:
    """Cancel the job through its scheduler."""
    argv = list(_cancelling(where, state))
    program = shutil.which(argv[0])
    if program is None:
        raise EnvironmentProblem(
            f"{argv[0]} is not installed on this machine: type on one that has it\n{shell_command(argv)}"
        )
    _say(f"{state.run_id}: {shell_command(argv)}")
    ended = subprocess.run([program, *argv[1:]], check=False)
    if ended.returncode:
        raise EnvironmentProblem(f"{argv[0]} ended with exit code {ended.returncode}: the job may still run")
    _say(f"{state.run_id}: the scheduler accepted the cancellation; see launch status")
    return 0


def _cancelling(where: SessionRecord, state: RunState) -> Iterator[str]:
    """Yield the command that cancels the job.

    Raises:
        EnvironmentProblem: its name in ``session.json`` is not a name that the scheduler gives.
    """
    job = where.job
    for key in where.invalid_job_names:
        said = f"{state.run_dir.session}: job {key} {job.get(key, '')!r}"
        raise EnvironmentProblem(f"{said} is not a valid job name; cancel the job with the scheduler's own command")
    if where.backend == "slurm":
        yield from ("scancel", "--", job["id"])
    else:
        context = (f"--context={job['context']}",) if "context" in job else ()
        yield from ("kubectl", *context, f"--namespace={job['namespace']}", "delete", "--", job["kind"], job["name"])


def _far_agents(where: SessionRecord) -> list[AgentLocation]:
    return [agent for agent in where.agents if agent.location.is_running() is None]


def _type_there(agent: AgentLocation, state: RunState) -> str:
    command = shell_command(["launch", "cancel", str(state.run_dir.path)])
    return shell_command(
        ["ssh", f"ssh://{agent.ssh_destination}" if agent.ssh_destination else agent.location.machine, command]
    )
