"""``python -m launcher.api.starter``: start the run that stdin describes."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from launcher.api.functions import ANSWER
from launcher.backends.registry import executor_of
from launcher.config.build import build_run
from launcher.config.compose import Composition
from launcher.config.plugins import load_plugins
from launcher.errors import ConfigError, ConfigErrors, LauncherError
from launcher.errors.secrets import redact
from launcher.execution.lifecycle import start_run
from launcher.execution.prepare import prepare
from launcher.utils.processes import die_with_parent


def main() -> int:
    """Start the run that stdin describes; print its directory, or why it cannot start."""
    parent = os.getppid()
    die_with_parent(parent)
    tree = json.load(sys.stdin)
    try:
        load_plugins(tree.get("plugins", ()))
        mistakes: list[ConfigError] = []
        run = build_run(tree, mistakes.append)
        if run is None:
            raise ConfigErrors(mistakes)
        prepared = prepare(Composition(run=run, tree=tree, sweep=None, overrides=(), is_resolved=True))
        _answer({"run_dir": str(prepared.directory.path)})
        return start_run(prepared, executor_of(prepared.run.backend))
    except LauncherError as error:
        _answer({"error": redact(str(error), os.environ), "exit_code": error.exit_code})
        return error.exit_code


def _answer(values: dict[str, Any]) -> None:
    print(f"{ANSWER}{json.dumps(values)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
