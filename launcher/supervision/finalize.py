"""Finalize a run: write `result.json` and `failure.json`, and print what failed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from launcher.errors.secrets import redact
from launcher.protocol.messages import Assignment
from launcher.protocol.outcome import Failure, RankProgress, RunOutcome, Victim
from launcher.protocol.results import write_result
from launcher.protocol.rundir import RunDir
from launcher.runs.state import continue_command, read_run_state
from launcher.utils.files import write_atomic, write_json
from launcher.utils.processes import signal_name
from launcher.utils.system import describe_full_disk
from launcher.utils.text import printable, shell_command, short_path

_MAX_RANKS_SHOWN = 32
_SESSION_KILLED = 128 + signal.SIGKILL
"""Exit code of a killed session: only SIGKILL ends it without an outcome."""


def finalize_run(outcome: RunOutcome, run_dir: RunDir, *, run_id: str) -> None:
    """Write the result files and print what failed; call it once, after the last attempt.

    Nothing is written for a run that was only submitted.
    """
    failure, status = outcome.failure, outcome.status
    if status == "submitted":
        return
    lines: list[str] = []
    if failure is not None:
        lines += try_to_write(run_dir.failure, lambda: write_json(run_dir.failure, redact(failure.tree(), os.environ)))
        lines += try_to_write(run_dir.stacks, lambda: _write_stacks(failure, run_dir))
    lines += try_to_write(
        run_dir.result,
        lambda: write_result(run_dir, status=status, exit_code=outcome.exit_code, run_id=run_id),
    )
    text = "\n".join([*lines, *filter(None, [closing_message(outcome, run_dir)])])
    with contextlib.suppress(OSError):  # the terminal is closed; the files hold the same
        print(text, end="\n" if text else "", file=sys.stderr, flush=True)


def try_to_write(file: Path, write: Callable[[], None]) -> list[str]:
    """Write a file about the end of a run; return a line for the user if that fails."""
    try:
        write()
    except OSError as error:
        return [f"{file} cannot be written: {describe_full_disk(file.parent) or error.strerror or error}"]
    return []


def remove_previous_result(run_dir: RunDir) -> None:
    """Remove the result files of an earlier attempt in the same run directory."""
    for path in result_files(run_dir):
        path.unlink(missing_ok=True)


def result_files(run_dir: RunDir) -> list[Path]:
    """Return the files that say how a run ended."""
    return [run_dir.result, run_dir.failure, run_dir.stacks, *run_dir.logs.glob("failure.rank*.*")]


def closing_message(outcome: RunOutcome, run_dir: RunDir) -> str:
    """Return the last text for the user; empty after a completed run."""
    if outcome.failure is not None:
        return printable(redact(_failure_text(outcome.failure, run_dir), os.environ))
    if outcome.status == "cancelled":
        how = f"cancelled by {signal_name(outcome.exit_code - 128)}; the logs are in {run_dir.logs}"
        return f"{how}\nnext: {_next_command(run_dir) or _command('rerun', run_dir)}"
    if outcome.status == "preempted":
        return f"preempted: continue with `{_next_command(run_dir) or _command('resume', run_dir)}`"
    return ""


def _failure_text(failure: Failure, run_dir: RunDir) -> str:
    """Return the text about a failure; its last line says what failed and why."""
    lines = ["", "── the run failed ──"]
    lines += [failure.reason] if "\n" in failure.reason else []
    lines += [failure.traceback.rstrip()] if failure.traceback else []
    lines += [f"   {_describe_progress(progress)}" for progress in failure.ranks[:_MAX_RANKS_SHOWN]]
    if len(failure.ranks) > _MAX_RANKS_SHOWN:
        lines.append(f"   and {len(failure.ranks) - _MAX_RANKS_SHOWN} more in failure.json")
    logs = _command("logs", run_dir) + ("" if failure.rank is None else f" --rank {failure.rank}")
    more = filter(None, [_next_command(run_dir)])
    commands = [logs, _command("report", run_dir), *more, _command("rerun", run_dir)]
    lines.append("next: " + "\n      ".join(commands))
    if failure.victims:
        lines.append(f"ended with it: {', '.join(map(_name, failure.victims))}")
    lines.append(f"log: {failure.log}")
    return "\n".join([*lines, f"exit code {failure.exit_code}: {failure.reason.splitlines()[0]}"])


def _next_command(run_dir: RunDir) -> str | None:
    """Return the command that continues from kept answers or a checkpoint; ``None`` without."""
    state = read_run_state(run_dir)
    return continue_command(state) if state.has_checkpoint or state.has_kept_answers else None


def _command(verb: str, run_dir: RunDir) -> str:
    return shell_command(["launch", verb, short_path(run_dir.path)])


def _describe_progress(progress: RankProgress) -> str:
    text = f"rank {progress.rank} on {progress.host}: {progress.phase}, step {progress.step}"
    text += f", silent for {progress.silent_s:.0f} s"
    if progress.where:
        where = f"in {progress.collective} ({progress.where})" if progress.collective else f"at {progress.where}"
        text += f", {where}"
    return text


def _write_stacks(failure: Failure, run_dir: RunDir) -> None:
    """Write the stacks that the ranks dumped."""
    known = [progress for progress in failure.ranks if progress.stack]
    if known:
        texts = (f"── {_describe_progress(progress)} ──\n{progress.stack.rstrip()}\n" for progress in known)
        write_atomic(run_dir.stacks, "\n".join(texts).encode(errors="backslashreplace"))


def _name(victim: Victim) -> str:
    exit = signal_name(victim.signal) if victim.signal else f"exit code {victim.exit_code}"
    return f"rank {victim.rank} on {victim.host} ({exit})"


def finalize_without_session(assignment: Assignment, *, is_first: bool) -> int:
    """Write ``result.json`` on the first host, unless it exists; return the run's exit code."""
    run_dir = RunDir(Path(assignment.run_dir))
    if is_first and not run_dir.result.exists():
        with contextlib.suppress(OSError):  # a full disk: there is no session to report it to
            write_result(run_dir, status="cancelled", exit_code=_SESSION_KILLED, run_id=assignment.run_id)
    return _SESSION_KILLED
