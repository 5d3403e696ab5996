"""From a composition to a finished run: identity, plan, directory, submission."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.announce import closing, opening
from launcher.checkpoint.lock import RunLock
from launcher.compose import Composed
from launcher.config import Run
from launcher.errors import ConfigError, ConfigErrors
from launcher.facts import gather
from launcher.files import read_json, sha256_of, write_atomic, write_json
from launcher.hosts import this_machine
from launcher.plan import Identity, Plan
from launcher.planner import make_plan
from launcher.preflight import free_port, preflight
from launcher.rundir import RunDir, mint_run_id
from launcher.schema import to_tree
from launcher.snapshot import dump_run
from launcher.supervise.conclude import conclude

_PORT_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that may start: nothing has been written yet."""

    run: Run
    plan: Plan
    snapshot: str
    """The text of run.yaml."""

    @property
    def directory(self) -> RunDir:
        """Where the run will live."""
        return RunDir(Path(self.plan.run_dir))


def prepare(composed: Composed) -> Prepared:
    """Plan a composed run on this machine.

    Raises:
        ConfigErrors: everything that stands against it, found in one pass.
    """
    run = composed.run
    continued = _run_id_in(run.run.dir) if run.run.dir and run.checkpoint.resume == "auto" else None
    run_id = continued or mint_run_id()
    folder = Path(run.run.dir) if run.run.dir else Path(run.run.root) / run.run.name / run_id
    folder = folder.absolute()
    snapshot = dump_run(run)
    host = this_machine(run.backend, max_ranks=run.parallel.max_ranks)
    mistakes = list(preflight(run, folder, world_size=host.slots))
    port = free_port() if run.backend.port == "auto" else run.backend.port
    identity = Identity(run_id=run_id, run_dir=str(folder), run_hash=sha256_of(snapshot.encode()), port=port)
    try:
        plan = make_plan(run, [host], identity, gather(run, host))
    except ConfigErrors as several:
        raise ConfigErrors([*mistakes, *several.errors]) from several
    if mistakes:
        raise ConfigErrors(mistakes)
    return Prepared(run=run, plan=plan, snapshot=snapshot)


def start(prepared: Prepared) -> int:
    """Write the run directory, start the ranks, stay until they end, and return the exit code."""
    directory = prepared.directory
    try:
        directory.logs.mkdir(parents=True, exist_ok=True)
        lock = RunLock(directory.path).acquire()
    except OSError as error:
        fix = "choose a folder you can write to"
        raise ConfigError("run.dir", directory.path, why=error.strerror or str(error), fix=fix) from error
    with lock:
        print("\n".join(opening(prepared.plan)), flush=True)
        started = time.monotonic()
        code = _submit(prepared)
        if code == 0:
            print(closing(read_json(directory.result), elapsed_s=time.monotonic() - started), flush=True)
        return code


def _submit(prepared: Prepared) -> int:
    for _ in range(_PORT_TRIES):
        write_atomic(prepared.directory.snapshot, prepared.snapshot)
        write_json(prepared.directory.plan, to_tree(prepared.plan))
        outcome = prepared.run.backend.submit(prepared.plan)
        if not outcome.port_taken or prepared.run.backend.port != "auto":
            break
        port = free_port()
        print(f"port {prepared.plan.port} was taken meanwhile: trying again on {port}", flush=True)
        prepared = replace(prepared, plan=_on_port(prepared, port))
    conclude(outcome, prepared.directory, run_id=prepared.plan.run_id)
    return outcome.exit_code


def _on_port(prepared: Prepared, port: int) -> Plan:
    plan = prepared.plan
    identity = Identity(run_id=plan.run_id, run_dir=plan.run_dir, run_hash=plan.run_hash, port=port)
    hosts = [host.host for host in plan.hosts]
    return make_plan(prepared.run, hosts, identity, gather(prepared.run, hosts[0]))


def _run_id_in(folder: str) -> str | None:
    """Return the id of the run that ``folder`` holds, so that a continued run keeps its name in W&B."""
    plan = RunDir(Path(folder)).plan
    return str(read_json(plan)["run_id"]) if plan.is_file() else None
