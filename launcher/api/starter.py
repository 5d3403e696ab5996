"""``python -m launcher.api.starter``: start the run or the sweep that stdin describes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from launcher.api.messages import error_to_tree, print_answer
from launcher.backends.registry import executor_of
from launcher.config.build import build_run
from launcher.config.compose import Composition
from launcher.config.plugins import load_plugins
from launcher.errors import ConfigError, ConfigErrors, LauncherError
from launcher.execution.lifecycle import start_run
from launcher.execution.prepare import prepare
from launcher.execution.sweep import plan_sweep, run_sweep
from launcher.utils.processes import die_with_parent


def main() -> int:
    """Start what stdin describes; print its directory, or why it cannot start."""
    parent = os.getppid()
    try:
        die_with_parent(parent)
        request = json.load(sys.stdin)
        return _start_run(request["run"]) if "run" in request else _start_sweep(**request["sweep"])
    except LauncherError as error:
        print_answer({"error": error_to_tree(error)})
        return error.exit_code
    except KeyboardInterrupt:  # before or between runs: a run has handlers of its own
        return 128 + signal.SIGINT


def _start_run(tree: dict[str, Any]) -> int:
    load_plugins(tree.get("plugins", ()))
    mistakes: list[ConfigError] = []
    run = build_run(tree, mistakes.append)
    if run is None:
        raise ConfigErrors(mistakes)
    prepared = prepare(Composition(run=run, tree=tree, sweep=None, overrides=(), is_resolved=True))
    print_answer({"folder": str(prepared.directory.path)})
    return start_run(prepared, executor_of(prepared.run))


def _start_sweep(words: list[str], config_dir: str | None) -> int:
    sweep, trials = plan_sweep(words, config_dir=None if config_dir is None else Path(config_dir))
    print_answer({"folder": str(trials[0].prepared.directory.path.parent)})
    return run_sweep(sweep, trials, executor_of)


if __name__ == "__main__":
    sys.exit(main())
