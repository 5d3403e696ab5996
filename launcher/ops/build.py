"""Build operators with progress, a time limit and no orphan processes, under two locks.

Our own lock is held around all building; torch's lock is one that a killed build leaves behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher.errors import EnvironmentProblem
from launcher.protocol.native_ops import (
    OPTIONAL_MARK,
    BuildOutcome,
    is_built,
    mark_built,
    op_lock,
    ops_folder,
    path_with_ninja,
    write_build_outcome,
)
from launcher.utils.processes import end_descendants

Say = Callable[[str], None]
_POLL_S = 0.5
_SAY_EVERY_S = 10.0


@contextmanager
def only_builder(folder: Path, *, say: Say) -> Iterator[None]:
    """Hold the folder's lock while building; wait while another run builds.

    The kernel releases it when its holder dies.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / "building", poll_interval=_POLL_S, fallback_to_soft=False)
    started, timeout_s = time.monotonic(), 0.0
    while True:
        try:
            held = lock.acquire(timeout=timeout_s)
            break
        except Timeout:
            waited, timeout_s = time.monotonic() - started, _SAY_EVERY_S
            say(f"another run is building DeepSpeed's operators, waited {waited:.0f} s so far")
    with held:
        yield


def clear_stale_lock(path: Path, *, say: Say) -> None:
    """Wait until no living process holds torch's lock at ``path``, then remove it.

    torch keeps the file open while it holds the lock, so a lock that no process has open belongs to a dead one. Only
    processes of this machine are seen.
    """
    started, printed_at = time.monotonic(), 0.0
    while path.exists():
        owner = lock_owner(path)
        if owner is None:
            age_s = max(0.0, time.time() - path.stat().st_mtime) if path.exists() else 0.0
            path.unlink(missing_ok=True)
            say(f"cleared {path}: a build that was killed left it {age_s:.0f} s ago")
            return
        waited = time.monotonic() - started
        if waited - printed_at >= _SAY_EVERY_S:
            say(f"process {owner} holds {path}, waited {waited:.0f} s so far")
            printed_at = waited
        time.sleep(_POLL_S)


def lock_owner(path: Path) -> int | None:
    """Return the process that has ``path`` open, or ``None``; on Linux only."""
    target = str(path.resolve())
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        if target in _open_files(descriptors):
            return int(descriptors.parent.name)
    return None


def _open_files(descriptors: Path) -> Iterator[str]:
    """Yield the files a process has open; none if it has exited or is another user's."""
    try:
        links = list(descriptors.iterdir())
    except OSError:
        return
    for link in links:
        try:
            yield str(link.readlink())
        except OSError:  # closed meanwhile
            continue


LIMIT_S = 1800.0
"""Time limit of one operator's build.
It takes minutes on an idle machine, half an hour on a loaded one."""
_JOB_BYTES = 2 * 1024**3
"""Memory of one compiler process."""


def build_ops(arguments: Sequence[str], *, say: Say, limit_s: float = LIMIT_S) -> list[BuildOutcome]:
    """Build the missing operators, one after the other, and return each outcome.

    Args:
        arguments: names of operators; the failure of one that ends in ``?`` is recorded and not fatal.
        say: prints a line for the user.
        limit_s: time for one operator.

    Returns:
        The outcome of each; empty if the folder is another user's, whose operators are used as they are.

    Raises:
        EnvironmentProblem: a required operator cannot be built; the message says what to type.
    """
    folder, outcomes = ops_folder(), []
    if (why := _not_writable(folder)) is not None:
        lacking = [argument for argument in arguments if not is_built(argument.removesuffix(OPTIONAL_MARK))]
        if any(not argument.endswith(OPTIONAL_MARK) for argument in lacking):
            raise EnvironmentProblem(f"DeepSpeed's operators cannot be built: {why}")
        if lacking:
            say(f"cannot build {', '.join(lacking)}, so the run continues without: {why}".replace(OPTIONAL_MARK, ""))
        return []
    with only_builder(folder, say=say):
        for argument in arguments:
            name = argument.removesuffix(OPTIONAL_MARK)
            clear_stale_lock(op_lock(name), say=say)
            outcome = _build_one(name, folder, say=say, limit_s=limit_s)
            write_build_outcome(folder, outcome)
            outcomes.append(outcome)
            if outcome.built:
                continue
            if argument == name:
                raise EnvironmentProblem(f"DeepSpeed's {name} cannot be built: {outcome.why}; {outcome.fix}")
            say(f"cannot build {name}, so the run continues without it: {outcome.why} ({outcome.fix})")
    return outcomes


def _not_writable(folder: Path) -> str | None:
    """Return why nothing can be built in ``folder``, with the option to set, or ``None``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "building").open("a").close()
    except OSError as error:
        variable = "TORCH_EXTENSIONS_DIR" if os.environ.get("TORCH_EXTENSIONS_DIR") else "XDG_CACHE_HOME"
        return f"{folder} cannot be written ({error.strerror}). Set {variable} to a folder of yours"
    return None


def _build_one(name: str, folder: Path, *, say: Say, limit_s: float) -> BuildOutcome:
    if is_built(name):
        return BuildOutcome(name=name, built=True, seconds=0.0)
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        why, fix = f"there is no C++ compiler ({compiler})", "apt-get install g++"
        return BuildOutcome(name=name, built=False, seconds=0.0, why=why, fix=fix)
    log, started = folder / f"{name}.log", time.monotonic()
    code = _compile(name, log, say=say, limit_s=limit_s)
    seconds = time.monotonic() - started
    if code == 0:
        mark_built(name)
    if code == 0 and is_built(name):
        say(f"built {name} in {seconds:.0f} s")
        return BuildOutcome(name=name, built=True, seconds=seconds)
    if code is None:
        why, fix = f"it took longer than {limit_s:.0f} s", "start the run again when the machine is less loaded"
    else:
        why, fix = _failure_reason(name, log.read_text(encoding="utf-8", errors="replace"))
        fix = f"{fix} (all of its output: {log})"
    return BuildOutcome(name=name, built=False, seconds=seconds, why=why, fix=fix)


def _compile(name: str, log: Path, *, say: Say, limit_s: float) -> int | None:
    """Run the compiler process; return its exit status, or ``None`` if it timed out."""
    started = time.monotonic()
    with log.open("w") as output:
        command = [sys.executable, "-m", "launcher.ops.compile", name]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
    try:
        while True:
            try:
                return process.wait(timeout=_SAY_EVERY_S)
            except subprocess.TimeoutExpired:
                seconds = time.monotonic() - started
                if seconds > limit_s:
                    return None
                say(f"building {name}, {seconds:.0f} s so far, limit {limit_s:.0f} s")
    finally:
        if process.poll() is None:
            _stop_tree(process)
            clear_stale_lock(op_lock(name), say=say)


def _stop_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and the compilers below it, even those that ninja starts meanwhile."""
    process.send_signal(signal.SIGSTOP)
    end_descendants(process.pid)
    process.kill()
    process.wait()


def _environment() -> dict[str, str]:
    cores, memory = os.cpu_count() or 1, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    jobs = max(1, min(cores, memory // _JOB_BYTES))
    return {
        "MAX_JOBS": str(jobs),
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(ops_folder()),
        "PATH": path_with_ninja(),
    }


def _failure_reason(name: str, output: str) -> tuple[str, str]:
    """Return why a build failed and how to fix it."""
    if name == "async_io" and "not being compatible" in output:
        return "libaio's headers are not installed", "apt-get install libaio-dev"
    if "Python.h" in output:
        return "Python's headers are not installed", "apt-get install python3-dev"
    if "ninja" in output and "not being installed" in output:
        return "ninja is not installed", "pip install ninja"
    lines = [line.strip() for line in output.splitlines() if "error" in line.lower()]
    return (lines[0] if lines else "the compiler failed"), "correct that, or set optimizer.implementation=torch"
