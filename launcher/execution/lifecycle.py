"""The life of a run: probe, stage, submit, restart, finalize.

The parent calls ``start_run``. Where a cluster executes the run, the parent's submission ends once the run is queued,
and the entry point on the far side calls ``execute_run`` with an executor of its own.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.config.parallel.zero import Zero
from launcher.errors import ConfigError, ConfigErrors, LauncherError
from launcher.execution.executor import AnyExecutor, ArrayExecutor
from launcher.execution.held_checkpoints import keep_checkpoints, loads_once
from launcher.execution.prepare import PreparedRun
from launcher.execution.restart import PORT_TRIES, submit_with_restarts, write_run_files
from launcher.execution.summary import closing_text, opening_lines
from launcher.execution.validate import validate_memlock, validate_nvme_space, validate_run_dir
from launcher.protocol.outcome import RunOutcome
from launcher.protocol.rundir import RUN_INDEX, RunDir
from launcher.protocol.swap import sweep
from launcher.runs.index import add_run, forget_run, is_below
from launcher.runs.lock import RunLock
from launcher.utils.files import StagedFiles, read_json
from launcher.utils.system import describe_full_disk
from launcher.utils.text import printable


def start_run(prepared: PreparedRun, executor: AnyExecutor) -> int:
    """Probe the hosts, stage the run directory, execute the run in it, and return the exit code.

    Raises:
        LauncherError: the run cannot start; nothing was started, and the run directory is as it was.
    """
    if prepared.run.backend.probes_hosts:
        from launcher.execution.probe import probe_and_replan

        prepared = probe_and_replan(prepared, executor)
    with _staged(prepared):
        executor.check_submission(prepared.plan)
        return execute_run(prepared, executor).exit_code


def start_together(prepared: Mapping[int, PreparedRun], executor: ArrayExecutor[Any], folder: Path) -> str:
    """Stage the directories of several runs, queue them as one job array, and return its id.

    Args:
        prepared: the runs by their number, each below ``folder``.
        executor: of one of them; all have the same options of the job.
        folder: the directory of their sweep.

    Raises:
        LauncherError: the array is rejected; nothing was queued, and no run directory is left.
    """
    executor.check_submission(next(iter(prepared.values())).plan)
    with contextlib.ExitStack() as stack:
        for each in prepared.values():
            stack.enter_context(_staged(each))
            write_run_files(each)
        return executor.submit_array({number: each.plan for number, each in prepared.items()}, folder=folder)


@contextlib.contextmanager
def _staged(prepared: PreparedRun) -> Iterator[None]:
    """Make, lock and check the run directory and list the run; undo it if nothing starts.

    Raises:
        LauncherError: the directory is not fit for the run, or the block raises it.
    """
    directory, staged = prepared.directory, StagedFiles()
    with _lock_run_dir(directory, staged, is_detached=prepared.run.backend.is_detached) as lock:
        staged.remember(directory.snapshot, directory.plan)
        is_indexed = False
        session = _stamp(directory.session)
        try:
            _remove_nvme_leftovers(prepared)
            _check_staged(prepared)
            is_indexed = _index(prepared, staged)
            yield
        except LauncherError:
            if _stamp(directory.session) == session:  # nothing was started
                if is_indexed:
                    forget_run(Path(prepared.run.run.root), directory)
                lock.remove()
                staged.undo()
            raise


def execute_run(
    prepared: PreparedRun,
    executor: AnyExecutor,
    *,
    port_tries: int = PORT_TRIES,
    prints_summary: bool = True,
    on_end: Callable[[], None] = lambda: None,
) -> RunOutcome:
    """Submit, restart and finalize a run whose directory this process has locked.

    Args:
        prepared: the run, planned on its real hosts.
        executor: starts it.
        port_tries: attempts on different ports, when the port of the rendezvous is in use.
        prints_summary: whether to print what starts, and the files of a completed run.
        on_end: called once the run is finalized.

    Raises:
        LauncherError: nothing was started.
    """
    started = time.monotonic()
    if prints_summary:
        print(printable("\n".join(opening_lines(prepared.plan))), flush=True)
    with prepared.locks as locks:
        keep_checkpoints(prepared.run, prepared.directory, locks)  # of a job that waited in a queue nothing kept them
        if loads_once(prepared.run):
            executor.on_first_step = locks.close
        outcome = submit_with_restarts(prepared, executor, port_tries=port_tries)
    on_end()
    directory = prepared.directory
    if prints_summary and outcome.status == "completed" and directory.result.exists():
        last = closing_text(read_json(directory.result), directory, elapsed_s=time.monotonic() - started)
        print(printable(last), flush=True)
    return outcome


def _remove_nvme_leftovers(prepared: PreparedRun) -> None:
    """Remove what dead runs of this user left on NVMe of this machine.

    Ranks remove it too, but a run that its space keeps from starting has none.
    """
    parallel = prepared.run.parallel
    is_here = any(host.is_probed and not host.ssh_destination for host in prepared.hosts)
    if isinstance(parallel, Zero) and parallel.nvme_path and is_here:
        sweep(Path(parallel.nvme_path).expanduser())


def _check_staged(prepared: PreparedRun) -> None:
    """Raise if the run directory, now locked by this process, is not fit for the run.

    Raises:
        ConfigErrors: it holds another run, or this machine lacks disk or lockable memory.
    """
    run, hosts = prepared.run, prepared.hosts
    occupied = validate_run_dir(run, prepared.directory, is_locked=True)
    if mistakes := [*occupied, *validate_nvme_space(run, hosts), *validate_memlock(run, hosts)]:
        raise ConfigErrors(mistakes)


def _index(prepared: PreparedRun, staged: StagedFiles) -> bool:
    """Let ``launch runs`` find a run outside of ``run.root``; return whether this is new there.

    Failing to write the index does not stop the run.
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


def _lock_run_dir(directory: RunDir, staged: StagedFiles, *, is_detached: bool) -> RunLock:
    """Make the run directory and return the lock that this process holds on it.

    A detached run is locked by the process that executes it; the submission has a lock of its own.

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
    """Return a value that changes when a file is rewritten; ``None`` without a file."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns
