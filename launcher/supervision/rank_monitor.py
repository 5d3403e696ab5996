"""Run a rank below its rank monitor: a small parent that knows exactly how it ended.

torchrun and DeepSpeed flatten a rank's exit code to 1, and neither ends the rank's own children. So each process that
they start forks at once. The child becomes the rank; the parent stays as its monitor: it forwards signals, reports the
exact exit code or signal, kills the processes that the rank left behind, and exits the same way.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

from launcher.errors import EXIT_PREEMPTED, LauncherError, exit_code_of_rank
from launcher.protocol.heartbeat import Heartbeat, heartbeat_file
from launcher.protocol.messages import MAX_TEXT_CHARS
from launcher.protocol.rank_env import RankEnv, exception_text_file
from launcher.supervision.file_channel import FileChannel
from launcher.supervision.socket_channel import MonitorExited, MonitorSignalled, MonitorStarted, SocketChannel
from launcher.utils.files import open_append, write_json
from launcher.utils.logs import quiet_libraries
from launcher.utils.processes import become_subreaper, die_with_parent, end_descendants, exit_like, signal_main_thread
from launcher.utils.system import is_disk_full_error
from launcher.utils.text import cut_middle

_FORWARDED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1})
_TICK_S = 0.25
_ORPHAN_GRACE_S = 3.0
"""Time for a rank to exit on its own after its host agent died."""
_LATE_SIGNAL_S = 0.1
"""Time between the signals that DeepSpeed sends to a rank and to its monitor."""
RankWork = Callable[[RankEnv, Heartbeat], None]


def run_rank(work: RankWork, env: RankEnv, *, channel: FileChannel | None = None) -> NoReturn:
    """Make this process the rank ``env`` with log and monitor; do ``work``; exit with its code.

    Call it before anything heavy is imported: it forks.

    Args:
        work: function of the rank.
        env: identity of the rank.
        channel: to an agent on another machine, where the rank's own host has none.
    """
    redirect_output(env.log)
    quiet_libraries()
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)  # before the fork, so that it is always registered
    fork_monitor(env.rank, channel or SocketChannel(env.scratch))
    slot = heartbeat_file(env.scratch, env.rank) if env.scratch else None
    heartbeat = Heartbeat(channel.heartbeat if channel else slot)
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
        with open_append(log) as file:
            descriptor = os.dup(file.fileno())
    except OSError as error:
        if not is_disk_full_error(error):
            raise
        descriptor = os.dup(2)  # stderr of the launcher: the agent's log, or nothing
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
    """Do the work and return the exit code; an exception is printed and recorded."""
    try:
        work(env, heartbeat)
    except SystemExit as exit:
        if exit.code in (None, 0, EXIT_PREEMPTED):
            return int(exit.code or 0)
        if isinstance(exit.code, int):
            return _record_exception(exit, env, heartbeat, code=exit.code)
        _print_exception(str(exit.code), env)
        return _record_exception(exit, env, heartbeat, code=1)
    except Exception as error:  # noqa: BLE001 (this is the last handler of the rank)
        return _exit_code_of_error(error, env, heartbeat)
    return 0


def _exit_code_of_error(error: Exception, env: RankEnv, heartbeat: Heartbeat) -> int:
    """Print and record an exception, unless the rank was about to end on a signal.

    Then it came of closing: of other ranks that have ended already, for example.

    Raises:
        KeyboardInterrupt: the rank was interrupted before.
    """
    for earlier in _came_of(error):
        if isinstance(earlier, KeyboardInterrupt):
            raise earlier
        if isinstance(earlier, SystemExit) and earlier.code == EXIT_PREEMPTED:
            with contextlib.suppress(OSError):  # the disk of the log is full
                print(f"note: closing failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return EXIT_PREEMPTED
    if isinstance(error, LauncherError):
        _print_exception(str(error), env)
        return _record_exception(error, env, heartbeat, code=exit_code_of_rank(error))
    _print_exception("".join(_traceback(error)).rstrip(), env)
    return _record_exception(error, env, heartbeat, code=1)


def _came_of(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions that were being handled when ``error`` was raised."""
    seen, earlier = {id(error)}, error.__context__
    while earlier is not None and id(earlier) not in seen:
        seen.add(id(earlier))
        yield earlier
        earlier = earlier.__context__


def _record_exception(error: BaseException, env: RankEnv, heartbeat: Heartbeat, *, code: int) -> int:
    """Record the exception now, because the exit may take long; return the exit code, never 0.

    The system keeps eight bits of an exit code: 256 would be a success.
    """
    code = code & 0xFF or 1
    is_own = isinstance(error, LauncherError)
    record = {
        "rank": env.rank,
        "host": env.host,
        "machine": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "code": code,
        "error": _short(str(error) if is_own else "".join(traceback.format_exception_only(error)).strip()),
        "traceback": "" if is_own else _short("".join(_traceback(error))),
    }
    try:
        write_json(env.record, record)
    except OSError as problem:  # the disk is full
        heartbeat.write_exception_record(record)
        print(f"the failure could not be recorded: {problem}", file=sys.stderr, flush=True)
    return code


def _short(text: str) -> str:
    """Return the text cut to the size of a message; the log has all of a long exception."""
    return cut_middle(text, limit=MAX_TEXT_CHARS)


def _traceback(error: BaseException) -> list[str]:
    """Return the lines of a traceback without the frame of this module at its top."""
    frames = error.__traceback__ and error.__traceback__.tb_next
    return traceback.format_exception(type(error), error, frames)


def _print_exception(text: str, env: RankEnv) -> None:
    """Print the exception, after writing its text to the file that the agent's filter reads."""
    with contextlib.suppress(OSError):  # then it is shown twice
        exception_text_file(env.run_dir, env.rank).write_text(text, encoding="utf-8", errors="backslashreplace")
    with contextlib.suppress(OSError):  # the disk of the log is full; the record holds the text too
        print(text, file=sys.stderr, flush=True)


def _flush_or_discard_output() -> None:
    """Flush the streams, or discard their data: otherwise Python would exit with 120."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def _exit_by_signal(number: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise AssertionError("a signal with its default action ends the process")


def fork_monitor(rank: int, channel: SocketChannel | FileChannel) -> None:
    """Fork; return in the child only, which is killed when its monitor is.

    Args:
        rank: number of the rank.
        channel: to the host agent; the monitor keeps it.
    """
    assert threading.active_count() == 1, "a fork copies only the thread that calls it"
    become_subreaper()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED | {signal.SIGCHLD})
    monitor, started = os.getpid(), time.monotonic()
    child = os.fork()
    if child == 0:
        die_with_parent(monitor)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        channel.close()
        return
    channel.send(MonitorStarted(rank=rank, monitor_pid=monitor, pid=child))
    launcher_signals: set[int] = set()
    status = _wait_for(child, channel, launcher_signals)
    wall_s = time.monotonic() - started
    by_launcher = os.WIFSIGNALED(status) and _was_sent(os.WTERMSIG(status), launcher_signals)
    channel.send(MonitorExited(status=status, time=time.time(), wall_s=wall_s, by_launcher=by_launcher))
    end_descendants(monitor)
    exit_like(status)


def _wait_for(child: int, channel: SocketChannel | FileChannel, launcher_signals: set[int]) -> int:
    """Return the wait status of ``child``; forward signals; end it when the agent is gone.

    Adds to ``launcher_signals`` those that the launcher of this rank sent, and those of this function.
    """
    kill_at = None
    while True:
        arrived = signal.sigtimedwait(_FORWARDED | {signal.SIGCHLD}, _TICK_S)
        if arrived is not None and arrived.si_signo != signal.SIGCHLD:
            os.kill(child, arrived.si_signo)  # not waited for yet, so the PID is still its own
            if arrived.si_pid == os.getppid():
                launcher_signals.add(arrived.si_signo)
                channel.send(MonitorSignalled(signal=arrived.si_signo, signalled_at=time.time()))
        for number in channel.signals():
            send = signal_main_thread if number == signal.SIGUSR2 else os.kill  # the stacks that are asked for
            send(child, number)
        if (status := _reap(child)) is not None:
            return status
        if kill_at is None and channel.is_closed():
            channel.clean_up_after_agent()
            os.kill(child, signal.SIGTERM)
            launcher_signals.add(signal.SIGTERM)
            kill_at = time.monotonic() + _ORPHAN_GRACE_S
        elif kill_at is not None and time.monotonic() > kill_at:
            os.kill(child, signal.SIGKILL)


def _was_sent(number: int, launcher_signals: set[int]) -> bool:
    """Return whether the launcher sent this rank a signal; DeepSpeed signals monitors later."""
    if number in launcher_signals or number not in _FORWARDED:
        return number in launcher_signals
    arrived = signal.sigtimedwait({number}, _LATE_SIGNAL_S)
    return arrived is not None and arrived.si_pid == os.getppid()


def _reap(child: int) -> int | None:
    """Reap all exited children, adopted ones too; return the status of ``child`` if it exited."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            return status
        if pid == 0:
            return None
