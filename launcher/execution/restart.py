"""Submit a plan; retry on another port, and restart a failed run from its newest checkpoint."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.resume import find_checkpoint, resume_of_restart
from launcher.checkpoint.store import silent
from launcher.errors import EXIT_BAD_INPUT, EXIT_UNFIT, EXIT_USER_ERROR, ConfigError, EnvironmentProblem
from launcher.errors.secrets import redact
from launcher.execution.executor import AnyExecutor
from launcher.execution.prepare import PreparedRun, replan
from launcher.execution.resumed_batch import keep_global_batch
from launcher.protocol.outcome import RunOutcome
from launcher.protocol.plan import Host
from launcher.protocol.results import write_result
from launcher.supervision.finalize import closing_message, finalize_run, try_to_write
from launcher.utils.files import write_atomic, write_json
from launcher.utils.schema import to_tree
from launcher.utils.system import describe_full_disk, free_port

PORT_TRIES = 3
_PAUSE_S = 1.0
"""Pause before a restart: the cause of a failure may take its host down a moment later."""


def submit_with_restarts(prepared: PreparedRun, executor: AnyExecutor, *, port_tries: int = PORT_TRIES) -> RunOutcome:
    """Submit the plan, retry or restart it, finalize the run, and return its outcome.

    It retries when a port is in use, and restarts as often as ``backend.restarts`` allows.

    The run's directory exists.
    """
    backend = prepared.run.backend
    restarts, tries = 0 if backend.restarts_itself else backend.restarts, port_tries
    write_run_files(prepared)
    while True:
        outcome = executor.submit(prepared.plan)
        if outcome.port_taken and backend.port == "auto" and tries > 1:
            tries -= 1
            prepared = _on_another_port(prepared)
            if not _is_written(prepared):
                break
        elif restarts and _may_be_restarted(outcome):
            restarts -= 1
            again = _restarted(prepared, outcome, executor, left=restarts)
            if again is None or not _is_written(again):
                break
            prepared = again
        else:
            break
    finalize_run(outcome, prepared.directory, run_id=prepared.plan.run_id)
    return outcome


def write_run_files(prepared: PreparedRun) -> None:
    """Write run.yaml and plan.json.

    Raises:
        EnvironmentProblem: the disk is full or not writable.
    """
    directory = prepared.directory
    try:
        write_atomic(directory.snapshot, prepared.snapshot)
        write_json(directory.plan, to_tree(prepared.plan))
    except OSError as error:
        why = describe_full_disk(directory.path) or error.strerror or str(error)
        raise EnvironmentProblem(f"run.dir={directory.path} cannot be written: {why}; choose another disk") from error


def _is_written(prepared: PreparedRun) -> bool:
    """Write the files of another attempt; return False, with a message, if the disk is full."""
    try:
        write_run_files(prepared)
    except EnvironmentProblem as problem:
        print(f"not restarted: {problem}", flush=True)
        return False
    return True


def _on_another_port(prepared: PreparedRun) -> PreparedRun:
    port = free_port()
    print(f"port {prepared.plan.port} is in use: trying again on {port}", flush=True)
    plan = prepared.plan
    return replan(prepared.run, prepared.hosts, run_id=plan.run_id, folder=Path(plan.run_dir), port=port)


def _may_be_restarted(outcome: RunOutcome) -> bool:
    """Return whether another attempt can succeed.

    Invalid options, data, weights and hosts do not change.
    """
    return outcome.status == "failed" and outcome.exit_code not in (EXIT_USER_ERROR, EXIT_BAD_INPUT, EXIT_UNFIT)


def _restarted(prepared: PreparedRun, outcome: RunOutcome, executor: AnyExecutor, *, left: int) -> PreparedRun | None:
    """Return the run on the hosts that still answer, from its newest checkpoint.

    ``None`` if it cannot restart.
    """
    directory, backend = prepared.directory, prepared.run.backend
    print(closing_message(outcome, directory), flush=True)
    if outcome.failure is not None:
        kept = directory.path / f"failure.before_restart_{backend.restarts - left}.json"
        tree = redact(outcome.failure.tree(), os.environ)
        for line in try_to_write(kept, lambda: write_json(kept, tree)):
            print(line, flush=True)
    time.sleep(_PAUSE_S)
    hosts, port = _answering(prepared, executor)
    if len(hosts) < backend.min_hosts_for_restart(len(prepared.hosts)):
        gone = ", ".join(sorted({host.name for host in prepared.hosts} - {host.name for host in hosts}))
        line = f"not restarted: {len(hosts)} of {len(prepared.hosts)} hosts answer, {gone} do not"
        print(line + (f"; backend.min_hosts={len(hosts)} would continue without" if hosts else ""), flush=True)
        return None
    run = prepared.run
    resume = resume_of_restart(run.checkpoint.resume, directory)
    run = replace(
        run,
        run=replace(run.run, dir=prepared.plan.run_dir),
        checkpoint=replace(run.checkpoint, resume=resume),
    )
    is_fresh = resume == "auto"  # otherwise the directory is checked as that of a new run, which must be empty
    try:
        if resume == "auto" and (saved := find_checkpoint(resume, directory, say=silent)) is not None:
            run = keep_global_batch(run, saved, world_size=sum(host.slots for host in hosts))
        again = replan(run, hosts, run_id=prepared.plan.run_id, folder=directory.path, port=port, is_fresh=is_fresh)
    except ConfigError as problem:
        print(f"not restarted on {len(hosts)} hosts: {problem}", flush=True)
        return None
    names = ", ".join(host.name for host in hosts)
    print(f"restarting on {names} ({left} restart{'s' if left != 1 else ''} left)", flush=True)
    try_to_write(
        directory.result,
        lambda: write_result(directory, status="failed", exit_code=outcome.exit_code, run_id=prepared.plan.run_id),
    )
    return again


def _answering(prepared: PreparedRun, executor: AnyExecutor) -> tuple[tuple[Host, ...], int]:
    """Return the hosts that a restart can use, and a port for it."""
    backend = prepared.run.backend
    if not backend.probes_hosts:
        return prepared.hosts, free_port() if backend.port == "auto" else backend.port
    from launcher.execution.probe import probe_for_restart

    return probe_for_restart(prepared, executor)
