"""From a composition to a run that can start: identity, plan, snapshot."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher.checkpoint.foreign.plan import foreign_weights_details
from launcher.checkpoint.locks import CheckpointLocks
from launcher.config.compose import Composition
from launcher.config.paths import validate_path
from launcher.config.run import Run, default_run_name
from launcher.config.snapshot import dump_run
from launcher.config.validate import validate_overrides_used
from launcher.errors import ConfigError, ConfigErrors
from launcher.execution.checkpoint_room import room_warnings
from launcher.execution.held_checkpoints import keep_checkpoints
from launcher.execution.run_references import resolve_run_references
from launcher.execution.validate import path_warnings, resume_details, resume_warnings, validate_machine
from launcher.execution.validate_inputs import data_details
from launcher.planning.planner import gather_local_facts, make_plan
from launcher.protocol.plan import Host, Plan, RunIdentity
from launcher.protocol.rundir import RunDir, new_run_id
from launcher.utils.files import exists, is_folder, read_object, sha256_of
from launcher.utils.system import free_port

_RUN_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
_PATHS_OF_HOSTS = ("backend.python",)
_LONGEST_ID = "20260101-120000-abcd"

DEFAULT_PORT = 29500
"""Torch's default; shown by dry runs, which cannot know the free ports of another machine."""


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that can start; nothing has been written yet."""

    run: Run
    plan: Plan
    snapshot: str
    """The text of run.yaml."""
    locks: CheckpointLocks = field(default_factory=CheckpointLocks, compare=False, repr=False)
    """Keep the checkpoints of other runs that ranks load."""

    @property
    def directory(self) -> RunDir:
        """The run directory."""
        return RunDir(Path(self.plan.run_dir))

    @property
    def hosts(self) -> tuple[Host, ...]:
        """The hosts of the run."""
        return tuple(host.host for host in self.plan.hosts)


def prepare(composed: Composition) -> PreparedRun:
    """Return the plan and snapshot of a composed run, without connecting to other machines.

    Its ``locks`` keep the checkpoints that it loads.

    Raises:
        ConfigErrors: everything that prevents it, found in one pass.
    """
    if unreachable := list(validate_paths(composed.run)):
        raise ConfigErrors(unreachable)
    locks = CheckpointLocks()
    run = composed.run if composed.is_resolved else resolve_run_references(composed, locks=locks)
    continued = _run_id_in(run.run.dir) if run.run.dir and run.checkpoint.resume == "auto" else None
    run_id = continued or new_run_id()
    folder = Path(run.run.dir) if run.run.dir else Path(run.run.root) / run.run.name / run_id
    keep_checkpoints(run, RunDir(folder), locks)
    hosts = run.backend.hosts(max_ranks=run.job.max_ranks(run))
    port = _first_port(run)
    unused = [] if composed.is_resolved else list(validate_overrides_used(run, composed.overrides))
    try:
        prepared = replan(run, hosts, run_id=run_id, folder=folder.absolute(), port=port, is_fresh=True)
    except ConfigErrors as several:
        raise ConfigErrors([*unused, *several.errors]) from several
    if unused:
        raise ConfigErrors(unused)
    return replace(prepared, locks=locks)


def validate_paths(run: Run) -> Iterator[ConfigError]:
    """Yield every path of ``run`` that cannot be examined.

    The other checks ask only whether a path exists.
    """
    refused = set()
    for option, value in run.paths():
        is_here = run.backend.shares_paths or option in ("run.root", "run.dir")
        if is_here and option not in _PATHS_OF_HOSTS and (problem := validate_path(option, value)):
            refused.add(option)
            yield problem
    follows_model = "model.name" in refused and run.run.name == default_run_name(run.model.name)
    if not run.run.dir and "run.root" not in refused and not follows_model:
        problem = validate_path("run.name", str(Path(run.run.root) / run.run.name / _LONGEST_ID))
        root = Path(run.run.root)
        if exists(root) and not is_folder(root):
            yield ConfigError("run.root", root, why=f"{root} is a file, not a folder", fix="set run.root to a folder")
        elif problem is not None:
            yield ConfigError("run.name", run.run.name, why=problem.why, fix="set run.name to another name")


def replan(
    run: Run, hosts: Sequence[Host], *, run_id: str, folder: Path, port: int, is_fresh: bool = False
) -> PreparedRun:
    """Return the plan of ``run`` on ``hosts``.

    Args:
        run: the typed configuration.
        hosts: the hosts of the run, in the order of ranks.
        run_id: of the run.
        folder: its directory, absolute.
        port: of the rendezvous.
        is_fresh: check this machine's disk and ports too, because nothing has been started yet.

    Raises:
        ConfigErrors: everything that prevents it, found in one pass.
    """
    snapshot = dump_run(run)
    mistakes = list(validate_machine(run, folder, hosts=hosts)) if is_fresh else []
    identity = RunIdentity(run_id=run_id, run_dir=str(folder), run_hash=sha256_of(snapshot.encode()), port=port)
    try:
        plan = make_plan(run, hosts, identity, gather_local_facts(run, run_dir=str(folder)))
    except ConfigErrors as several:
        raise ConfigErrors([*mistakes, *several.errors]) from several
    if mistakes:
        raise ConfigErrors(mistakes)
    if is_fresh:
        room = room_warnings(run, folder, world_size=plan.world_size)
        resumed = resume_warnings(run, folder, world_size=plan.world_size)
        details = {
            **plan.details,
            **data_details(run, folder, plan.work),
            **foreign_weights_details(run),
            **resume_details(run, folder, world_size=plan.world_size),
        }
        plan = replace(plan, details=details, warnings=(*plan.warnings, *resumed, *room, *path_warnings(run, hosts)))
    return PreparedRun(run=run, plan=plan, snapshot=snapshot)


def _first_port(run: Run) -> int:
    if run.backend.port != "auto":
        return run.backend.port
    return DEFAULT_PORT if run.backend.kind != "local" else free_port()


def _run_id_in(folder: str) -> str | None:
    """Return the id of the run that ``folder`` holds: a continued run keeps it, also in W&B.

    Raises:
        ConfigError: its plan cannot be read, or names no id.
    """
    run_dir = RunDir(Path(folder))
    plan = run_dir.plan
    if not run_dir.is_run:  # other files, which validate_machine reports
        return None
    try:
        run_id = read_object(plan).get("run_id")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError("plan.json", plan, why=why, fix="set checkpoint.resume=DIR and another run.dir") from error
    if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
        fix = "set checkpoint.resume=DIR and another run.dir"
        raise ConfigError("plan.json", plan, why="names no run id of letters, digits, - and _", fix=fix)
    return run_id
