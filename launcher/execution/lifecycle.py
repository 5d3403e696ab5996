"""Start a prepared run and stay until its end: probe, run directory, submission, summary."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import ConfigError, ConfigErrors, LauncherError
from launcher.execution.executor import AnyExecutor
from launcher.execution.prepare import PreparedRun
from launcher.execution.restart import submit_with_restarts
from launcher.execution.validate import validate_memlock, validate_nvme_space, validate_run_dir
from launcher.planning.render import placement_lines
from launcher.planning.topology import group_hosts
from launcher.protocol.plan import Plan
from launcher.protocol.rundir import RUN_INDEX, RunDir
from launcher.runs.index import add_run, forget_run, is_below
from launcher.runs.lock import RunLock
from launcher.runs.state import continue_command, read_run_state
from launcher.utils.files import StagedFiles, read_json
from launcher.utils.system import describe_full_disk
from launcher.utils.text import printable, short_path


def start_run(prepared: PreparedRun, executor: AnyExecutor) -> int:
    """Ask the hosts, write the run directory, start the ranks, stay until they end, and return the exit code."""
    if prepared.run.backend.probes_hosts:
        from launcher.execution.probe import probe_and_replan

        prepared = probe_and_replan(prepared, executor)
    directory, backend, staged = prepared.directory, prepared.run.backend, StagedFiles()
    with _locked(directory, staged, is_detached=backend.is_detached) as lock:
        staged.remember(directory.snapshot, directory.plan)
        is_indexed = False
        session = _stamp(directory.session)
        started = time.monotonic()
        try:
            occupied = list(validate_run_dir(prepared.run, directory, is_locked=True))
            unfit = (
                *validate_nvme_space(prepared.run, prepared.hosts),
                *validate_memlock(prepared.run, prepared.hosts),
            )
            if mistakes := [*occupied, *unfit]:
                raise ConfigErrors(mistakes)
            executor.validate_submission(prepared.plan)
            is_indexed = _index(prepared, staged)
            print(printable("\n".join(opening_lines(prepared.plan))), flush=True)
            code = submit_with_restarts(prepared, executor)
        except LauncherError:
            if _stamp(directory.session) == session:  # nothing was started
                if is_indexed:
                    forget_run(Path(prepared.run.run.root), directory)
                lock.remove()
                staged.undo()
            raise
        if code == 0 and not backend.is_detached and directory.result.exists():
            last = closing_text(read_json(directory.result), directory, elapsed_s=time.monotonic() - started)
            print(printable(last), flush=True)
        return code


def _index(prepared: PreparedRun, staged: StagedFiles) -> bool:
    """Let ``launch runs`` find a run outside of ``run.root``; return whether this is new there.

    A run that cannot be noted there runs all the same.
    """
    root, plan, directory = Path(prepared.run.run.root), prepared.plan, prepared.directory
    if is_below(directory, root):
        return False
    try:
        staged.make_folder(root)
        return add_run(root, directory, run_id=plan.run_id, name=plan.name)
    except OSError as error:
        print(f"note: launch runs will not list this run: {root / RUN_INDEX}: {error.strerror}", file=sys.stderr)
        return False


def _locked(directory: RunDir, staged: StagedFiles, *, is_detached: bool) -> RunLock:
    """Make the run directory and return the lock that this process holds on it.

    A run that is handed over is locked by the process that carries it out; the submission has a lock of its own.

    Raises:
        ConfigError: the directory cannot be written, or another launcher has it; nothing was made.
    """
    lock = RunLock(directory.path)
    try:
        staged.make_folder(directory.logs)
        lock.acquire()
        if not is_detached:
            return lock
        submission = RunLock(directory.path, name=".submission").acquire()
    except (ConfigError, OSError) as error:
        lock.remove()
        staged.undo()
        if isinstance(error, ConfigError):
            raise
        why = describe_full_disk(directory.path) or error.strerror or str(error)
        fix = "choose a folder you can write to"
        raise ConfigError("run.dir", directory.path, why=why, fix=fix) from error
    lock.remove()
    return submission


def _stamp(file: Path) -> tuple[int, int] | None:
    """Return what changes when a file is written anew; ``None`` while there is none."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


_PLUMBING = frozenset(
    {
        "run.yaml",
        "plan.json",
        "session.json",
        "result.json",
        "timeline.jsonl",
        "environment.json",
        "channel",
        "hostfile",
    }
)


def opening_lines(plan: Plan) -> Iterator[str]:
    """Yield what is about to happen, where it is kept, where W&B goes, and what may surprise."""
    hosts = "" if len(plan.hosts) == 1 else f" on {len(plan.hosts)} hosts"
    ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}{hosts}"
    params = f"{plan.memory.num_params:,} parameters, " if plan.memory else ""
    yield f"{plan.name}: {params}{ranks}, {_amount(plan)}"
    if len(plan.hosts) > 1:
        yield from placement_lines(group_hosts(plan.hosts))
    yield f"run directory: {plan.run_dir}"
    yield f"tracker: {plan.tracker.kind}, {plan.tracker.mode}: {plan.tracker.reason}"
    yield from (f"warning: {warning}" for warning in plan.warnings)


def _amount(plan: Plan) -> str:
    """Return how much there is to do; for work without an end, what is done."""
    work = plan.work
    if work.batch is not None:
        return f"{work.batch} sequences a step, {work.num_steps} steps"
    if work.num_steps == 0:
        return ", ".join([plan.job, *(f"{name} {value}" for name, value in plan.details.items() if name == "address")])
    return f"{work.num_steps} {'requests' if plan.summary.model else 'measurements'}"


def closing_text(result: Mapping[str, Any], directory: RunDir, *, elapsed_s: float) -> str:
    """Return how a completed run went, what it left, and what to type next.

    Args:
        result: its ``result.json``.
        directory: of the run.
        elapsed_s: time it took.
    """
    metrics = result["metrics"]
    loss = metrics.get("eval/loss")
    told = [f"{result['status']} in {elapsed_s:.0f} s"]
    if loss is not None:
        beaten = ", ".join(
            f"{name.removeprefix('baseline/')} {value:.4f}"
            for name, value in metrics.items()
            if name.startswith("baseline/") and value is not None
        )
        told.append(f"held-out loss {loss:.4f}" + (f" ({beaten})" if beaten else ""))
    where, steps = short_path(directory.path), sorted(directory.checkpoints.glob("step_*/manifest.json"))
    commands = [shlex.join(["launch", verb, where]) for verb in ("report", "status")]
    if more := continue_command(read_run_state(directory)):
        commands.append(more)
    return "\n".join(
        [
            "; ".join(told),
            f"left in {where}: {', '.join(_left(directory, steps))}",
            "next: " + "\n      ".join(commands),
        ]
    )


def _left(directory: RunDir, steps: Sequence[Path]) -> Iterator[str]:
    """Yield what a user may want of the files of a run; not those that only this program reads."""
    for entry in sorted(directory.path.iterdir()):
        if entry == directory.checkpoints and steps:
            yield f"checkpoints/{steps[-1].parent.name}"
        elif not entry.name.startswith(".") and entry.name not in _PLUMBING and entry != directory.checkpoints:
            yield f"{entry.name}/" if entry.is_dir() else entry.name
