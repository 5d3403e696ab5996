"""Run a rank below its rank monitor: a small parent that knows exactly how it ended.

torchrun and DeepSpeed flatten a rank's exit code to 1, and neither tells the rank's own children to go. So each process
they start forks at once. The child becomes the rank; the parent half stays as its monitor: it passes signals on,
reports the exact exit code or signal, ends what the rank left behind, and then ends the same way.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

from launcher.errors import EXIT_PREEMPTED, LauncherError, exit_code_of_rank
from launcher.protocol.heartbeat import Heartbeat, heartbeat_file
from launcher.protocol.rank_env import RankEnv, exception_text_file
from launcher.supervision.file_channel import FileChannel
from launcher.supervision.socket_channel import SocketChannel
from launcher.utils.files import write_json
from launcher.utils.logs import quiet_libraries
from launcher.utils.processes import become_subreaper, die_with_parent, end_descendants, exit_like
from launcher.utils.system import is_disk_full_error

_PASSED_ON = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1})


_TICK_S = 0.25


_ORPHAN_GRACE_S = 3.0
"""Time a rank gets to end by itself after the host agent died."""


_STRAGGLER_S = 0.1
"""Time between the signals that DeepSpeed sends to a rank and to its guard."""


RankWork = Callable[[RankEnv, Heartbeat], None]


def run_rank(work: RankWork, env: RankEnv, *, board: FileChannel | None = None) -> NoReturn:
    """Make this process the rank that ``env`` names: log, guard, stack dumps; do ``work``; exit with the true code.

    Call it before anything heavy is imported: it forks.

    Args:
        work: what the rank does.
        env: who it is.
        board: leads to an agent on another machine, where the rank's own has none.
    """
    redirect_output(env.log)
    quiet_libraries()
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)  # before the fork: never a moment without it
    fork_monitor(env.rank, board or SocketChannel(env.scratch))
    scratch_beats = heartbeat_file(env.scratch, env.rank) if env.scratch else None
    heartbeat = Heartbeat(board.beats if board else scratch_beats)
    heartbeat.update("starting")
    try:
        code = _exit_code_of_work(work, env, heartbeat)
    except KeyboardInterrupt:
        _exit_by_signal(signal.SIGINT)
    _flush_or_discard_output()
    sys.exit(code)


def redirect_output(log: Path) -> None:
    """Append everything this process and its children print to ``log``, line by line."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        if not is_disk_full_error(error):
            raise
        descriptor = os.dup(2)  # of what starts the ranks: the agent's log, or nothing
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for target in (1, 2):
        os.dup2(descriptor, target)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        _by_line(stream)


def _by_line(stream: IO[str]) -> None:
    stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[attr-defined]


def _exit_code_of_work(work: RankWork, env: RankEnv, heartbeat: Heartbeat) -> int:
    """Do the work and return the exit code; whatever went wrong is in the log and in the record."""
    try:
        work(env, heartbeat)
    except SystemExit as ending:
        if ending.code in (None, 0, EXIT_PREEMPTED):
            return int(ending.code or 0)
        if isinstance(ending.code, int):
            return _record_exception(ending, env, heartbeat, code=ending.code)
        _print_exception(str(ending.code), env)
        return _record_exception(ending, env, heartbeat, code=1)
    except LauncherError as error:
        _print_exception(str(error), env)
        return _record_exception(error, env, heartbeat, code=exit_code_of_rank(error))
    except Exception as error:  # noqa: BLE001 (the last one who can tell what happened to this rank)
        _print_exception("".join(_traceback(error)).rstrip(), env)
        return _record_exception(error, env, heartbeat, code=1)
    return 0


def _record_exception(error: BaseException, env: RankEnv, heartbeat: Heartbeat, *, code: int) -> int:
    """Record what ends this rank and return ``code``; its end itself may take long, or come from others."""
    known = isinstance(error, LauncherError)
    record = {
        "rank": env.rank,
        "host": env.host,
        "machine": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "code": code,
        "error": str(error) if known else "".join(traceback.format_exception_only(error)).strip(),
        "traceback": "" if known else "".join(_traceback(error)),
    }
    try:
        write_json(env.record, record)
    except OSError as trouble:  # the disk is full
        heartbeat.write_exception_record(record)
        print(f"the failure could not be recorded: {trouble}", file=sys.stderr, flush=True)
    return code


def _traceback(error: BaseException) -> list[str]:
    """Return the lines of a traceback without the frame of this module at its top."""
    frames = error.__traceback__ and error.__traceback__.tb_next
    return traceback.format_exception(type(error), error, frames)


def _print_exception(text: str, env: RankEnv) -> None:
    """Print what ends this rank; before, write it down for the agent: the end of the run shows it, once."""
    with contextlib.suppress(OSError):  # it is shown twice then
        exception_text_file(env.run_dir, env.rank).write_text(text, encoding="utf-8", errors="backslashreplace")
    with contextlib.suppress(OSError):  # the disk of the log is full: the record says the same
        print(text, file=sys.stderr, flush=True)


def _flush_or_discard_output() -> None:
    """Leave nothing in buffers that cannot be written: Python would exit with 120 instead of the rank's code."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _exit_by_signal(number: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise AssertionError("a signal with its default action ends the process")


def fork_monitor(rank: int, link: SocketChannel | FileChannel) -> None:
    """Fork. Returns in the child only, which is killed when its guard is.

    Args:
        rank: for the report.
        link: to the host agent; the guard keeps it.
    """
    assert threading.active_count() == 1, "a fork copies only the thread that calls it"
    become_subreaper()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
    guard, started = os.getpid(), time.monotonic()
    child = os.fork()
    if child == 0:
        die_with_parent(guard)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        link.close()
        return
    link.tell(kind="hello", rank=rank, guard=guard, pid=child)
    told: set[int] = set()
    status = _wait_for(child, link, told)
    wall_s = time.monotonic() - started
    by_launcher = os.WIFSIGNALED(status) and _was_sent(os.WTERMSIG(status), told)
    link.tell(kind="exit", status=status, time=time.time(), wall_s=wall_s, by_launcher=by_launcher)
    end_descendants(guard)
    exit_like(status)


def _wait_for(child: int, link: SocketChannel | FileChannel, told: set[int]) -> int:
    """Return the wait status of ``child``; pass signals on meanwhile, and end it when the agent is gone.

    ``told`` gets the signals that came from what started this rank, and our own.
    """
    kill_at = None
    while True:
        arrived = signal.sigtimedwait(_PASSED_ON | {signal.SIGCHLD}, _TICK_S)
        if arrived is not None and arrived.si_signo != signal.SIGCHLD:
            os.kill(child, arrived.si_signo)  # not waited for yet, so the number is still its own
            if arrived.si_pid == os.getppid():
                told.add(arrived.si_signo)
                link.tell(kind="told", signal=arrived.si_signo, told_at=time.time())
        for number in link.orders():
            os.kill(child, number)
        if (status := _reap(child)) is not None:
            return status
        if kill_at is None and link.lost():
            link.clean_up_after_agent()
            os.kill(child, signal.SIGTERM)
            told.add(signal.SIGTERM)
            kill_at = time.monotonic() + _ORPHAN_GRACE_S
        elif kill_at is not None and time.monotonic() > kill_at:
            os.kill(child, signal.SIGKILL)


def _was_sent(number: int, told: set[int]) -> bool:
    """Return whether what started this rank sent it that signal; DeepSpeed sends it to the guard a little later."""
    if number in told or number not in _PASSED_ON:
        return number in told
    arrived = signal.sigtimedwait({number}, _STRAGGLER_S)
    return arrived is not None and arrived.si_pid == os.getppid()


def _reap(child: int) -> int | None:
    """Wait for whoever has ended, adopted orphans too; return the status of ``child`` once it is among them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            return status
        if pid == 0:
            return None
