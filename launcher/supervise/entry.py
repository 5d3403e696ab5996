"""How a process becomes a rank, and how its end is written down."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

from launcher.disk import says_full
from launcher.errors import EXIT_PREEMPTED, LauncherError, exit_code_of_rank
from launcher.files import write_json
from launcher.supervise.board import BoardLink
from launcher.supervise.guard import guard_rank
from launcher.supervise.heartbeat import Heartbeat
from launcher.supervise.link import Link, beats_in
from launcher.supervise.rank_env import RankEnv, last_words_of

_SAID_AT_IMPORT = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": " is an Enum subclass and is now natively supported",
}

Work = Callable[[RankEnv, Heartbeat], None]


def enter_rank(work: Work, env: RankEnv, *, board: BoardLink | None = None) -> NoReturn:
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
    guard_rank(env.rank, board or Link(env.scratch))
    scratch_beats = beats_in(env.scratch, env.rank) if env.scratch else None
    heartbeat = Heartbeat(board.beats if board else scratch_beats)
    heartbeat.beat("starting")
    try:
        code = _code_of(work, env, heartbeat)
    except KeyboardInterrupt:
        _die_by(signal.SIGINT)
    _drop_what_no_log_takes()
    sys.exit(code)


def quiet_libraries() -> None:
    """Drop what libraries say at their import about themselves, which no user of this program can change.

    torchao names each of its compiled files that is for another machine, and torch that torchao registers its enums in
    a deprecated way, in every process.
    """
    for logger, saying in _SAID_AT_IMPORT.items():
        logging.getLogger(logger).addFilter(_Without(saying))


class _Without(logging.Filter):
    """Drops records that hold a text."""

    def __init__(self, saying: str) -> None:
        super().__init__()
        self._saying = saying

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to keep it."""
        return self._saying not in str(record.msg)


def redirect_output(log: Path) -> None:
    """Append everything this process and its children print to ``log``, line by line."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        if not says_full(error):
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


def _code_of(work: Work, env: RankEnv, heartbeat: Heartbeat) -> int:
    """Do the work and return the exit code; whatever went wrong is in the log and in the record."""
    try:
        work(env, heartbeat)
    except SystemExit as ending:
        if ending.code in (None, 0, EXIT_PREEMPTED):
            return int(ending.code or 0)
        if isinstance(ending.code, int):
            return _write_down(ending, env, heartbeat, code=ending.code)
        _say(str(ending.code), env)
        return _write_down(ending, env, heartbeat, code=1)
    except LauncherError as error:
        _say(str(error), env)
        return _write_down(error, env, heartbeat, code=exit_code_of_rank(error))
    except Exception as error:  # noqa: BLE001 (the last one who can tell what happened to this rank)
        _say("".join(_traceback(error)).rstrip(), env)
        return _write_down(error, env, heartbeat, code=1)
    return 0


def _write_down(error: BaseException, env: RankEnv, heartbeat: Heartbeat, *, code: int) -> int:
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
        heartbeat.leave_record(record)
        print(f"the failure could not be recorded: {trouble}", file=sys.stderr, flush=True)
    return code


def _traceback(error: BaseException) -> list[str]:
    """Return the lines of a traceback without the frame of this module at its top."""
    frames = error.__traceback__ and error.__traceback__.tb_next
    return traceback.format_exception(type(error), error, frames)


def _say(text: str, env: RankEnv) -> None:
    """Print what ends this rank; before, write it down for the agent: the end of the run shows it, once."""
    with contextlib.suppress(OSError):  # it is shown twice then
        last_words_of(env.run_dir, env.rank).write_text(text, encoding="utf-8", errors="backslashreplace")
    with contextlib.suppress(OSError):  # the disk of the log is full: the record says the same
        print(text, file=sys.stderr, flush=True)


def _drop_what_no_log_takes() -> None:
    """Leave nothing in buffers that cannot be written: Python would exit with 120 instead of the rank's code."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _die_by(number: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise AssertionError("a signal with its default action ends the process")
