"""``launcher.compose``, ``launcher.plan`` and ``launcher.run``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.api.result import Result
from launcher.config import compose as composition
from launcher.config.compose import Composition
from launcher.config.run import Run, run_to_tree
from launcher.config.validate import validate_overrides_used
from launcher.errors import EXIT_UNFIT, ConfigError, ConfigErrors, EnvironmentProblem, LauncherError, Unfit
from launcher.execution.prepare import prepare
from launcher.execution.run_references import resolve_run_references
from launcher.planning.render import render_plan
from launcher.plugins.loading import import_folders
from launcher.protocol.plan import Plan
from launcher.utils.system import child_environment

STARTER_MODULE = "launcher.api.starter"
"""The process that starts a run: a notebook keeps its own signals and children."""


def compose(overrides: Iterable[str] = (), *, config_dir: Path | str | None = None) -> Run:
    """Return the typed configuration of a run.

    ``launcher.compose(["model=gpt2", "job.steps=20"])`` is what ``launch model=gpt2 job.steps=20`` runs.

    Args:
        overrides: the words of the command line, ``plugins=[…]`` included.
        config_dir: a folder of your own options and experiments.

    Raises:
        ConfigErrors: everything that is wrong with them.
    """
    if isinstance(overrides, str):
        raise ConfigError("overrides", overrides, why="is a string, not a list", fix=f"give a list: [{overrides!r}]")
    words = tuple(overrides)
    composed = composition.compose(words, config_dir=None if config_dir is None else Path(config_dir))
    if composed.sweep is not None:
        raise ConfigError(
            "sweep", why="is a grid of several runs", fix="call compose for each run, or use launch sweep"
        )
    run = resolve_run_references(composed)
    if unused := list(validate_overrides_used(run, composed.overrides)):
        raise ConfigErrors(unused)
    return run


def plan(run: Run) -> Plan:
    """Return what a run would do: processes, hosts, environment, files. Nothing is started.

    ``print(launcher.render(plan))`` shows it as ``launch plan`` does.

    Raises:
        ConfigErrors: every reason why it cannot start.
    """
    return prepare(_composition(run)).plan


def render(plan: Plan) -> str:
    """Return a plan as the text that ``launch plan`` prints."""
    return render_plan(plan)


def run(run: Run) -> Result:
    """Start a run, print its output, wait for its end, and return what it left.

    A run that fails returns a ``Result`` too: see ``Result.status``. An interrupt (Ctrl-C, a notebook's stop button)
    ends the run on every host first.

    Raises:
        ConfigErrors: it cannot start; nothing was started.
        Unfit: a host is not fit for it; nothing was started.
        KeyboardInterrupt: it was interrupted, and has ended.
    """
    prepare(_composition(run))  # raises here, as exceptions with their options
    starter = subprocess.Popen(
        [sys.executable, "-m", STARTER_MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=child_environment(import_folders()),
        start_new_session=True,  # an interrupt comes once, through this process
        text=True,
        errors="replace",
    )
    assert starter.stdin is not None
    answer: dict[str, Any] = {}
    is_interrupted = False
    try:
        with suppress(BrokenPipeError):  # it has ended already, and printed why
            starter.stdin.write(json.dumps(run_to_tree(run)))
            starter.stdin.close()
        answer = _follow(starter)
    except KeyboardInterrupt:
        is_interrupted = True
        starter.send_signal(signal.SIGINT)
        answer = _follow(starter)
    finally:
        _end(starter)
    if is_interrupted:
        raise KeyboardInterrupt
    if "error" in answer:
        raise _error(answer)
    if "run_dir" not in answer:
        raise EnvironmentProblem(f"the process that starts the run ended with exit code {starter.returncode}")
    return Result(Path(answer["run_dir"]), submit_code=starter.returncode)


def _composition(run: Run) -> Composition:
    return Composition(run=run, tree=run_to_tree(run), sweep=None, overrides=(), is_resolved=True)


ANSWER = "\x1elauncher "
"""What the starter puts before a line that is for this process."""


def _follow(starter: subprocess.Popen[str]) -> dict[str, Any]:
    """Print the starter's lines until it ends; return what it says of the run."""
    assert starter.stdout is not None
    answer: dict[str, Any] = {}
    for line in starter.stdout:
        if line.startswith(ANSWER):
            answer |= json.loads(line.removeprefix(ANSWER))
        else:
            print(line, end="", flush=True)
    starter.wait()
    return answer


def _end(starter: subprocess.Popen[str]) -> None:
    """Make sure that the starter has ended: as Ctrl-C would, then as a second one."""
    starter.stdin = None  # communicate would flush it, and it is closed
    while starter.poll() is None:
        starter.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            starter.communicate(timeout=_INTERRUPT_S)  # reads its output: it cannot end while the pipe is full
    assert starter.stdout is not None
    starter.stdout.close()


_INTERRUPT_S = 30.0
"""Time after which a second interrupt ends a run at once."""


def _error(answer: dict[str, Any]) -> LauncherError:
    if answer["exit_code"] == EXIT_UNFIT:
        return Unfit(answer["error"])
    return EnvironmentProblem(answer["error"])
