"""From a run that may start to its end: the hosts, the directory, the attempts, the last words."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launcher.announce import closing, opening
from launcher.attempts import carry_out
from launcher.checkpoint.lock import RunLock
from launcher.disk import full_disk
from launcher.errors import ConfigError, ConfigErrors, LauncherError
from launcher.files import read_json
from launcher.preflight import refuse_occupied, refuse_small_memlock, refuse_small_nvme
from launcher.prepare import Prepared
from launcher.run_index import INDEX, add_run, forget_run, is_below
from launcher.rundir import RunDir, StagedFiles
from launcher.terminal import printable


def start(prepared: Prepared) -> int:
    """Ask the hosts, write the run directory, start the ranks, stay until they end, and return the exit code."""
    if prepared.run.backend.asks_hosts:
        from launcher.examination import examined

        prepared = examined(prepared)
    directory, backend, staged = prepared.directory, prepared.run.backend, StagedFiles()
    with _locked(directory, staged, hands_over=backend.hands_over) as lock:
        staged.remember(directory.snapshot, directory.plan)
        is_indexed = False
        session = _stamp(directory.session)
        started = time.monotonic()
        try:
            occupied = list(refuse_occupied(prepared.run, directory, is_locked=True))
            unfit = (
                *refuse_small_nvme(prepared.run, prepared.hosts),
                *refuse_small_memlock(prepared.run, prepared.hosts),
            )
            if mistakes := [*occupied, *unfit]:
                raise ConfigErrors(mistakes)
            backend.validate_submission(prepared.plan)
            is_indexed = _index(prepared, staged)
            print(printable("\n".join(opening(prepared.plan))), flush=True)
            code = carry_out(prepared)
        except LauncherError:
            if _stamp(directory.session) == session:  # nothing was started
                if is_indexed:
                    forget_run(Path(prepared.run.run.root), directory)
                lock.remove()
                staged.undo()
            raise
        if code == 0 and not backend.hands_over and directory.result.exists():
            last = closing(read_json(directory.result), directory, elapsed_s=time.monotonic() - started)
            print(printable(last), flush=True)
        return code


def _index(prepared: Prepared, staged: StagedFiles) -> bool:
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
        print(f"note: launch runs will not list this run: {root / INDEX}: {error.strerror}", file=sys.stderr)
        return False


def _locked(directory: RunDir, staged: StagedFiles, *, hands_over: bool) -> RunLock:
    """Make the run directory and return the lock that this process holds on it.

    A run that is handed over is locked by the process that carries it out; the submission has a lock of its own.

    Raises:
        ConfigError: the directory cannot be written, or another launcher has it; nothing was made.
    """
    lock = RunLock(directory.path)
    try:
        staged.make_folder(directory.logs)
        lock.acquire()
        if not hands_over:
            return lock
        submission = RunLock(directory.path, name=".submission").acquire()
    except (ConfigError, OSError) as error:
        lock.remove()
        staged.undo()
        if isinstance(error, ConfigError):
            raise
        why = full_disk(directory.path) or error.strerror or str(error)
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
