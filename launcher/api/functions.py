"""The functions of the Python API."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, overload

from launcher.api.handle import RunHandle
from launcher.api.process import StarterProcess
from launcher.api.result import Result
from launcher.api.sweep import Sweep
from launcher.config import compose as composition
from launcher.config.compose import Composition
from launcher.config.run import Run, run_to_tree
from launcher.config.validate import validate_overrides_used
from launcher.errors import ConfigError, ConfigErrors
from launcher.execution.prepare import prepare
from launcher.execution.run_references import resolve_run_references
from launcher.planning.render import render_plan
from launcher.protocol.plan import Plan
from launcher.runs.index import find_run


def compose(overrides: Iterable[str] = (), *, config_dir: Path | str | None = None) -> Run:
    """Return the typed configuration of a run.

    ``launcher.compose(["model=gpt2", "job.steps=20"])`` is what ``launch model=gpt2 job.steps=20`` runs.

    Args:
        overrides: the words of the command line, ``plugins=[…]`` included.
        config_dir: a folder of your own options and experiments.

    Raises:
        ConfigErrors: everything that is wrong with them.
    """
    composed = composition.compose(_words(overrides), config_dir=None if config_dir is None else Path(config_dir))
    if composed.sweep is not None:
        raise ConfigError("sweep", why="is a grid of several runs", fix="use launcher.sweep")
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


@overload
def run(run: Run, *, wait: Literal[True] = True) -> Result: ...
@overload
def run(run: Run, *, wait: Literal[False]) -> RunHandle: ...
def run(run: Run, *, wait: bool = True) -> Result | RunHandle:
    """Start a run, print its output, wait for its end, and return what it left.

    A run that fails returns a ``Result`` too: see ``Result.status``. An interrupt (Ctrl-C, a notebook's stop button)
    ends the run on every host first.

    Args:
        run: what to run, of :func:`compose`.
        wait: whether to wait. Otherwise a ``RunHandle`` is returned as soon as the run has a directory. Keep it: the
            run is cancelled when the handle is deleted.

    Raises:
        ConfigErrors: it cannot start; nothing was started.
        Unfit: a host is not fit for it; nothing was started.
        KeyboardInterrupt: it was interrupted, and has ended.
    """
    starter = StarterProcess({"run": run_to_tree(run)})
    try:
        handle = RunHandle(starter)
    except BaseException:
        starter.end()
        raise
    return handle.wait() if wait else handle


def sweep(overrides: Iterable[str], *, config_dir: Path | str | None = None) -> Sweep:
    """Run every combination of several values, print the output, and return what the runs left.

    ``launcher.sweep(["optimizer.lr=1e-4,3e-4"])`` is ``launch sweep optimizer.lr=1e-4,3e-4``. All runs are checked
    before the first one starts. If one fails, the others still run. An interrupt ends the run and the sweep.

    Args:
        overrides: the words of the command line, with several values or ``+sweep=NAME``.
        config_dir: a folder of your own options, experiments and sweeps.

    Raises:
        ConfigErrors: the errors of all runs; nothing was started.
        KeyboardInterrupt: it was interrupted, and the run has ended.
    """
    words = _words(overrides)
    starter = StarterProcess({"sweep": {"words": words, "config_dir": None if config_dir is None else str(config_dir)}})
    try:
        folder = starter.wait_for_folder()
        starter.print_until_end()
    except KeyboardInterrupt:
        starter.interrupt()
        starter.print_until_end()
        raise
    finally:
        starter.end()
    return Sweep(folder)


def load(run: Path | str | None = None, *, root: Path | str = "runs") -> Result:
    """Return what a run left, or has written until now.

    Args:
        run: a run directory, a run id or the beginning of one; ``None`` is the newest run of ``root``.
        root: the folder of all runs.

    Raises:
        ConfigError: it names no run, or several.
    """
    return Result(find_run(None if run is None else str(run), Path(root)).path)


def _composition(run: Run) -> Composition:
    return Composition(run=run, tree=run_to_tree(run), sweep=None, overrides=(), is_resolved=True)


def _words(overrides: Iterable[str]) -> list[str]:
    if isinstance(overrides, str):
        raise ConfigError("overrides", overrides, why="is a string, not a list", fix=f"give a list: [{overrides!r}]")
    return list(overrides)
